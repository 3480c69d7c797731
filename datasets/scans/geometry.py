"""Where the voxels of a scan lie in the patient, in SimpleITK's order (x, y, z)."""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import SimpleITK as sitk

SPACING_TOLERANCE = 1e-3  # relative
ORIGIN_TOLERANCE = 1e-2  # mm
DIRECTION_TOLERANCE = 1e-3  # of each cosine
SKEWED = 1e-3  # largest product of two axes of length 1 that are at right angles up to rounding


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a scan lie in the patient, in SimpleITK's order."""

    spacing: tuple[float, ...]  # (x, y, z), mm
    origin: tuple[float, ...]  # (x, y, z) of the centre of the first voxel, mm
    direction: tuple[float, ...]  # 3 × 3 cosines, row-major; the columns are the axes x, y, z
    # How far rounding in the file may have moved origin and spacing, mm. It is no part of where the
    # voxels lie, so it is neither compared nor stored.
    rounding: InitVar[tuple[float, float]] = (0.0, 0.0)

    def __post_init__(self, rounding: tuple[float, float]) -> None:
        object.__setattr__(self, "rounding", rounding)

    @classmethod
    def unknown(cls) -> Geometry:
        """Return the geometry for an array without one: 1 mm voxels along the axes."""
        return cls((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))

    @property
    def voxel_spacing(self) -> tuple[float, ...]:
        """Spacing in mm along (slice, row, column), the axes of an array."""
        return self.spacing[::-1]

    def matches(self, other: Geometry) -> bool:
        """Return whether both place voxels alike, up to the rounding of file headers."""
        return not self.differences(other)

    def differences(self, other: Geometry) -> list[str]:
        """Return what differs, e.g. `spacing (1, 1, 3) and (1, 1, 5)`."""
        origin_error, spacing_error = map(max, zip(self.rounding, other.rounding, strict=True))
        close = {
            "spacing": _all_close(
                self.spacing, other.spacing, relative=SPACING_TOLERANCE, absolute=spacing_error
            ),
            "origin": _all_close(
                self.origin, other.origin, absolute=ORIGIN_TOLERANCE + origin_error
            ),
            "direction": _all_close(self.direction, other.direction, absolute=DIRECTION_TOLERANCE),
        }
        return [
            f"{name} {_numbers(getattr(self, name))} and {_numbers(getattr(other, name))}"
            for name, same in close.items()
            if not same
        ]


def geometry_of(source: sitk.Image | sitk.ImageFileReader) -> Geometry:
    """Return the geometry of an image, or of one volume of a 4-D file.

    Some headers hold a negative spacing. It becomes a positive spacing along the opposite axis,
    because SimpleITK reads the voxels in that way.
    """
    dimension = min(source.GetDimension(), 3)  # 2 for a single slice
    spacing, origin, axes = np.ones(3), np.zeros(3), np.eye(3)
    spacing[:dimension] = source.GetSpacing()[:3]
    origin[:dimension] = source.GetOrigin()[:3]
    full = np.reshape(source.GetDirection(), (source.GetDimension(),) * 2)
    axes[:dimension, :dimension] = full[:3, :3]
    signs = np.where(spacing < 0, -1.0, 1.0)
    return Geometry(
        spacing=tuple((spacing * signs).tolist()),
        origin=tuple(origin.tolist()),
        direction=tuple((axes * signs).ravel().tolist()),
    )


def _all_close(
    first: tuple[float, ...],
    second: tuple[float, ...],
    *,
    relative: float = 0.0,
    absolute: float = 0.0,
) -> bool:
    return len(first) == len(second) and all(
        math.isclose(a, b, rel_tol=relative, abs_tol=absolute)
        for a, b in zip(first, second, strict=True)
    )


def _numbers(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:.5g}' for value in values)})"
