"""What a test run reports, as pictures: overlays of every case, and DSC and HD95 per organ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from datasets.registry import label_colours
from metrics import BOTH, FALSE_ORGAN, MISSED
from report.tables import CaseResult, case_means, class_means, total_means
from safe_io import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Slices = Any  # what `[start:stop]` gives (B, H, W) or (B, 3, H, W) float arrays of
CASES_A_PAGE = 6
SHOWN_HEIGHT = 300  # pixels, of the worst slices at least
SLICES_A_CASE = 3
OPACITY = 0.35  # of a label's colour over the image; its outline is opaque
MARKS = {  # of a case among the scores of an organ, by its outcome
    BOTH: {"s": 18, "color": "0.15", "alpha": 0.7, "marker": "o", "zorder": 3},
    MISSED: {"s": 46, "color": "crimson", "marker": "x", "linewidths": 2, "zorder": 4},
    FALSE_ORGAN: {"s": 46, "color": "black", "marker": "^", "zorder": 4},
}


@dataclass(frozen=True)
class CasePanel:
    """The few slices of a case that are shown; small, whatever the size of the volume."""

    case: str
    slices: tuple[int, ...]
    truth: tuple[np.ndarray, ...]  # each (H, W, 3) uint8; without labels the plain slice
    prediction: tuple[np.ndarray, ...]
    aspect: float  # height of a voxel over its width


def case_panel(
    case: str,
    image: Slices,
    label: np.ndarray | None,
    prediction: np.ndarray,
    num_classes: int,
    *,
    spacing: Sequence[float] | None = None,
    direction: Sequence[float] | None = None,
) -> CasePanel:
    """Keep the slices of one case that show most.

    Args:
        image: (D, H, W) or, in colour, (D, 3, H, W), about [0, 1]; sliced along D alone.
        label, prediction: (D, H, W), 0…num_classes; a label of None is not known.
        spacing: mm along (slice, row, column), for the shape of a voxel; None: square.
        direction: the array's 3 × 3 cosines, row-major, to show it as radiologists do: the
            patient's front at the top, right at the left; None: as the array lies.
    """
    chosen = choose_slices(label if label is not None and label.any() else prediction)
    return CasePanel(
        case,
        chosen,
        *(
            tuple(shown_slice(image, labels, index, num_classes, direction) for index in chosen)
            for labels in (label, prediction)
        ),
        1.0 if spacing is None else spacing[1] / spacing[2],
    )


def shown_slice(
    image: Slices,
    labels: np.ndarray | None,
    index: int,
    num_classes: int,
    direction: Sequence[float] | None,
) -> np.ndarray:  # (H, W, 3) uint8
    """One slice with its labels, if any, the way round that `case_panel` says."""
    picture = image[index : index + 1][0]
    plane = np.zeros(picture.shape[-2:], np.uint8) if labels is None else labels[index]
    shown = overlay(picture, plane, label_colours(num_classes))
    if direction is not None:  # an axis that runs against x (to the left) or y (backwards)
        flips = [axis for axis, cosine in ((0, direction[4]), (1, direction[0])) if cosine < 0]
        shown = np.flip(shown, flips)
    return shown


def worst_slices(
    label: np.ndarray, prediction: np.ndarray, count: int = 2
) -> list[tuple[int, int, int]]:  # (D, H, W) both
    """Index, wrong and foreground voxels of the slices with most wrong voxels, the worst first."""
    wrong = np.array([np.count_nonzero(a != b) for a, b in zip(label, prediction, strict=True)])
    order = np.argsort(-wrong, kind="stable")[:count]
    return [
        (int(i), int(wrong[i]), int(np.count_nonzero(label[i] | prediction[i])))
        for i in order
        if wrong[i]
    ]


def save_pair(truth: np.ndarray, prediction: np.ndarray, aspect: float, path: Path) -> None:
    """Write two pictures (H, W, 3) uint8 side by side, in the shape that their voxels have."""
    gap = np.full((len(truth), max(1, truth.shape[1] // 40), 3), 255, np.uint8)
    both = np.hstack([truth, gap, prediction])
    scale = max(1.0, SHOWN_HEIGHT / (len(truth) * aspect))
    size = (round(both.shape[1] * scale), max(1, round(len(truth) * aspect * scale)))
    with atomic_path(path) as temporary:
        Image.fromarray(both).resize(size, Image.Resampling.NEAREST).save(temporary)


def choose_slices(label: np.ndarray) -> tuple[int, ...]:  # (D, H, W) -> ascending indices
    """From the middle of each third of the labelled slices, the one with most classes."""
    foreground = np.count_nonzero(label, axis=(1, 2))
    filled = np.flatnonzero(foreground)
    if not filled.size:
        return (len(label) // 2,)
    thirds = np.array_split(filled, min(SLICES_A_CASE, filled.size))
    parts = [part[len(part) // 4 : len(part) - len(part) // 4] for part in thirds]
    planes = {index: label[index].ravel() for index in filled}
    classes = {  # of the labelled voxels alone, the fewest by far
        index: np.count_nonzero(np.bincount(plane[np.flatnonzero(plane)]))
        for index, plane in planes.items()
    }
    return tuple(int(max(part, key=lambda i: (classes[i], foreground[i]))) for part in parts)


def overlay(image: np.ndarray, label: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A slice with its labels tinted and outlined: (H, W, 3) uint8.

    Args:
        image: (H, W) or, in colour, (3, H, W), about [0, 1].
    """
    colour = image if image.ndim == 3 else np.broadcast_to(image, (3, *image.shape))
    plain = colour.clip(0, 1).transpose(1, 2, 0) * 255
    tint = colours[label].astype(np.float64)
    padded = np.pad(label, 1, mode="edge")
    inside = np.ones(label.shape, dtype=bool)
    for rows, columns in ((0, 1), (2, 1), (1, 0), (1, 2)):
        neighbour = padded[rows : rows + label.shape[0], columns : columns + label.shape[1]]
        inside &= neighbour == label
    strength = np.where(label > 0, np.where(inside, OPACITY, 1.0), 0.0)[..., None]
    return ((1 - strength) * plain + strength * tint).round().astype(np.uint8)


def write_pages(
    folder: Path,
    panels: Sequence[CasePanel],
    results: Sequence[CaseResult],
    class_names: Sequence[str],
) -> list[Path]:
    """Write `dsc_per_organ.png` and `overlays.png`, or `overlays_1.png` … of many cases."""
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
    """One row a case: its slices, two pictures of each side by side, and a caption above."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = 2 * max(len(panel.slices) for panel in panels)
    side, heading, name_width = 2.6, 0.6, 0.65 + 0.09 * max(map(len, class_names))  # inches
    heights = [p.truth[0].shape[0] * p.aspect / p.truth[0].shape[1] for p in panels]
    width = side * columns
    entries = max(1, min(len(class_names), int(width / name_width)))  # in a row of the legend
    below = 0.25 * -(-len(class_names) // entries) + 0.25
    height = side * sum(heights) + heading * len(panels) + below
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(
        *(len(panels), columns), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    figure.subplots_adjust(
        **{"left": 0.05 / width, "right": 1 - 0.05 / width, "wspace": 0.04},
        **{"bottom": below / height, "top": 1 - heading / height},
        hspace=heading / (side * np.mean(heights)),
    )
    for row, panel, caption in zip(grid, panels, captions, strict=True):
        draw_case(row, panel, caption, kinds)
    colours = label_colours(len(class_names)) / 255
    patches = [Patch(color=colours[i], label=n) for i, n in enumerate(class_names, start=1)]
    figure.legend(handles=patches, ncols=entries, loc="lower center", frameon=False)
    return figure


def draw_case(row: Sequence[Axes], panel: CasePanel, caption: str, kinds: tuple[str, str]) -> None:
    """The slices of one case in a row of axes, its name and caption above them."""
    for axes in row:
        axes.axis("off")
    for index, number in enumerate(panel.slices):
        for offset, (name, pictures) in enumerate(
            zip(kinds, (panel.truth, panel.prediction), strict=True)
        ):
            axes = row[2 * index + offset]
            axes.imshow(pictures[index], aspect=panel.aspect, interpolation="nearest")
            axes.set_title(f"slice {number}, {name}", fontsize=9, color="0.3", pad=3)
    row[0].annotate(
        *(f"{panel.case}   {caption}", (0, 1)),
        **{"xycoords": "axes fraction", "xytext": (0, 19), "textcoords": "offset points"},
        **{"weight": "bold", "fontsize": 11, "annotation_clip": False},
    )


def draw_scores(results: Sequence[CaseResult], class_names: Sequence[str]) -> Figure:
    """DSC and HD95 of every organ: a bar for the mean, a mark for each case."""
    from matplotlib.figure import Figure

    crowded = len(class_names) > 10
    figure = Figure(figsize=(min(14.0, max(8.0, 1.2 * len(class_names) + 3.4)), 7.2))
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 2)})
    total = total_means(results)
    in_mm = total["hd95_mm"] is not None
    draw_bars(upper, results, "dsc", 100)
    upper.set(ylabel="DSC %", ylim=(0, 102))
    draw_bars(lower, results, "hd95_mm" if in_mm else "hd95_voxels", 1)
    lower.set(ylabel=f"HD95 {'mm' if in_mm else 'voxels'}", ylim=(0, None))
    mean_dsc = "-" if total["dsc"] is None else f"{100 * total['dsc']:.2f} %"
    cases = "1 case" if len(results) == 1 else f"{len(results)} cases"
    title = f"{cases}, mean DSC {mean_dsc} (a false or missed organ scores 0)"
    upper.set_title(title, loc="left", pad=24)
    shown = [upper.scatter([], [], label=name, **style) for name, style in MARKS.items()]
    figure.legend(handles=shown, loc="lower center", ncols=len(shown), frameon=False)
    lower.set_xticks(
        range(len(class_names)),
        class_names if crowded else [name.replace(" ", "\n") for name in class_names],
        **({"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}),
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def draw_bars(axes: Axes, results: Sequence[CaseResult], score: str, factor: float) -> None:
    """The mean of a score per organ as a bar, with every case that defines it as a mark."""
    colours = label_colours(len(results[0].scores)) / 255
    spread = np.linspace(-0.25, 0.25, len(results)) if len(results) > 1 else [0.0]
    for index, row in enumerate(class_means(results)):
        if row[score] is None:
            continue
        height = factor * row[score]
        axes.bar(index, height, color=colours[index + 1], alpha=0.55, width=0.7)
        axes.annotate(
            f"{height:.1f}",
            (index, 1),
            **{"xycoords": ("data", "axes fraction"), "ha": "center", "weight": "bold"},
            **{"xytext": (0, 4), "textcoords": "offset points", "annotation_clip": False},
        )
        for result, shift in zip(results, spread, strict=True):  # a case keeps its place
            value, outcome = getattr(result.scores[index], score), result.scores[index].outcome
            if value is not None:
                axes.scatter(index + shift, factor * value, clip_on=False, **MARKS[outcome])
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlim(-0.6, len(results[0].scores) - 0.4)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_boxes(
    results: Sequence[CaseResult], class_names: Sequence[str], score: str, unit: str, factor: float
) -> Figure:
    """How a score spreads over the cases, a box an organ, with every case as a dot."""
    from matplotlib.figure import Figure

    colours = label_colours(len(class_names)) / 255
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
    figure.tight_layout()
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a picture, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
