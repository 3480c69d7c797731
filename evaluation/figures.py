"""What a test run reports, as pictures: overlays of every case, and the worst slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from common.files import atomic_path
from datasets.colours import label_colours
from evaluation.charts import add_legend, draw_scores, render
from evaluation.tables import CaseResult, case_means

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Slices = Any  # what `[start:stop]` gives (B, H, W) or (B, 3, H, W) float arrays of
CASES_A_PAGE = 6
SHOWN_SIDE = (300, 1024)  # pixels, of the longer side of the worst slices
MOST_RATIO = 4.0  # of a picture's sides: odd voxels must not make a picture of 100,000 pixels
SLICES_A_CASE = 3
WORST_A_CASE = 2
OPACITY = 0.35  # of a label's colour over the image; its outline is opaque
SHADE = {"facecolor": "black", "alpha": 0.4, "pad": 1, "linewidth": 0}  # behind a letter
OUTLINED = 256  # pixels of a picture for each pixel of an outline


@dataclass(frozen=True)
class CasePanel:
    """The few slices of a case that are shown; small, whatever the size of the volume."""

    case: str
    depth: int  # slices of the case
    slices: tuple[int, ...]
    truth: tuple[np.ndarray, ...]  # each (H, W, 3) uint8; without labels the plain slice
    prediction: tuple[np.ndarray, ...]
    aspect: float  # height of a voxel over its width
    sides: str | None  # what of the patient is at the left and right, as RL; None: not known


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
        direction: the array's 3 × 3 cosines, row-major, to show it as radiologists do; None: as
            the array lies. See `view`.
    """
    chosen = choose_slices(label if label is not None and label.any() else prediction)

    def pictures(labels: np.ndarray | None) -> tuple[np.ndarray, ...]:
        return tuple(shown_slice(image, labels, index, num_classes, direction) for index in chosen)

    return CasePanel(
        case=case,
        depth=len(prediction),
        slices=chosen,
        truth=pictures(label),
        prediction=pictures(prediction),
        aspect=1.0 if spacing is None else spacing[1] / spacing[2],
        sides=view(direction)[1],
    )


def view(direction: Sequence[float] | None) -> tuple[list[int], str | None]:
    """How a radiologist looks at slices: right or front at the left, front or head at the top.

    Args:
        direction: cosines of the axes x, y, z of (z, y, x) arrays, 3 × 3 row-major.

    Returns:
        Which of the axes (row, column) to flip, and what is then at the left and right, as RL.
    """
    if direction is None:
        return [], None
    flips, sides = [], ""
    for axis in (0, 1):
        cosines = np.reshape(direction, (3, 3))[:, 1 - axis]
        nearest = int(np.argmax(np.abs(cosines)))
        wanted = -1 if nearest == 2 else 1  # the patient's axes run left, backwards and up
        if cosines[nearest] * wanted < 0:
            flips.append(axis)
        sides = ("RL", "AP", "SI")[nearest]
    return flips, sides


def shown_slice(
    image: Slices,
    labels: np.ndarray | None,
    index: int,
    num_classes: int,
    direction: Sequence[float] | None,
) -> np.ndarray:  # (H, W, 3) uint8
    """One slice with its labels, if any, the way round that `view` says."""
    picture = image[index : index + 1][0]
    plane = np.zeros(picture.shape[-2:], np.uint8) if labels is None else labels[index]
    return np.flip(overlay(picture, plane, label_colours(num_classes)), view(direction)[0])


def worst_slices(
    label: np.ndarray, prediction: np.ndarray, count: int = WORST_A_CASE
) -> list[tuple[int, int, int]]:  # (D, H, W) both
    """Index, wrong and foreground voxels of the slices with most wrong voxels, the worst first."""
    wrong = np.array([np.count_nonzero(a != b) for a, b in zip(label, prediction, strict=True)])
    order = np.argsort(-wrong, kind="stable")[:count]
    return [
        (int(i), int(wrong[i]), int(np.count_nonzero(label[i] | prediction[i])))
        for i in order
        if wrong[i]
    ]


def shown_ratio(picture: np.ndarray, aspect: float) -> float:  # (H, W, 3)
    """Height over width of a picture in the shape that its voxels have, but for odd ones."""
    height, width = picture.shape[:2]
    return min(max(height * aspect / width, 1 / MOST_RATIO), MOST_RATIO)


def save_row(
    pictures: Sequence[np.ndarray], aspect: float, path: Path, sides: str | None = None
) -> None:
    """Write pictures (H, W, 3) uint8 of one size side by side, in the shape their voxels have."""
    ratio = shown_ratio(pictures[0], aspect)
    width = max(pictures[0].shape[1], len(pictures[0]) / ratio)  # no row or column is lost
    longer = width * max(1.0, ratio)
    width *= min(max(longer, SHOWN_SIDE[0]), SHOWN_SIDE[1]) / longer
    size = (round(width), round(width * ratio))
    gap = 1 + size[0] // 40
    row = Image.new("RGB", (len(pictures) * (size[0] + gap) - gap, size[1]), "white")
    for index, picture in enumerate(pictures):  # BOX: as NEAREST where it grows
        shown = Image.fromarray(picture).resize(size, Image.Resampling.BOX)
        mark_sides(shown, sides)
        row.paste(shown, (index * (size[0] + gap), 0))
    with atomic_path(path) as temporary:
        row.save(temporary)


def mark_sides(picture: Image.Image, sides: str | None) -> None:
    """Write at the left and right edge what of the patient lies there."""
    width, height = picture.size
    font = ImageFont.load_default(max(14, min(width, height) // 16))
    for letter, at, anchor in zip(sides or "", (0.02, 0.98), "lr", strict=False):
        ImageDraw.Draw(picture).text(
            (at * width, height / 2),
            letter,
            font=font,
            anchor=f"{anchor}m",
            fill="white",
            stroke_width=2,
            stroke_fill="black",
        )


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
    """A slice with its labels tinted and outlined, wider in large pictures: (H, W, 3) uint8.

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
    width = max(label.shape) // OUTLINED
    if width > 1:
        inside = binary_erosion(inside, iterations=width - 1, border_value=1)
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
    heights = [shown_ratio(panel.truth[0], panel.aspect) for panel in panels]
    width = side * columns
    entries = max(1, min(len(class_names), int(width / name_width)))  # in a row of the legend
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
    """The slices of one case in a row of axes, its name and caption above them."""
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
    """Write a picture, whole or not at all."""
    with atomic_path(path) as temporary:
        render(figure, temporary, dpi=110)
