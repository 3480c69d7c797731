"""Draw the pages of pictures of a test run: scores of each organ, overlays of each case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.files import atomic_path
from datasets.colours import label_colours
from evaluation.charts import add_legend, draw_scores, render
from evaluation.overlays import CasePanel, shown_ratio
from evaluation.tables import CaseResult, case_means

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CASES_A_PAGE = 6
SHADE = {"facecolor": "black", "alpha": 0.4, "pad": 1, "linewidth": 0}  # background of a letter


def write_pages(
    folder: Path,
    panels: Sequence[CasePanel],
    results: Sequence[CaseResult],
    class_names: Sequence[str],
) -> list[Path]:
    """Write `dsc_per_organ.png` and `overlays.png`, or `overlays_1.png` … for many cases."""
    pages = [folder / "dsc_per_organ.png"]
    save(draw_scores(results, class_names), pages[0])
    means = [row["dsc"] for row in case_means(results)]
    captions = ["no organ" if dsc is None else f"mean DSC {100 * dsc:.1f} %" for dsc in means]
    starts = range(0, len(panels), CASES_A_PAGE)
    for number, start in enumerate(starts, start=1):
        shown = slice(start, start + CASES_A_PAGE)
        name = "overlays.png" if len(starts) == 1 else f"overlays_{number}.png"
        save(draw_overlays(panels[shown], captions[shown], class_names), folder / name)
        pages.append(folder / name)
    return pages


def draw_overlays(
    panels: Sequence[CasePanel],
    captions: Sequence[str],
    class_names: Sequence[str],
    kinds: tuple[str, str] = ("truth", "prediction"),
) -> Figure:
    """Draw one row for each case: two pictures of each slice side by side, a caption above."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = 2 * max(len(panel.slices) for panel in panels)
    side, heading, name_width = 2.6, 0.6, 0.65 + 0.09 * max(map(len, class_names))  # inches
    heights = [shown_ratio(panel.truth[0], panel.aspect) for panel in panels]
    width = side * columns
    entries = max(1, min(len(class_names), int(width / name_width)))  # per row of the legend
    below = 0.25 * -(-len(class_names) // entries) + 0.25
    height = side * sum(heights) + heading * len(panels) + below
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(
        len(panels), columns, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    figure.subplots_adjust(
        left=0.05 / width,
        right=1 - 0.05 / width,
        bottom=below / height,
        top=1 - heading / height,
        wspace=0.04,
        hspace=heading / (side * np.mean(heights)),
    )
    for row, panel, caption in zip(grid, panels, captions, strict=True):
        draw_case(row, panel, caption, kinds)
    colours = label_colours(len(class_names)) / 255
    add_legend(figure, [Patch(color=colour) for colour in colours[1:]], class_names, entries)
    return figure


def draw_case(row: Sequence[Axes], panel: CasePanel, caption: str, kinds: tuple[str, str]) -> None:
    """Draw the slices of one case in a row of axes, with its name and caption above them."""
    for axes in row:
        axes.axis("off")
    ratio = shown_ratio(panel.truth[0], panel.aspect)
    for index, number in enumerate(panel.slices):
        slice_name = f"slice {number}, " if panel.depth > 1 else ""
        for offset, (name, pictures) in enumerate(
            zip(kinds, (panel.truth, panel.prediction), strict=True)
        ):
            axes = row[2 * index + offset]
            height, width = pictures[index].shape[:2]
            axes.imshow(pictures[index], aspect=ratio * width / height, interpolation="nearest")
            axes.set_title(f"{slice_name}{name}", fontsize=9, color="0.3", pad=3)
            for letter, at, side in zip(
                panel.sides or "", (0.02, 0.98), ("left", "right"), strict=False
            ):
                axes.text(
                    at,
                    0.5,
                    letter,
                    transform=axes.transAxes,
                    ha=side,
                    va="center",
                    color="white",
                    fontsize=8,
                    bbox=SHADE,
                )
    row[0].annotate(
        f"{panel.case}   {caption}",
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 19),
        textcoords="offset points",
        weight="bold",
        fontsize=11,
        annotation_clip=False,
    )


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a file that is complete or absent."""
    with atomic_path(path) as temporary:
        render(figure, temporary, dpi=110)
