"""Draw the scores of the rows of a table: a dot for each seed, mean and standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ablation.summary import RowResult, Summary
from evaluation.tables import COLUMNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LONGEST = 58  # characters of a name; the tables have the whole names
BASE, OTHER, MARK = "#1f5f99", "0.15", "#d98200"


def draw_rows(summary: Summary, scores: Sequence[str]) -> Figure:
    """Draw one panel for each score, one line for each row; the base row is marked.

    Names stand above the lines, so that a panel fits onto the screen of a phone.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(scores), 0.42 * len(summary.rows) + 0.9))
    panels = figure.subplots(1, len(scores), squeeze=False)[0]
    for axes, score in zip(panels, scores, strict=True):
        _draw_score(axes, summary, score)
    figure.set_layout_engine("tight")  # computed while drawing, after `render` changed the texts
    return figure


def shortened(name: str) -> str:
    """Return a name without its middle if it is long: rows differ at their ends."""
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST // 2 - 1]}…{name[-LONGEST // 2 :]}"


def _draw_score(axes: Axes, summary: Summary, score: str) -> None:
    unit, factor, more = COLUMNS[score]
    for place, row in enumerate(summary.rows):
        is_base = row.row.name == summary.table.base
        _draw_row(axes, row, score, place, factor, BASE if is_base else OTHER)
        mean = row.score(score).mean
        if is_base and mean is not None:
            axes.axvline(factor * mean, color=BASE, linewidth=0.9, linestyle="--", zorder=0)
        axes.annotate(
            shortened(row.row.name),
            (0, place - 0.38),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
            color=BASE if is_base else OTHER,
            weight="bold" if is_base else "normal",
        )
    axes.set_ylim(len(summary.rows) - 0.5, -0.8)
    axes.set_yticks([])
    axes.set_xlabel(f"{unit} ({'more' if more else 'less'} is better)")
    axes.grid(axis="x", alpha=0.3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_row(
    axes: Axes, row: RowResult, score: str, place: int, factor: float, colour: str
) -> None:
    spread = row.score(score)
    if spread.mean is None:
        return
    values = [factor * value for value in spread.by_seed.values()]
    mean = factor * spread.mean
    if spread.sd is not None:
        sd = factor * spread.sd
        axes.plot((mean - sd, mean + sd), (place, place), color=colour, linewidth=1.6, zorder=1)
    axes.scatter(values, [place] * len(values), s=20, color=MARK, linewidths=0, zorder=2)
    axes.plot((mean, mean), (place - 0.22, place + 0.22), color=colour, linewidth=2.4, zorder=3)
