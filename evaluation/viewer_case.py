"""What `viewer.html` shows of one case, small: 8 bits a voxel, cropped, coarser if it is large.

A case is encoded when it is at hand and kept in a file of its own, so that the page of any number
of cases, processes and interrupted runs is put together later without much memory.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.writing import write_text
from datasets.intensity import PERCENTILES, WINDOW, Intensity
from datasets.scans.geometry import Geometry
from datasets.scans.orientation import orientation_of
from evaluation.tables import WorstSlice
from evaluation.views import window_text

MOST_VOXELS = 6_000_000  # of a case; more are thinned out
LONGEST_SIDE = 1024  # voxels; every graphics card with WebGL 2 holds such a volume
MARGIN = 2  # voxels around the body
SKIN = -500.0  # HU; darker is air around the patient
DARK = 0.02  # of the range of values; darker is air where values are no HU
# The grey levels of a CT: fine where organs are, as 256 levels of equal steps would be 10 HU apart.
HOUNSFIELD = (*range(-1024, -200, 14), *range(-200, 300, 3), *range(300, 1606, 45))
CT_WINDOWS = {"soft tissue": (-160.0, 240.0), "lung": (-1350.0, 150.0), "bone": (-500.0, 1300.0)}
MR_WINDOWS = {"percentiles 0.5…99.5": (0.5, 99.5), "percentiles 2…98": (2, 98), "all": (0, 100)}


@dataclass(frozen=True)
class Picture:
    """The image of a case, and how it was made of the voxels of its file."""

    voxels: np.ndarray  # (D, H, W) or, in colour, (D, 3, H, W)
    intensity: Intensity
    limits: tuple[float, float] | None  # values that the network sees black and white; None: the
    # voxels are those of a prepared volume, which are in [0, 1] already


def encode_case(
    name: str,
    picture: Picture,
    labels: np.ndarray,
    truth: np.ndarray | None,
    *,
    geometry: Geometry | None,
    notes: Sequence[str] = (),
    worst: Sequence[WorstSlice] = (),
    voxel_ml: float | None = None,
) -> dict[str, Any]:
    """Return what the page needs of a case, as JSON values.

    Args:
        labels, truth: (D, H, W) uint8 classes.
        geometry: of these arrays; None: unknown, as of a picture.
        notes: what the page says about the case.
        voxel_ml: volume of a voxel; None: unknown.
    """
    box = body_box(picture, labels, truth)
    steps = thinning([part.stop - part.start for part in box], geometry)
    kept = tuple(slice(part.start, part.stop, step) for part, step in zip(box, steps, strict=True))
    image, levels = grey_levels(picture, kept)
    return {
        "name": name,
        "shape": list(labels[kept].shape[::-1]),  # x, y, z, here and below
        "full": list(labels.shape[::-1]),
        "start": [part.start for part in box[::-1]],
        "step": steps[::-1],
        "affine": affine_of(geometry or Geometry.unknown(), kept),
        "letters": orientation_of(geometry or Geometry.unknown()),
        "known": geometry is not None,
        "levels": levels,
        "image": packed(image),
        "labels": packed(labels[kept]),
        "truth": None if truth is None else packed(truth[kept]),
        "voxel_ml": voxel_ml,
        "voxels": count_classes(labels),
        "truth_voxels": None if truth is None else count_classes(truth),
        "worst": [
            {"index": one.index, "organ": one.organ, "error": one.error, "wrong": one.wrong}
            for one in worst
        ],
        "notes": list(notes),
    }


def write_case_part(path: Path, case: dict[str, Any]) -> None:
    """Keep an encoded case in a file, until the page is put together."""
    write_text(path, as_json(case))


def as_json(content: Any) -> str:
    """Return JSON that cannot end the HTML element it stands in, whatever a text holds."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))  # ASCII alone
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def count_classes(labels: np.ndarray) -> list[int]:  # (D, H, W) uint8
    """Return the number of voxels of each class from 0 to 255."""
    return sum(np.bincount(plane.ravel(), minlength=256) for plane in labels).tolist()


def body_box(picture: Picture, labels: np.ndarray, truth: np.ndarray | None) -> tuple[slice, ...]:
    """Return the box (z, y, x) around what is brighter than air, and around every label."""
    voxels, threshold = picture.voxels, _air(picture)
    found = [np.zeros(size, bool) for size in labels.shape]
    for index in range(len(labels)):
        plane = voxels[index] > threshold
        filled = plane.any(axis=0) if plane.ndim == 3 else plane
        for mask in (labels, truth):
            if mask is not None:
                filled = filled | (mask[index] > 0)
        rows, columns = filled.any(axis=1), filled.any(axis=0)
        found[0][index] = rows.any()
        found[1] |= rows
        found[2] |= columns
    box = []
    for line in found:
        inside = np.flatnonzero(line) if line.any() else np.arange(len(line))
        start = max(0, int(inside[0]) - MARGIN)
        box.append(slice(start, min(len(line), int(inside[-1]) + 1 + MARGIN)))
    return tuple(box)


def _air(picture: Picture) -> float:
    """Return the value up to which a voxel counts as air."""
    if picture.voxels.ndim == 4:
        return -math.inf  # a colour picture is kept whole
    if picture.limits is None:
        return DARK
    if picture.intensity.rule == WINDOW:
        return SKIN
    low, high = picture.limits
    return low + DARK * (high - low)


def thinning(shape: Sequence[int], geometry: Geometry | None) -> list[int]:
    """Return every how many-th voxel is kept along z, y, x, so that a case is not too large.

    The voxels stay as cubic as they can be. Kept voxels are those of the file, not means of some,
    so that what is drawn over a label is the value that the network saw there.
    """
    spacing = (1.0, 1.0, 1.0) if geometry is None else geometry.voxel_spacing
    steps = [1 + (size - 1) // LONGEST_SIDE for size in shape]

    def kept() -> list[int]:
        return [-(-size // step) for size, step in zip(shape, steps, strict=True)]

    while math.prod(kept()) > MOST_VOXELS:
        axes = [axis for axis, size in enumerate(kept()) if size > 1]
        steps[min(axes, key=lambda axis: (spacing[axis] * steps[axis], -kept()[axis]))] += 1
    return steps


def affine_of(geometry: Geometry, kept: Sequence[slice]) -> list[list[float]]:
    """Return the rows of the matrix from kept voxels (x, y, z) to mm, in NIfTI's RAS axes."""
    start = np.array([part.start for part in kept[::-1]], float)
    step = np.array([part.step for part in kept[::-1]], float)
    axes = np.reshape(geometry.direction, (3, 3)) * geometry.spacing  # mm along the columns
    matrix = np.column_stack((axes * step, np.array(geometry.origin) + axes @ start))
    return (matrix * [[-1], [-1], [1]]).tolist()


def grey_levels(picture: Picture, kept: Sequence[slice]) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the kept voxels in 8 bits, and what the levels mean.

    Returns:
        (D, H, W) or, in colour, (D, H, W, 3) uint8; a dict of the value of each level or, for equal
        steps, of the first level and the step, the unit, the windows, and what the page says.
    """
    if picture.voxels.ndim == 4:
        part = np.moveaxis(picture.voxels[kept[0], :, kept[1], kept[2]], 1, -1)
        low, high = picture.limits or (0.0, 1.0)
        colours = _steps(part, low, (high - low) / 255)
        return colours, {"colour": True, "windows": [], "unit": "", "said": "8 bits a colour"}
    part = np.nan_to_num(picture.voxels[tuple(kept)])
    rule, text = picture.intensity.rule, window_text(picture.intensity)
    unit = "HU" if rule == WINDOW else ""
    if picture.limits is None:
        ends = (picture.intensity.low, picture.intensity.high) if rule == WINDOW else (0.0, 1.0)
        named = {"as the network": ends}
        if rule == WINDOW and ends[0] <= 0 < ends[1]:
            named["soft tissue"] = CT_WINDOWS["soft tissue"]
        low, step = ends[0], (ends[1] - ends[0]) / 255
        said = f"256 grey levels; a prepared volume holds only {text}"
        return _steps(part, 0.0, 1 / 255), _levels(named, unit, said, low=low, step=step)
    named = {"as the network": picture.limits}
    if rule == WINDOW:
        said = "256 grey levels, to 2 HU from −200 to 300 HU and to 7 HU below, to 23 HU above"
        return _hounsfield(part), _levels(named | CT_WINDOWS, unit, said, table=HOUNSFIELD)
    if rule == PERCENTILES:
        for title, percentiles in MR_WINDOWS.items():
            ends = np.percentile(part, percentiles).tolist()
            if ends[0] < ends[1]:
                named[title] = tuple(ends)
    low, high = float(part.min()), float(np.percentile(part, 99.95))
    low, high = (low, high) if low < high else (float(part.min()), float(part.max()))
    if part.dtype.kind in "ub" and part.dtype.itemsize == 1:
        low, high = 0.0, 255.0
    step = (high - low) / 255 or 1.0
    return _steps(part, low, step), _levels(named, unit, "256 grey levels", low=low, step=step)


def _levels(named: dict[str, Any], unit: str, said: str, **scale: Any) -> dict[str, Any]:
    windows = [{"name": name, "low": low, "high": high} for name, (low, high) in named.items()]
    return {"windows": windows, "unit": unit, "said": said, **scale}


def _steps(values: np.ndarray, low: float, step: float) -> np.ndarray:  # uint8
    levels = (values.astype(np.float32) - low) / step
    return levels.round().clip(0, 255).astype(np.uint8)


def _hounsfield(values: np.ndarray) -> np.ndarray:  # uint8
    """Return the nearest of the levels of `HOUNSFIELD`."""
    levels = np.array(HOUNSFIELD)
    middles = (levels[1:] + levels[:-1]) / 2
    first, last = HOUNSFIELD[0], HOUNSFIELD[-1]
    nearest = np.searchsorted(middles, np.arange(first, last + 1)).astype(np.uint8)
    return nearest[values.round().clip(first, last).astype(np.int32) - first]


def packed(voxels: np.ndarray) -> str:
    """Return uint8 voxels as gzip in base64; x runs fastest."""
    content = np.ascontiguousarray(voxels, np.uint8)
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()
