"""Turning of volumes to another orientation and back, by swapping and flipping whole axes.

No voxel is resampled and nothing shifts, so a label that is turned back lies where its scan lies.
An orientation is three letters, the directions of the axes x, y and z: L(eft), R(ight),
A(nterior), P(osterior), I(nferior), S(uperior). LPS shows slices as radiologists see them, with the
front at the top.
"""

from __future__ import annotations

import numpy as np

from datasets.scans.geometry import Geometry

CANONICAL = "LPS"
TOWARDS = ("LR", "PA", "SI")  # of each coordinate of the patient: where it grows, and falls
OPPOSITE = {"L": "R", "R": "L", "P": "A", "A": "P", "S": "I", "I": "S"}


def orientation_of(geometry: Geometry) -> str:
    """Return the orientation of a scan; for an oblique scan, the nearest orientation."""
    axes = np.array(geometry.direction).reshape(3, 3)  # the columns are the axes x, y, z
    free, letters = np.abs(axes), ["", "", ""]
    for _ in letters:  # the largest cosine first; of equal ones the last, as SimpleITK has it
        row, column = divmod(8 - int(free.ravel()[::-1].argmax()), 3)
        letters[column] = TOWARDS[row][int(axes[row, column] <= 0)]
        free[row], free[:, column] = -1, -1
    return "".join(letters)


def reorient(array: np.ndarray, before: str, after: str) -> np.ndarray:
    """Return a view of (D, H, W) with the orientation `after`; D, H, W are the axes z, y, x."""
    order, flipped = _moves(before, after)
    array = array.transpose([2 - source for source in order[::-1]])
    return np.flip(array, [2 - axis for axis in flipped])


def reorient_geometry(geometry: Geometry, shape: tuple[int, ...], after: str) -> Geometry:
    """Return the geometry, up to rounding, of an array of `shape` (D, H, W) after `reorient`."""
    order, flipped = _moves(orientation_of(geometry), after)
    axes = np.array(geometry.direction).reshape(3, 3).T[order]  # rows are the axes x, y, z
    spacing = np.array(geometry.spacing)[order]
    size = np.array(shape[::-1])[order]
    origin = np.array(geometry.origin)
    for axis in flipped:  # the first voxel was the last voxel along this axis
        origin = origin + axes[axis] * spacing[axis] * (size[axis] - 1)
        axes[axis] *= -1
    return Geometry(
        spacing=tuple(spacing.tolist()),
        origin=tuple(origin.tolist()),
        direction=tuple(axes.T.ravel().tolist()),
    )


def _moves(before: str, after: str) -> tuple[list[int], list[int]]:
    """Return the old axis for each new axis x, y, z, and the new axes that are flipped."""
    order = [
        next(i for i, letter in enumerate(before) if wanted in (letter, OPPOSITE[letter]))
        for wanted in after
    ]
    return order, [axis for axis, i in enumerate(order) if before[i] != after[axis]]
