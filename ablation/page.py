"""The page of a table of ablations: plots, tables, links to the reports of the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from ablation.chart import draw_rows
from ablation.formats import (
    COSTS,
    UNKNOWN,
    cost_table,
    difference_cells,
    facts,
    heading,
    interval_text,
    published_text,
    remarks,
    row_name,
    shown_scores,
    spread_text,
)
from ablation.summary import Summary, data_name
from evaluation.charts import as_data
from evaluation.page import render
from evaluation.tables import COLUMNS, SAMED

TEMPLATE = Path(__file__).with_suffix(".html")


def page_of(summary: Summary) -> str:
    """Return the page, which needs no network and no other file but the runs' reports."""
    return render(TEMPLATE, **_content(summary))


def _content(summary: Summary) -> dict[str, Any]:
    """Return the names that the template uses."""
    test = summary.reference
    scores = shown_scores(summary)
    with_organs = [row for row in summary.rows if row.published and row.published.organs]
    return {
        "summary": summary,
        "facts": facts(summary),
        "data": data_name(test) if test else None,
        "classes": test.class_names if test else [],
        "scores": scores,
        "compared": scores[:2],
        "samed": SAMED,
        "columns": COLUMNS,
        "heading": heading,
        "row_name": row_name,
        "spread_text": spread_text,
        "published_text": published_text,
        "difference_cells": difference_cells,
        "interval_text": interval_text,
        "with_organs": with_organs,
        "cost_table": cost_table(summary),
        "costs": COSTS,
        "unknown": UNKNOWN,
        "remarks": remarks(summary)[-2:],
        "charts": [as_data(draw_rows(summary, [score])) for score in scores[:2]],
        "link": quote,
    }
