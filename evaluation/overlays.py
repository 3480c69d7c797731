"""Choose the slices of a case that are shown, and draw labels, letters and a scale over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import binary_erosion

from datasets.colours import label_colours
from datasets.scans.geometry import Geometry
from evaluation.tables import WorstSlice
from evaluation.views import View, slice_place, view_of

Slices = Any  # an object whose `[start:stop]` is a float array (B, H, W) or (B, 3, H, W)
SLICES_A_CASE = 3
WORST_A_CASE = 2
APART = 0.1  # of a case's slices lie between two of its worst slices, or more
OPACITY = 0.35  # opacity of a label inside its outline; the outline is opaque
OUTLINED = 256  # outlines grow by a pixel for each 256 pixels of a picture's side


@dataclass(frozen=True)
class CasePanel:
    """The few slices of a case that a page shows; small for any size of volume."""

    case: str
    depth: int  # number of slices of the case
    slices: tuple[int, ...]  # indices of the slices shown
    places: tuple[str | None, ...]  # where each slice lies in the patient, as `S 120.0 mm`
    truth: tuple[np.ndarray, ...]  # each (H, W, 3) uint8; the plain slice if there is no label
    prediction: tuple[np.ndarray, ...]  # each (H, W, 3) uint8
    view: View
    window: str | None  # the values that are black and white; None: unknown


def case_panel(
    case: str,
    image: Slices,
    label: np.ndarray | None,
    prediction: np.ndarray,
    class_names: Sequence[str],
    *,
    geometry: Geometry | None = None,
    window: str | None = None,
) -> CasePanel:
    """Choose the slices of a case that show most, and draw their labels.

    Args:
        image: (D, H, W) or, in colour, (D, 3, H, W), about [0, 1]; indexed along D alone.
        label, prediction: (D, H, W), 0…classes; a label of None is unknown.
        geometry: of these arrays; None: unknown, so pixels are square and keep their orientation.
        window: the values that are black and white (see `window_text`).
    """
    chosen = choose_slices(label if label is not None and label.any() else prediction)
    shown, colours = view_of(geometry), label_colours(class_names)

    def pictures(labels: np.ndarray | None) -> tuple[np.ndarray, ...]:
        return tuple(shown_slice(image, labels, index, colours, shown) for index in chosen)

    return CasePanel(
        case=case,
        depth=len(prediction),
        slices=chosen,
        places=tuple(slice_place(geometry, index) for index in chosen),
        truth=pictures(label),
        prediction=pictures(prediction),
        view=shown,
        window=window,
    )


def shown_slice(
    image: Slices, labels: np.ndarray | None, index: int, colours: np.ndarray, view: View
) -> np.ndarray:  # (H, W, 3) uint8
    """Draw one slice with its labels, if there are any, in the radiological view."""
    picture = image[index : index + 1][0]
    plane = np.zeros(picture.shape[-2:], np.uint8) if labels is None else labels[index]
    return np.flip(overlay(picture, plane, colours), view.flips)


def worst_slices(
    case: str,
    label: np.ndarray,
    prediction: np.ndarray,
    class_names: Sequence[str],
    geometry: Geometry | None = None,
) -> list[WorstSlice]:  # (D, H, W) both
    """Return the slices with the largest error of an organ, the worst first, none side by side.

    The error is the number of the organ's wrong voxels over its size in the slice, or over its
    mean size if that is larger, so that neither large organs nor the tips of organs come first.
    Sizes are the voxels of both masks together, so the error of a lost organ is 1.
    """
    sizes, wrong, different, foreground = slice_counts(label, prediction, len(class_names))
    mean = sizes.sum(axis=0) / np.maximum(1, np.count_nonzero(sizes, axis=0))
    errors = wrong / np.maximum(1, np.maximum(sizes, mean))
    gap = max(1, APART * len(label))
    chosen: list[int] = []
    for index in np.argsort(-errors.max(axis=1), kind="stable").tolist():
        if different[index] and all(abs(index - other) > gap for other in chosen):
            chosen.append(index)
    return [
        WorstSlice(
            index=index,
            wrong=int(different[index]),
            foreground=int(foreground[index]),
            picture=f"slices/{case}_{index:03d}.png",
            organ=class_names[organ],
            organ_wrong=int(wrong[index, organ]),
            error=float(errors[index, organ]),
            place=slice_place(geometry, index),
        )
        for index in chosen[:WORST_A_CASE]
        for organ in [int(errors[index].argmax())]
    ]


def slice_counts(
    label: np.ndarray, prediction: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Count voxels of each slice of two masks (D, H, W).

    Returns:
        For each class (D, classes): its voxels in both masks together, and those in only one of
        them. For each slice (D,): voxels that differ, and voxels of any organ.
    """
    rows = []
    for real, found in zip(label, prediction, strict=True):
        inside = np.flatnonzero(real | found)  # few
        real, found = real.ravel()[inside], found.ravel()[inside]
        agree = real == found
        in_real, in_found, in_both = (
            np.bincount(part, minlength=num_classes + 1)[1:] for part in (real, found, real[agree])
        )
        size = in_real + in_found
        rows.append((size, size - 2 * in_both, np.count_nonzero(~agree), len(inside)))
    sizes, wrong, different, foreground = map(np.array, zip(*rows, strict=True))
    return sizes, wrong, different, foreground


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
