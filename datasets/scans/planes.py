"""Planes in which scans are taken and cut into slices.

A scan that is taken slice by slice has fine pixels and thick slices. A network of 2-D slices needs
them: slices across another axis have oblong pixels, and few of them on one side.
"""

from __future__ import annotations

from datasets.scans.geometry import Geometry
from datasets.scans.orientation import CANONICAL, orientation_of

# A scan is taken along an axis with this many times the spacing of every other axis. Below it, as
# in 3-D MR of 1 × 1 × 1.2 mm, the pixels of slices across any axis are nearly square.
THICK = 1.5
OBLONG = 2.0  # A larger ratio of pixel sides shows a wrong plane if two axes are alike and thick.
# Orientations whose slices radiologists see as usual: the patient's right or front at the left, the
# front or head at the top.
PLANES = {"axial": CANONICAL, "coronal": "LIP", "sagittal": "PIR"}


def plane_across(letter: str) -> str:
    """Return the plane of the slices across an axis that runs in the direction of the letter."""
    across = {orientation[2]: plane for plane, orientation in PLANES.items()}
    return across.get(letter) or across[{"I": "S", "L": "R", "A": "P"}[letter]]


def slice_axis(shape: tuple[int, ...], geometry: Geometry) -> int | None:
    """Return the axis across which a scan was taken slice by slice: 0 for x, 1 for y, 2 for z.

    Args:
        shape: (D, H, W), the sizes along z, y and x.

    Returns:
        None if the scan has no such axis. The only axis with a single voxel is one, whatever its
        spacing.
    """
    single = [axis for axis, size in enumerate(shape[::-1]) if size == 1]
    if single:
        return single[0] if len(single) == 1 else None
    *_, second, thickest = sorted(geometry.spacing)
    return geometry.spacing.index(thickest) if thickest >= THICK * second else None


def taken_plane(shape: tuple[int, ...], geometry: Geometry) -> str | None:
    """Return the plane in which a scan was taken, as a key of `PLANES`; None: in no plane."""
    axis = slice_axis(shape, geometry)
    return None if axis is None else plane_across(orientation_of(geometry)[axis])


def is_cut_across(shape: tuple[int, ...], geometry: Geometry) -> bool:
    """Return whether the slices across z lie in another plane than the one the scan was taken in.

    A scan of no plane counts too if the sides of its pixels differ by more than `OBLONG`.
    """
    axis = slice_axis(shape, geometry)
    _, *pixel = geometry.voxel_spacing
    return axis in (0, 1) or (axis is None and max(pixel) > OBLONG * min(pixel))
