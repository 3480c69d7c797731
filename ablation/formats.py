"""The result of a table as text, CSV, Markdown and JSON; `ablation.page` is its page."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ablation.differences import SeedDifference
from ablation.summary import SCORES, RowResult, Spread, Summary
from evaluation.page import number
from evaluation.tables import COLUMNS, SAMED, align, counted

UNKNOWN = "not known"
DASH = "–"
MIB = 2**20
COSTS = {  # name in `Cost`: heading, unit of a number, digits
    "trainable": ("trainable parameters", 1, 0),
    "adapter_bytes": ("adapter MiB", MIB, 2),
    "seconds_per_step": ("s per step", 1, 3),
    "peak_bytes": ("peak memory MiB", MIB, 0),
}
# Published numbers are by the original's rule, so they stand beside these scores.
PUBLISHED_AS = {"samed_dsc": "dsc", "samed_hd95": "hd95_voxels"}


def shown_scores(summary: Summary) -> list[str]:
    """Return the scores that tables for people show: two by each rule."""
    return ["dsc", summary.distance, *SAMED]


def heading(score: str) -> str:
    """Return the heading of a score's column: `DSC %`, `samed HD95 voxels`."""
    return f"{'samed ' if score in SAMED else ''}{COLUMNS[score][0]}"


def spread_text(spread: Spread, factor: float = 1) -> str:
    """Return `85.57 ± 0.42`; without ± for one seed, – for none."""
    sd = "" if spread.sd is None else f" ± {number(spread.sd, factor)}"
    return f"{number(spread.mean, factor)}{sd}"


def published_text(row: RowResult, score: str) -> str:
    """Return the published number that stands beside a `samed` score."""
    return UNKNOWN if row.published is None else f"{getattr(row.published, PUBLISHED_AS[score])}"


def cost_text(row: RowResult, name: str) -> str:
    """Return a cost of a row: `4,781,000`."""
    value, (_, unit, digits) = row.cost(name), COSTS[name]
    return DASH if value is None else f"{value / unit:,.{digits}f}"


def interval_text(difference: SeedDifference) -> str:
    """Return the 95 % interval of a difference: `−0.31 … +1.20`."""
    ends, factor = difference.found.interval, COLUMNS[difference.score][1]
    return DASH if ends is None else " … ".join(number(end, factor, True) for end in ends)


def difference_cells(row: RowResult, score: str) -> list[str]:
    """Return difference, interval, verdict and agreeing seeds of a row; dashes if not known."""
    difference = row.differences.get(score)
    if difference is None:
        return [DASH] * 4
    return [
        number(difference.found.difference, COLUMNS[score][1], True),
        interval_text(difference),
        difference.verdict,
        f"{difference.agreeing} of {len(difference.by_seed)}",
    ]


def row_name(summary: Summary, row: RowResult) -> str:
    """Return the name of a row, which says if it is the base."""
    return f"{row.row.name} (base)" if row.row.name == summary.table.base else row.row.name


def score_table(summary: Summary) -> list[list[str]]:
    """Return heading and rows of the table of scores."""
    head, rows = ["row", "seeds"], []
    for score in shown_scores(summary):
        head += [heading(score), "published"] if score in SAMED else [heading(score)]
    for row in summary.rows:
        cells = [row_name(summary, row), f"{len(row.done)} of {len(row.cells)}"]
        for score in shown_scores(summary):
            cells.append(spread_text(row.score(score), COLUMNS[score][1]))
            cells += [published_text(row, score)] if score in SAMED else []
        rows.append(cells)
    return [head, *rows]


def difference_table(summary: Summary, score: str) -> list[list[str]]:
    """Return heading and rows of the table of differences from the base row."""
    head = ["row", f"{heading(score)}, row − base", "95 % interval", "verdict", "seeds that agree"]
    others = [row for row in summary.rows if row.row.name != summary.table.base]
    return [head, *([row.row.name, *difference_cells(row, score)] for row in others)]


def cost_table(summary: Summary) -> list[list[str]]:
    """Return heading and rows of the table of costs."""
    head = ["row", *(COSTS[name][0] for name in COSTS)]
    return [
        head,
        *(
            [row_name(summary, row), *(cost_text(row, name) for name in COSTS)]
            for row in summary.rows
        ),
    ]


def tables_of(summary: Summary) -> list[list[list[str]]]:
    """Return the tables that a terminal and Markdown show."""
    tables = [score_table(summary)]
    if len(summary.rows) > 1:
        tables += [difference_table(summary, score) for score in ("dsc", summary.distance)]
    return [*tables, cost_table(summary)]


def remarks(summary: Summary) -> list[str]:
    """Return the sentences below the tables: notes, sources, what is missing, what numbers mean."""
    sources = {row.published.source: row.row.name for row in summary.rows if row.published}
    return [
        *summary.notes,
        *(f"{cell.cell.name}: {cell.missing}" for cell in summary.missing),
        *(f"Published numbers of {name}: {source}." for source, name in sources.items()),
        "mean ± standard deviation (n − 1) over the seeds; – is not known. DSC: a false or missed "
        "organ scores 0. HD95: only where label and prediction both have the organ. samed: the "
        "original's rule, in voxels, by which the published numbers were computed.",
        "Differences: paired by case, over the seeds that both rows have; the 95 % interval is "
        "from a bootstrap over the cases. It does not hold what other seeds would give, and with "
        "many rows some intervals miss 0 by chance.",
    ]


def as_text(summary: Summary) -> str:
    """Return the result as a terminal shows it."""
    parts = [summary.table.title, *(align(table) for table in tables_of(summary))]
    return "\n\n".join([*parts, "\n".join(remarks(summary))])


def as_markdown(summary: Summary) -> str:
    """Return the result as Markdown; names and messages are shown literally."""
    parts = [f"# {escaped(summary.table.title)}"]
    parts += [_markdown_table(table) for table in tables_of(summary)]
    return "\n\n".join([*parts, *map(escaped, remarks(summary))]) + "\n"


def _markdown_table(table: Sequence[Sequence[str]]) -> str:
    rows = [[escaped(cell) for cell in row] for row in table]
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def escaped(text: str) -> str:
    """Return a text that Markdown shows as it is, in one line."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]|#~])", r"\\\1", line)


def as_rows(summary: Summary) -> list[list[Any]]:
    """Return the cells of the CSV file: a heading, then one line for each row; None is empty."""
    parts = ("difference", "low", "high", "pairs", "seeds", "agreeing", "verdict")
    head = ["row", "base", "seeds_done", "seeds", "published_source"]
    head += [f"{score}_{part}" for score in SCORES for part in ("mean", "sd")]
    head += [f"published_{name}" for name in PUBLISHED_AS.values()]
    head += [f"{score}_{part}" for score in SCORES for part in parts]
    head += [*COSTS, "missed_organs", "false_organs"]
    rows = []
    for row in summary.rows:
        known = row.published
        line = [row.row.name, int(row.row.name == summary.table.base)]
        line += [len(row.done), len(row.cells), known.source if known else UNKNOWN]
        for score in SCORES:
            line += [row.score(score).mean, row.score(score).sd]
        line += [getattr(known, name, UNKNOWN) for name in PUBLISHED_AS.values()]
        for score in SCORES:
            line += _difference_values(row.differences.get(score))
        rows.append([*line, *map(row.cost, COSTS), row.missed, row.false])
    return [head, *rows]


def _difference_values(difference: SeedDifference | None) -> list[Any]:
    if difference is None:
        return [None] * 7
    found = difference.found
    ends = found.interval or (None, None)
    counts = [found.pairs, len(difference.by_seed), difference.agreeing]
    return [found.difference, *ends, *counts, difference.verdict]


def as_json(summary: Summary) -> dict[str, Any]:
    """Return everything that is known, with the values of every seed, case and class."""
    test = summary.reference
    return {
        "title": summary.table.title,
        "base": summary.table.base,
        "seeds": list(summary.table.seeds),
        "classes": test.class_names if test else [],
        "cases": [result.case for result in test.results] if test else [],
        "notes": summary.notes,
        "rows": [_row_json(row) for row in summary.rows],
    }


def _row_json(row: RowResult) -> dict[str, Any]:
    scores = {score: row.score(score) for score in SCORES}
    return {
        "name": row.row.name,
        "flags": row.row.flags,
        "scores": {
            score: {"mean": found.mean, "sd": found.sd, "by_seed": found.by_seed}
            for score, found in scores.items()
        },
        "organs": {score: row.organs(score) for score in SCORES},
        "missed_organs": row.missed,
        "false_organs": row.false,
        "published": asdict(row.published) if row.published else None,
        "differences": {
            score: {
                **asdict(one.found),
                "by_seed": one.by_seed,
                "agreeing": one.agreeing,
                "verdict": one.verdict,
            }
            for score, one in row.differences.items()
        },
        "costs": {name: row.cost(name) for name in COSTS},
        "cells": [
            {
                "name": cell.cell.name,
                "seed": cell.cell.seed,
                "missing": cell.missing,
                "report": cell.report,
                "cost": asdict(cell.cost) if cell.cost else None,
            }
            for cell in row.cells
        ],
    }


def facts(summary: Summary) -> str:
    """Return one line about the table: cases, organs, seeds, finished runs."""
    test = summary.reference
    done = len(summary.cells) - len(summary.missing)
    runs = f"{done} of {counted(len(summary.cells), 'run')} finished"
    if test is None:
        return runs
    scans = len({result.independent for result in test.results})
    cases = counted(len(test.results), "case")
    if scans < len(test.results):
        cases += f", slices of {counted(scans, 'scan')}"
    return " · ".join([cases, counted(len(test.class_names), "organ"), runs])
