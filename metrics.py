"""What is reported of a segmentation: DSC, HD95 and ASSD, and the rules for empty masks.

HD95 is the 95th percentile of both directed surface distances *pooled*, as medpy computes it and
as SAMed's published numbers are; many libraries report the larger of two directed percentiles,
which differs by up to 30 %. Two rules for empty masks stand side by side: `samed`, the original's,
which scores a missed organ HD95 0 and a false one DSC 1, and an honest one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import KDTree

BOTH, FALSE_ORGAN, MISSED, ABSENT = "both", "false organ", "missed", "absent"


@dataclass(frozen=True)
class ClassScore:
    """The scores of one class in one volume. None: not defined there, left out of means."""

    outcome: str  # which of prediction and label have it: BOTH, FALSE_ORGAN, MISSED or ABSENT
    samed_dsc: float  # 0…1, the original's rule for empty masks
    samed_hd95: float  # voxels, the original's rule
    dsc: float | None  # 0…1; a false or missed organ scores 0, an absent one nothing
    hd95_voxels: float | None  # only where both have it
    hd95_mm: float | None  # the same in mm; None also where the spacing is unknown
    assd_mm: float | None  # average symmetric surface distance


def score_class(
    prediction: np.ndarray, label: np.ndarray, spacing: Sequence[float] | None = None
) -> ClassScore:
    """Score one class.

    Args:
        prediction, label: masks (D, H, W) or (H, W), non-zero inside; not changed.
        spacing: mm per voxel in array order (z, y, x), if known.
    """
    prediction, label = np.asarray(prediction) != 0, np.asarray(label) != 0
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {prediction.shape} and label {label.shape} differ in shape")
    predicted, real = bool(prediction.any()), bool(label.any())
    if not (predicted and real):
        outcome = FALSE_ORGAN if predicted else MISSED if real else ABSENT
        return ClassScore(
            outcome=outcome,
            samed_dsc=1.0 if outcome == FALSE_ORGAN else 0.0,
            samed_hd95=0.0,
            dsc=None if outcome == ABSENT else 0.0,
            hd95_voxels=None,
            hd95_mm=None,
            assd_mm=None,
        )
    box = joint_box(prediction, label)
    prediction, label = prediction[box], label[box]
    dsc = dice(prediction, label)
    surfaces = surface_voxels(prediction), surface_voxels(label)
    hd95 = hausdorff95(surface_distances(*surfaces))
    hd95_mm = assd_mm = None
    if spacing is not None:
        distances = surface_distances(*surfaces, spacing)
        hd95_mm, assd_mm = hausdorff95(distances), average_distance(distances)
    return ClassScore(BOTH, dsc, hd95, dsc, hd95, hd95_mm, assd_mm)


def score_volume(
    prediction: np.ndarray,
    label: np.ndarray,
    num_classes: int,
    spacing: Sequence[float] | None = None,
) -> list[ClassScore]:
    """Score the classes 1…num_classes of a label volume (D, H, W); `spacing` as in mm (z, y, x)."""
    return [
        score_class(prediction == index, label == index, spacing)
        for index in range(1, num_classes + 1)
    ]


def calculate_metric_percase(pred: np.ndarray, gt: np.ndarray) -> tuple[float, float]:
    """(DSC, HD95 in voxels) by the original's rule for empty masks; changes neither input."""
    score = score_class(np.asarray(pred) > 0, np.asarray(gt) > 0)
    return score.samed_dsc, score.samed_hd95


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are defined; None if none is."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def dice(prediction: np.ndarray, label: np.ndarray) -> float:
    """Dice similarity coefficient of two bool masks, 0…1; not both empty."""
    overlap = np.count_nonzero(prediction & label)
    return 2.0 * overlap / (np.count_nonzero(prediction) + np.count_nonzero(label))


def joint_box(first: np.ndarray, second: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around both masks; surfaces and distances inside it are the same."""
    either = first | second
    box = []
    for axis in range(either.ndim):
        others = tuple(other for other in range(either.ndim) if other != axis)
        filled = np.flatnonzero(either.any(axis=others))
        box.append(slice(int(filled[0]), int(filled[-1]) + 1))
    return tuple(box)


def surface_voxels(mask: np.ndarray) -> np.ndarray:  # bool (…) -> (N, ndim) indices
    """Voxels of a mask with a face neighbour outside it or outside the volume."""
    padded = np.pad(mask, 1)
    inside = tuple(slice(1, -1) for _ in range(mask.ndim))
    interior = mask.copy()
    for axis in range(mask.ndim):
        for shift in (slice(None, -2), slice(2, None)):
            neighbour = (*inside[:axis], shift, *inside[axis + 1 :])
            interior &= padded[neighbour]
    return np.argwhere(mask & ~interior)


def surface_distances(
    first: np.ndarray, second: np.ndarray, spacing: Sequence[float] | float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Distance of every surface voxel to the other surface, in both directions.

    Args:
        first, second: (N, ndim) and (M, ndim) voxel indices, not empty.
        spacing: per axis; 1 for distances in voxels.

    Returns:
        (N,) and (M,) distances. A k-d tree finds the same nearest voxel as a distance transform
        of the volume, at a cost that grows with the surface and not with the box.
    """
    first, second = first * np.asarray(spacing), second * np.asarray(spacing)
    return KDTree(second).query(first)[0], KDTree(first).query(second)[0]


def hausdorff95(distances: tuple[np.ndarray, np.ndarray]) -> float:
    """95th percentile of both directed distance sets pooled."""
    return float(np.percentile(np.concatenate(distances), 95))


def average_distance(distances: tuple[np.ndarray, np.ndarray]) -> float:
    """Average symmetric surface distance: the mean of both directed distance sets pooled."""
    return float(np.concatenate(distances).mean())
