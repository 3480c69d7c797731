"""Reading one slice or volume of prepared data, with every check that a user's data needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from common.errors import InputError, first_few

from .registry import is_orientation

# Intensities are HU mapped to [0, 1]; cubic zoom overshoots by a few tenths at sharp edges.
PLAUSIBLE_RANGE = (-1.0, 2.0)
# Attributes of a test volume and how many numbers each has, in SimpleITK's order.
GEOMETRY = {"spacing": 3, "origin": 3, "direction": 9}


@dataclass(frozen=True)
class SampleFacts:
    """What was seen of one slice or volume."""

    name: str
    shape: tuple[int, ...]  # of the label
    colour: bool
    low: float  # intensities, about [0, 1]
    high: float
    voxels: tuple[int, ...]  # of each class, background first
    digest: str  # of the image; equal images have equal ones


def check_sample(
    image: np.ndarray, label: np.ndarray, path: Path, *, num_classes: int, ndim: int
) -> tuple[np.ndarray, np.ndarray]:  # float32 (…, H, W) or (…, 3, H, W), uint8 (…, H, W)
    """Return a sample in the dtypes that training takes, or say what is wrong with its file.

    Raises:
        InputError: shapes, labels outside 0…num_classes, NaN, or intensities not about [0, 1].
    """
    colour = (*label.shape[:-2], 3, *label.shape[-2:])
    if image.shape not in (label.shape, colour) or label.ndim != ndim or not image.size:
        raise InputError(
            f"{path} holds an image {image.shape} and a label {label.shape}, expected the same "
            f"non-empty {ndim}-D shape; run preprocess again"
        )
    for name, array in (("image", image), ("label", label)):
        if array.dtype.kind not in "fiub":
            raise InputError(f"{path} holds {name} values of type {array.dtype}, expected numbers")
    low, high = float(image.min()), float(image.max())  # NaN propagates to both
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{path} holds NaN or infinite intensities; run preprocess again")
    if low < PLAUSIBLE_RANGE[0] or high > PLAUSIBLE_RANGE[1]:
        raise InputError(
            f"{path} holds intensities from {low:g} to {high:g}, which look like raw HU or grey "
            "values where [0, 1] is expected; run preprocess on the raw scans"
        )
    as_class = label.astype(np.uint8)
    if (as_class != label).any() or as_class.max() > num_classes:
        values = np.unique(label)
        wrong = [f"{v:g}" for v in values if not (0 <= v <= num_classes and v == int(v))]
        raise InputError(
            f"{path} holds label values {first_few(wrong)}, expected 0…{num_classes}; pass the "
            "right --num_classes or map the labels by preprocess"
        )
    return np.ascontiguousarray(image, dtype=np.float32), as_class


def read_volume_file(path: Path) -> dict[str, np.ndarray]:
    try:
        with h5py.File(path, "r") as file:
            for key in ("image", "label"):
                if not isinstance(file.get(key), h5py.Dataset):
                    raise InputError(
                        f"{path} has no data set named {key} (it holds "
                        f"{', '.join(file) or 'nothing'}); write it by preprocess"
                    )
            return {key: file[key][()] for key in ("image", "label")}
    except InputError:
        raise
    except Exception as error:  # on damaged bytes the parser raises nearly anything
        raise InputError(
            f"{path} is not a readable h5 file ({error}); run preprocess again"
        ) from None


def read_geometry(path: Path) -> dict[str, tuple[float, ...]] | None:
    """Spacing, origin and direction of a volume's scan in SimpleITK's order; None: not stored.

    Raises:
        InputError: they are no such numbers.
    """
    with h5py.File(path, "r") as file:
        if not all(name in file.attrs for name in GEOMETRY):
            return None
        try:
            stored = {
                name: tuple(np.asarray(file.attrs[name], dtype=float).reshape(length).tolist())
                for name, length in GEOMETRY.items()
            }
        except (TypeError, ValueError, OSError):
            stored = {"spacing": (0.0,)}
    if min(stored["spacing"]) <= 0 or not np.isfinite(sum(stored.values(), ())).all():
        raise InputError(f"{path} stores a geometry that is none; run preprocess again")
    return stored


def read_orientation(path: Path) -> str | None:
    """What the axes of a volume's array run towards, as LPS; None: it lies as its scan.

    Raises:
        InputError: it is stored but names no axes.
    """
    with h5py.File(path, "r") as file:
        letters = file.attrs.get("orientation")
    if letters is not None and not (isinstance(letters, str) and is_orientation(letters)):
        raise InputError(
            f"{path} stores the orientation {letters!r:.20}, expected letters as LPS; run "
            "preprocess again"
        )
    return letters
