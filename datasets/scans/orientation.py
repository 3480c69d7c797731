"""Turning volumes to one orientation and back, by exchanging and flipping whole axes.

No voxel is resampled, so nothing shifts: a label that is turned back lies where its scan lay. An
orientation is three letters, what the axes x, y and z run towards: L(eft), R(ight), A(nterior),
P(osterior), I(nferior), S(uperior). LPS is a slice as radiologists see it, the front at the top.
"""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from datasets.scans.volumes import Geometry

CANONICAL = "LPS"
OPPOSITE = dict(zip("LRPASI", "RLAPIS", strict=True))


def orientation_of(geometry: Geometry) -> str:
    """The letters that the axes of an oblique scan are nearest to."""
    return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(geometry.direction)


def turned(array: np.ndarray, before: str, after: str) -> np.ndarray:
    """A view of (D, H, W) whose axes run as `after` says; (D, H, W) are the axes z, y, x."""
    order, flipped = _moves(before, after)
    array = array.transpose([2 - source for source in order[::-1]])
    return np.flip(array, [2 - axis for axis in flipped])


def turned_geometry(geometry: Geometry, shape: tuple[int, ...], after: str) -> Geometry:
    """Where the voxels lie of an array of `shape` (D, H, W) after `turned`, to rounding."""
    order, flipped = _moves(orientation_of(geometry), after)
    axes = np.array(geometry.direction).reshape(3, 3).T[order]  # rows are the axes x, y, z
    spacing = np.array(geometry.spacing)[order]
    size = np.array(shape[::-1])[order]
    origin = np.array(geometry.origin)
    for axis in flipped:  # the first voxel is now what was the last one along that axis
        origin = origin + axes[axis] * spacing[axis] * (size[axis] - 1)
        axes[axis] *= -1
    return Geometry(tuple(spacing.tolist()), tuple(origin.tolist()), tuple(axes.T.ravel().tolist()))


def _moves(before: str, after: str) -> tuple[list[int], list[int]]:
    """For each axis x, y, z afterwards, the one it was before; and which of them are flipped."""
    order = [
        next(i for i, letter in enumerate(before) if wanted in (letter, OPPOSITE[letter]))
        for wanted in after
    ]
    return order, [axis for axis, i in enumerate(order) if before[i] != after[axis]]
