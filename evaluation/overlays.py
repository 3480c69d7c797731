"""Choose the slices of a case that are shown, and draw labels over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from common.files import atomic_path
from datasets.colours import label_colours

Slices = Any  # an object whose `[start:stop]` is a float array (B, H, W) or (B, 3, H, W)
SHOWN_SIDE = (300, 1024)  # smallest and largest longer side of the worst slices, pixels
MOST_RATIO = 4.0  # largest ratio of a picture's sides, so that odd voxels give no endless picture
SLICES_A_CASE = 3
WORST_A_CASE = 2
OPACITY = 0.35  # opacity of a label inside its outline; the outline is opaque
OUTLINED = 256  # outlines grow by a pixel for each 256 pixels of a picture's side


@dataclass(frozen=True)
class CasePanel:
    """The few slices of a case that a page shows; small for any size of volume."""

    case: str
    depth: int  # number of slices of the case
    slices: tuple[int, ...]  # indices of the slices shown
    truth: tuple[np.ndarray, ...]  # each (H, W, 3) uint8; the plain slice if there is no label
    prediction: tuple[np.ndarray, ...]  # each (H, W, 3) uint8
    aspect: float  # height of a voxel over its width
    sides: str | None  # sides of the patient at the left and right edge, as RL; None: unknown


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
    """Choose the slices of a case that show most, and draw their labels.

    Args:
        image: (D, H, W) or, in colour, (D, 3, H, W), about [0, 1]; indexed along D alone.
        label, prediction: (D, H, W), 0…num_classes; a label of None is unknown.
        spacing: mm along (slice, row, column); None: pixels are square.
        direction: 3 × 3 cosines of the array, row-major, to orient it as radiologists do (see
            `view`); None: keep the orientation of the array.
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
    """Return how to flip slices to the radiological view.

    In that view the patient's right or front is at the left, and front or head at the top.

    Args:
        direction: cosines of the axes x, y, z of (z, y, x) arrays, 3 × 3 row-major.

    Returns:
        The axes to flip, 0 for rows and 1 for columns, and the sides of the patient that are then
        at the left and right edge, as RL; None if the direction is unknown.
    """
    if direction is None:
        return [], None
    flips, sides = [], ""
    for axis in (0, 1):
        cosines = np.reshape(direction, (3, 3))[:, 1 - axis]
        nearest = int(np.argmax(np.abs(cosines)))
        wanted = -1 if nearest == 2 else 1  # axes run to the patient's left, back and head
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
    """Draw one slice with its labels, if there are any, in the radiological view."""
    picture = image[index : index + 1][0]
    plane = np.zeros(picture.shape[-2:], np.uint8) if labels is None else labels[index]
    return np.flip(overlay(picture, plane, label_colours(num_classes)), view(direction)[0])


def worst_slices(
    label: np.ndarray, prediction: np.ndarray, count: int = WORST_A_CASE
) -> list[tuple[int, int, int]]:  # (D, H, W) both
    """Return index, wrong voxels and foreground voxels of the worst slices, the worst first."""
    wrong = np.array([np.count_nonzero(a != b) for a, b in zip(label, prediction, strict=True)])
    order = np.argsort(-wrong, kind="stable")[:count]
    return [
        (int(i), int(wrong[i]), int(np.count_nonzero(label[i] | prediction[i])))
        for i in order
        if wrong[i]
    ]


def shown_ratio(picture: np.ndarray, aspect: float) -> float:  # (H, W, 3)
    """Return height over width of a picture with voxels in their true shape, within a limit."""
    height, width = picture.shape[:2]
    return min(max(height * aspect / width, 1 / MOST_RATIO), MOST_RATIO)


def save_row(
    pictures: Sequence[np.ndarray], aspect: float, path: Path, sides: str | None = None
) -> None:
    """Write pictures (H, W, 3) uint8 of equal size side by side, with voxels in true shape."""
    ratio = shown_ratio(pictures[0], aspect)
    width = max(pictures[0].shape[1], len(pictures[0]) / ratio)  # keeps every row and column
    longer = width * max(1.0, ratio)
    width *= min(max(longer, SHOWN_SIDE[0]), SHOWN_SIDE[1]) / longer
    size = (round(width), round(width * ratio))
    gap = 1 + size[0] // 40
    row = Image.new("RGB", (len(pictures) * (size[0] + gap) - gap, size[1]), "white")
    for index, picture in enumerate(pictures):  # BOX averages when it shrinks and repeats otherwise
        shown = Image.fromarray(picture).resize(size, Image.Resampling.BOX)
        mark_sides(shown, sides)
        row.paste(shown, (index * (size[0] + gap), 0))
    with atomic_path(path) as temporary:
        row.save(temporary)


def mark_sides(picture: Image.Image, sides: str | None) -> None:
    """Write the letters of the patient's sides at the left and right edge."""
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
    """Choose the slice with most classes in the middle of each third of the labelled slices."""
    foreground = np.count_nonzero(label, axis=(1, 2))
    filled = np.flatnonzero(foreground)
    if not filled.size:
        return (len(label) // 2,)
    thirds = np.array_split(filled, min(SLICES_A_CASE, filled.size))
    parts = [part[len(part) // 4 : len(part) - len(part) // 4] for part in thirds]
    planes = {index: label[index].ravel() for index in filled}
    classes = {  # counted over labelled voxels alone, because they are few
        index: np.count_nonzero(np.bincount(plane[np.flatnonzero(plane)]))
        for index, plane in planes.items()
    }
    return tuple(int(max(part, key=lambda i: (classes[i], foreground[i]))) for part in parts)


def overlay(image: np.ndarray, label: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Draw a slice with tinted and outlined labels; large pictures get wider outlines.

    Args:
        image: (H, W) or, in colour, (3, H, W), about [0, 1].
        label: (H, W) classes.
        colours: (classes + 1, 3) uint8.

    Returns:
        (H, W, 3) uint8.
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
