"""Draw the scores of each organ: bars, boxes and differences. Names are drawn literally."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from common.writing import atomic_path
from datasets.colours import label_colours
from evaluation.metrics import BOTH, FALSE_ORGAN, MISSED
from evaluation.tables import CaseResult, class_means, counted, total_means

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CROWDED = 10  # with more organs, names are turned and numbers are small
MARKS = {  # style of the mark of a case, by its outcome
    BOTH: {"s": 18, "color": "0.15", "alpha": 0.7, "marker": "o", "zorder": 3},
    MISSED: {"s": 46, "color": "crimson", "marker": "x", "linewidths": 2, "zorder": 4},
    FALSE_ORGAN: {"s": 46, "color": "black", "marker": "^", "zorder": 4},
}


def render(figure: Figure, file: Path | IO[bytes], **options: Any) -> None:
    """Write a figure with literal names: `$` starts no formula, missing glyphs become boxes."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(file, **options)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a file that is complete or absent."""
    with atomic_path(path) as temporary:
        render(figure, temporary, dpi=110)


def as_data(figure: Figure) -> str:
    """Return a figure as an SVG picture in a data URL."""
    content = io.BytesIO()
    render(figure, content, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"


def add_legend(
    figure: Figure, handles: Sequence[Artist], names: Sequence[str], columns: int
) -> None:
    """Add a legend below the figure.

    The names are set afterwards, because matplotlib leaves out labels that start with `_`.
    """
    legend = figure.legend(
        handles, ["x"] * len(handles), ncols=columns, loc="lower center", frameon=False
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def draw_scores(results: Sequence[CaseResult], class_names: Sequence[str]) -> Figure:
    """Draw DSC and HD95 of each organ: a bar for the mean, a mark for each case."""
    from matplotlib.figure import Figure

    crowded = len(class_names) > CROWDED
    figure = Figure(figsize=(min(14.0, max(8.0, 1.2 * len(class_names) + 3.4)), 7.2))
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 2)})
    total = total_means(results)
    in_mm = total["hd95_mm"] is not None
    draw_bars(upper, results, class_names, "dsc", 100)
    upper.set(ylabel="DSC %", ylim=(0, 102))
    draw_bars(lower, results, class_names, "hd95_mm" if in_mm else "hd95_voxels", 1)
    lower.set(ylabel=f"HD95 {'mm' if in_mm else 'voxels'}", ylim=(0, None))
    mean_dsc = "-" if total["dsc"] is None else f"{100 * total['dsc']:.2f} %"
    title = (
        f"{counted(len(results), 'case')}, mean DSC {mean_dsc} (a false or missed organ scores 0)"
    )
    upper.set_title(title, loc="left", pad=24)
    add_legend(figure, [upper.scatter([], [], **style) for style in MARKS.values()], list(MARKS), 3)
    places = range(len(class_names))
    if crowded:
        lower.set_xticks(places, class_names, rotation=40, ha="right", rotation_mode="anchor")
    else:
        lower.set_xticks(places, [name.replace(" ", "\n") for name in class_names])
    # The layout is computed while drawing, after `render` has changed the texts.
    figure.set_layout_engine("tight", rect=(0, 0.05, 1, 1))
    return figure


def draw_bars(
    axes: Axes,
    results: Sequence[CaseResult],
    class_names: Sequence[str],
    score: str,
    factor: float,
) -> None:
    """Draw the mean of a score of each organ as a bar, and each case that defines it as a mark."""
    colours = label_colours(class_names) / 255
    spread = np.linspace(-0.25, 0.25, len(results)) if len(results) > 1 else [0.0]
    marks: dict[str, list[tuple[float, float]]] = {outcome: [] for outcome in MARKS}
    for index, row in enumerate(class_means(results)):
        if row[score] is None:
            continue
        height = factor * row[score]
        axes.bar(index, height, color=colours[index + 1], alpha=0.55, width=0.7)
        axes.annotate(
            f"{height:.1f}",
            (index, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            weight="bold",
            fontsize=10 if len(class_names) <= CROWDED else 7,
            annotation_clip=False,
        )
        for result, shift in zip(results, spread, strict=True):  # a case has one shift in all bars
            value, outcome = getattr(result.scores[index], score), result.scores[index].outcome
            if value is not None:
                marks[outcome].append((index + shift, factor * value))
    for outcome, places in marks.items():  # a call for each mark would take most of the time
        if places:
            axes.scatter(*zip(*places, strict=True), clip_on=False, **MARKS[outcome])
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlim(-0.6, len(class_names) - 0.4)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_boxes(
    results: Sequence[CaseResult], class_names: Sequence[str], score: str, unit: str, factor: float
) -> Figure:
    """Draw how a score spreads over the cases: a box for each organ, a dot for each case."""
    from matplotlib.figure import Figure

    colours = label_colours(class_names) / 255
    figure = Figure(figsize=(max(4.5, 0.85 * len(class_names) + 1.6), 3.4))
    axes = figure.subplots()
    for index in range(len(class_names)):
        values = [getattr(result.scores[index], score) for result in results]
        shown = np.array([factor * value for value in values if value is not None])
        if not shown.size:
            continue
        axes.boxplot(
            shown,
            positions=[index],
            widths=0.55,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": (*colours[index + 1], 0.45), "edgecolor": "0.3"},
            medianprops={"color": "black"},
        )
        spread = np.linspace(-0.17, 0.17, shown.size) if shown.size > 1 else np.zeros(1)
        axes.scatter(index + spread, shown, s=9, color="0.15", zorder=3)
    axes.set_xticks(range(len(class_names)), class_names, rotation=30, ha="right")
    axes.set(ylabel=unit, xlim=(-0.6, len(class_names) - 0.4))
    axes.set_ylim(0, 103 if unit.endswith("%") else None)
    axes.grid(axis="y", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.set_layout_engine("tight")  # computed while drawing, as in `draw_scores`
    return figure


def draw_differences(
    rows: Sequence[dict[str, Any]], score: str, unit: str, factor: float
) -> Figure:
    """Draw the paired differences in the rows of `compare`: mean, interval and each case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 0.3 * len(rows) + 0.9))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        found = row["scores"][score]
        if found.difference is None:
            continue
        each = factor * np.array(found.each)
        axes.scatter(each, np.full(each.size, place), s=12, color="0.6", alpha=0.5, linewidths=0)
        if found.interval is not None:
            ends = factor * np.array(found.interval)
            axes.plot(ends, (place, place), color="#1f5f99", linewidth=2.5, solid_capstyle="butt")
        axes.scatter(factor * found.difference, place, s=34, color="#1f5f99", zorder=3)
    axes.axvline(0, color="0.3", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(unit)
    axes.grid(axis="x", alpha=0.3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.set_layout_engine("tight")  # computed while drawing, as in `draw_scores`
    return figure
