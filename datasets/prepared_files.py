"""Reading and checking of prepared slices and volumes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError, first_few, first_line, warn
from datasets.h5_files import numbers, opened, read_attribute
from datasets.registry import is_orientation
from datasets.scans.geometry import SKEWED

# Prepared images lie in [0, 1]; cubic zoom overshoots by a few tenths at sharp edges.
PLAUSIBLE_RANGE = (-1.0, 2.0)
# Attributes of a test volume in SimpleITK's order, and how many numbers each has.
GEOMETRY = {"spacing": 3, "origin": 3, "direction": 9}
SIZES = (1e-6, 1e6)  # smallest and largest side of a voxel, mm
FARTHEST = 1e9  # of an origin from that of the scanner, mm


@dataclass(frozen=True)
class SampleFacts:
    """Facts about one slice or volume."""

    name: str
    shape: tuple[int, ...]  # of the label
    colour: bool
    low: float  # smallest intensity, about 0
    high: float  # largest intensity, about 1
    voxels: tuple[int, ...]  # of each class, background first
    digest: str  # of the image: equal images have equal digests
    slice_digests: tuple[str, ...] = ()  # of each slice; empty texts for constant slices
    label_digest: str = ""


def check_declared(image: Any, label: Any, path: Path, *, ndim: int) -> None:
    """Check the shapes and types of a slice or volume, before its values are read.

    Args:
        image, label: arrays, or what declares them by `shape` and `dtype`.
        ndim: number of axes of the label.

    Raises:
        InputError: the shapes do not belong together, or the values are no numbers.
    """
    colour = (*label.shape[:-2], 3, *label.shape[-2:])
    if (
        image.shape not in (label.shape, colour)
        or len(label.shape) != ndim
        or not math.prod(label.shape)
    ):
        raise InputError(
            f"{path} holds an image {image.shape} and a label {label.shape}, expected the same "
            f"non-empty {ndim}-D shape; run preprocess again"
        )
    for name, array in (("image", image), ("label", label)):
        if array.dtype.kind not in "fiub":
            raise InputError(
                f"{path} holds {name} values of type {array.dtype}, expected numbers; run "
                "preprocess again"
            )


def check_sample(
    image: np.ndarray,
    label: np.ndarray,
    path: Path,
    *,
    num_classes: int | None,
    any_range: bool = False,
) -> tuple[np.ndarray, np.ndarray]:  # float32 (…, H, W) or (…, 3, H, W), uint8 (…, H, W)
    """Check a slice or volume, and return it in the dtypes for training.

    Args:
        num_classes: the largest label that is allowed; None: 255.
        any_range: warn of intensities far outside [0, 1] instead of refusing them.

    Raises:
        InputError: labels outside 0…num_classes, NaN, or intensities far outside [0, 1].
    """
    low, high = float(image.min()), float(image.max())  # NaN propagates to both
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{path} holds NaN or infinite intensities; run preprocess again")
    if low < PLAUSIBLE_RANGE[0] or high > PLAUSIBLE_RANGE[1]:
        if not any_range:
            raise InputError(
                f"{path} holds intensities from {low:g} to {high:g}, which look like raw HU or "
                "grey values, expected [0, 1]; run preprocess on the raw scans"
            )
        _warn_of_range(path.parent)
    largest = 255 if num_classes is None else num_classes
    with np.errstate(invalid="ignore"):  # NaN becomes some number, and differs from it
        classes = label.astype(np.uint8)
    if (classes != label).any() or classes.max() > largest:
        values = np.unique(label)
        wrong = [f"{v:g}" for v in values if not (0 <= v <= largest and v == int(v))]
        raise InputError(
            f"{path} holds label values {first_few(wrong)}, expected 0…{largest}; pass the "
            "right --num_classes, or map the labels with preprocess"
        )
    return np.ascontiguousarray(image, dtype=np.float32), classes


@cache
def _warn_of_range(folder: Path) -> None:
    """Warn once for each folder."""
    warn(f"{folder} holds intensities far outside [0, 1], the range of the published data")


def check_attributes(path: Path) -> None:
    """Raise an `InputError` if what a volume stores beside its arrays is wrong."""
    read_geometry(path)
    read_orientation(path)
    size_is_stated(path)


def read_geometry(path: Path) -> dict[str, tuple[float, ...]] | None:
    """Read spacing, origin and direction of a volume's scan, in SimpleITK's order.

    Returns:
        None if the file does not store them.

    Raises:
        InputError: the stored values are not a geometry.
    """
    with opened(path) as file:
        if not all(name in file.attrs for name in GEOMETRY):
            return None
        try:
            geometry = {
                name: numbers(read_attribute(file, name), count) for name, count in GEOMETRY.items()
            }
            valid = _is_geometry(**geometry)
        except (TypeError, ValueError, OSError):
            valid = False
    if not valid:
        raise InputError(
            f"{path} stores an invalid geometry (spacing must be positive, the columns of the "
            "direction at right angles and of length 1, and all values finite); run preprocess "
            "again"
        )
    return geometry


def _is_geometry(
    spacing: tuple[float, ...], origin: tuple[float, ...], direction: tuple[float, ...]
) -> bool:
    """Return whether finite numbers place voxels: mm that exist, axes at right angles."""
    axes = np.reshape(direction, (3, 3))
    # Readers of scans allow `SKEWED` in angles and lengths each, which add up here.
    return bool(
        all(SIZES[0] <= size <= SIZES[1] for size in spacing)
        and max(map(abs, origin)) <= FARTHEST
        and np.abs(axes.T @ axes - np.eye(3)).max() <= 3 * SKEWED
    )


def size_is_stated(path: Path) -> bool:
    """Return whether the spacing of a volume is that of its scan, and not made up by a reader.

    Raises:
        InputError: the stored value is not yes or no.
    """
    with opened(path) as file:
        try:
            stored = read_attribute(file, "size_is_stated")
            return stored is None or bool(numbers(stored, 1)[0])
        except (TypeError, ValueError, OSError):
            raise InputError(
                f"{path} stores a size_is_stated that is neither True nor False; run preprocess "
                "again"
            ) from None


def read_orientation(path: Path) -> str | None:
    """Read the directions of a volume's axes, e.g. LPS.

    Returns:
        None if the volume has the same axes as its scan.

    Raises:
        InputError: the stored value is not an orientation.
    """
    with opened(path) as file:
        try:
            letters = read_attribute(file, "orientation")
        except (TypeError, ValueError, OSError) as error:
            raise InputError(
                f"{path} stores an orientation that is not readable ({first_line(error)}), "
                "expected letters like LPS; run preprocess again"
            ) from None
    if letters is not None and not (isinstance(letters, str) and is_orientation(letters)):
        raise InputError(
            f"{path} stores the orientation {letters!r:.20}, expected letters like LPS; run "
            "preprocess again"
        )
    return letters
