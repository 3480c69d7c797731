"""Reading and checking of prepared slices and volumes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import h5py
import numpy as np

from common.errors import InputError, first_few, warn
from datasets.registry import is_orientation

# Prepared images lie in [0, 1]; cubic zoom overshoots by a few tenths at sharp edges.
PLAUSIBLE_RANGE = (-1.0, 2.0)
# Attributes of a test volume in SimpleITK's order, and how many numbers each has.
GEOMETRY = {"spacing": 3, "origin": 3, "direction": 9}


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


def check_sample(
    image: np.ndarray,
    label: np.ndarray,
    path: Path,
    *,
    num_classes: int | None,
    ndim: int,
    any_range: bool = False,
) -> tuple[np.ndarray, np.ndarray]:  # float32 (…, H, W) or (…, 3, H, W), uint8 (…, H, W)
    """Check a slice or volume, and return it in the dtypes for training.

    Args:
        num_classes: the largest label that is allowed; None: 255.
        ndim: number of axes of the label.
        any_range: warn of intensities far outside [0, 1] instead of refusing them.

    Raises:
        InputError: wrong shapes, labels outside 0…num_classes, NaN, or intensities far outside
            [0, 1].
    """
    colour = (*label.shape[:-2], 3, *label.shape[-2:])
    if image.shape not in (label.shape, colour) or label.ndim != ndim or not image.size:
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


def read_h5(path: Path) -> dict[str, np.ndarray]:
    """Read `image` and `label` of a volume, or of a slice in this format.

    Raises:
        InputError: the file is damaged, or lacks `image` or `label`.
    """
    try:
        with h5py.File(path, "r") as file:
            for key in ("image", "label"):
                if not isinstance(file.get(key), h5py.Dataset):
                    raise InputError(
                        f"{path} has no data set named {key} (it holds "
                        f"{', '.join(file) or 'nothing'}); run preprocess again"
                    )
            return {key: file[key][()] for key in ("image", "label")}
    except InputError:
        raise
    except Exception as error:  # on damaged bytes the parser raises nearly anything
        raise InputError(
            f"{path} is not a readable h5 file ({error}); run preprocess again"
        ) from None


def read_geometry(path: Path) -> dict[str, tuple[float, ...]] | None:
    """Read spacing, origin and direction of a volume's scan, in SimpleITK's order.

    Returns:
        None if the file does not store them.

    Raises:
        InputError: the stored values are not a geometry.
    """
    with h5py.File(path, "r") as file:
        if not all(name in file.attrs for name in GEOMETRY):
            return None
        try:
            geometry = {
                name: tuple(np.asarray(file.attrs[name], dtype=float).reshape(length).tolist())
                for name, length in GEOMETRY.items()
            }
            valid = min(geometry["spacing"]) > 0 and all(
                np.isfinite(numbers).all() for numbers in geometry.values()
            )
        except (TypeError, ValueError, OSError):
            valid = False
    if not valid:
        raise InputError(
            f"{path} stores an invalid geometry (spacing must be positive and all values finite); "
            "run preprocess again"
        )
    return geometry


def size_is_stated(path: Path) -> bool:
    """Return whether the spacing of a volume is that of its scan, and not made up by a reader."""
    with h5py.File(path, "r") as file:
        return bool(file.attrs.get("size_is_stated", True))


def read_orientation(path: Path) -> str | None:
    """Read the directions of a volume's axes, e.g. LPS.

    Returns:
        None if the volume has the same axes as its scan.

    Raises:
        InputError: the stored value is not an orientation.
    """
    with h5py.File(path, "r") as file:
        letters = file.attrs.get("orientation")
    if letters is not None and not (isinstance(letters, str) and is_orientation(letters)):
        raise InputError(
            f"{path} stores the orientation {letters!r:.20}, expected letters like LPS; run "
            "preprocess again"
        )
    return letters
