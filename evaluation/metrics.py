"""Scores of a segmentation: DSC, HD95, ASSD and NSD, with two rules for empty masks.

HD95 is the 95th percentile of both directed surface distances *pooled*, as medpy and SAMed's
published numbers define it. Many libraries report the larger of two directed percentiles, which
differs by up to 30 %.

The `samed` rule is the original's: a missed organ scores HD95 0 and a false organ scores DSC 1. The
stricter rule for DSC stands in `dsc_from_counts`, which test.py and the validation use.
`score_class` decides about the distances: there are none unless both masks have the organ.

A volume of one slice is a picture: `compare_volume` takes its distances in the plane. In such a
volume every voxel of an organ lies at the edge of the array, so as a volume all of them would be
surface, and every distance too small. Only `samed_hd95` counts them so, as the original does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial import KDTree

BOTH, FALSE_ORGAN, MISSED, ABSENT = "both", "false organ", "missed", "absent"
NSD_TOLERANCE = 2.0  # mm


@dataclass(frozen=True)
class ClassScore:
    """The scores of one class in one volume; None where a score is not defined."""

    outcome: str  # BOTH, FALSE_ORGAN (prediction alone), MISSED (label alone) or ABSENT
    samed_dsc: float  # 0…1, samed rule
    samed_hd95: float  # voxels, samed rule; too small in a volume of one slice
    dsc: float | None  # 0…1, stricter rule
    hd95_voxels: float | None  # None unless both masks have the class, here and below
    hd95_mm: float | None  # None also if the spacing is unknown, here and below
    assd_mm: float | None  # average symmetric surface distance
    hd95_to_label_mm: float | None = None  # from the prediction's surface to the label's
    hd95_to_prediction_mm: float | None = None  # from the label's surface to the prediction's
    nsd: float | None = None  # 0…1, share of both surfaces within the tolerance; stricter rule


def outcome_of(predicted: int, real: int) -> str:
    """Return which of prediction and label have a class, given its voxels in each."""
    if predicted and real:
        return BOTH
    if predicted:
        return FALSE_ORGAN
    return MISSED if real else ABSENT


def dsc_from_counts(overlap: int, predicted: int, real: int) -> float | None:
    """Return the DSC of a class by the stricter rule for empty masks.

    This is the only place of that rule: test.py and the validation follow it. NSD takes its value
    where a mask is empty.

    Args:
        overlap, predicted, real: voxels in both masks, in the prediction, in the label.

    Returns:
        0…1; None leaves the case out of the mean of the class.
    """
    outcome = outcome_of(predicted, real)
    if outcome == ABSENT:
        return None
    if outcome in (FALSE_ORGAN, MISSED):
        return 0.0
    return dice(overlap, predicted, real)


def dice(overlap: int, predicted: int, real: int) -> float:
    """Return the Dice similarity coefficient of two masks that are not both empty."""
    return 2.0 * overlap / (predicted + real)


def class_dsc(counts: np.ndarray) -> tuple[float | None, ...]:  # (N + 1, N + 1) integers -> N
    """Return the DSC of the classes 1…N by the stricter rule, given the `confusion` of a case."""
    overlap = counts.diagonal()[1:].tolist()
    predicted, real = (counts.sum(axis=axis)[1:].tolist() for axis in (1, 0))
    return tuple(map(dsc_from_counts, overlap, predicted, real))


def score_volume(
    prediction: np.ndarray,
    label: np.ndarray,
    num_classes: int,
    spacing: Sequence[float] | None = None,
) -> list[ClassScore]:
    """Score the classes 1…num_classes of one volume or slice; see `compare_volume`."""
    return compare_volume(prediction, label, num_classes, spacing)[0]


def compare_volume(
    prediction: np.ndarray,
    label: np.ndarray,
    num_classes: int,
    spacing: Sequence[float] | None = None,
    tolerance: float = NSD_TOLERANCE,
) -> tuple[list[ClassScore], np.ndarray]:
    """Score the classes 1…num_classes of one volume or slice, and count their confusion.

    One pass over the voxels serves all classes. The cost of the distances grows with the surfaces
    alone, so large volumes and stray voxels far from an organ stay cheap. Distances in a volume of
    one slice are those in its plane.

    Args:
        prediction, label: classes (D, H, W) or (H, W), unsigned integers or bool; not changed.
        spacing: mm per voxel in array order (z, y, x), if known.
        tolerance: of the normalised surface Dice, mm.

    Returns:
        The scores of the classes in order, and the number of voxels of each predicted class (row)
        and true class (column), (num_classes + 1, num_classes + 1), background first.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {prediction.shape} and label {label.shape} differ in shape")
    voxels = prediction.size
    one_slice = prediction.ndim == 3 and len(prediction) == 1
    box = joint_box(prediction, label)  # outside is background, which has no surface
    prediction, label = prediction[box], label[box]
    counts = confusion(prediction, label, num_classes)
    counts[0, 0] += voxels - prediction.size
    surfaces = as_volume = _surfaces(prediction, label, num_classes)
    if one_slice and voxels:
        plane = [mask.reshape(mask.shape[-2:]) for mask in (prediction, label)]
        surfaces = _surfaces(*plane, num_classes)
        spacing = None if spacing is None else spacing[1:]
    scores = [
        score_class(
            int(counts[index, index]),
            int(counts[index].sum()),
            int(counts[:, index].sum()),
            surfaces[index - 1],
            spacing,
            tolerance,
            samed_surfaces=as_volume[index - 1],
        )
        for index in range(1, num_classes + 1)
    ]
    return scores, counts


def _surfaces(
    prediction: np.ndarray, label: np.ndarray, num_classes: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the surface voxels of each class in prediction and label."""
    both = (surface_voxels(mask, num_classes) for mask in (prediction, label))
    return list(zip(*both, strict=True))


def score_class(
    overlap: int,
    predicted: int,
    real: int,
    surfaces: tuple[np.ndarray, np.ndarray],
    spacing: Sequence[float] | None = None,
    tolerance: float = NSD_TOLERANCE,
    samed_surfaces: tuple[np.ndarray, np.ndarray] | None = None,
) -> ClassScore:
    """Score one class from its voxel counts and surfaces.

    Args:
        overlap, predicted, real: voxels in both masks, in the prediction, in the label.
        surfaces: indices (N, ndim) of the surface voxels of prediction and label.
        spacing: mm per voxel in array order, if known.
        tolerance: of the normalised surface Dice, mm.
        samed_surfaces: those for the HD95 of the samed rule; None: the same.
    """
    outcome = outcome_of(predicted, real)
    dsc = dsc_from_counts(overlap, predicted, real)
    if outcome != BOTH:
        return ClassScore(
            outcome=outcome,
            samed_dsc=1.0 if outcome == FALSE_ORGAN else 0.0,
            samed_hd95=0.0,
            dsc=dsc,
            hd95_voxels=None,
            hd95_mm=None,
            assd_mm=None,
            nsd=None if spacing is None else dsc,
        )
    hd95 = samed_hd95 = hausdorff95(surface_distances(*surfaces))
    if samed_surfaces is not None and samed_surfaces is not surfaces:
        samed_hd95 = hausdorff95(surface_distances(*samed_surfaces))
    score = ClassScore(
        outcome=BOTH,
        samed_dsc=dice(overlap, predicted, real),
        samed_hd95=samed_hd95,
        dsc=dsc,
        hd95_voxels=hd95,
        hd95_mm=None,
        assd_mm=None,
    )
    if spacing is None:
        return score
    distances = surface_distances(*surfaces, spacing)
    return replace(
        score,
        hd95_mm=hausdorff95(distances),
        assd_mm=average_distance(distances),
        hd95_to_label_mm=float(np.percentile(distances[0], 95)),
        hd95_to_prediction_mm=float(np.percentile(distances[1], 95)),
        nsd=float(np.mean(np.concatenate(distances) <= tolerance)),
    )


def calculate_metric_percase(pred: np.ndarray, gt: np.ndarray) -> tuple[float, float]:
    """Return DSC and HD95 (voxels) of two masks by the samed rule; neither mask is changed."""
    score = score_volume(np.asarray(pred) > 0, np.asarray(gt) > 0, 1)[0]
    return score.samed_dsc, score.samed_hd95


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the defined values; None if no value is defined."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def joint_box(first: np.ndarray, second: np.ndarray) -> tuple[slice, ...]:
    """Return the smallest box around the nonzero voxels of both arrays; empty if all are 0."""
    box: list[slice] = []
    for axis in range(first.ndim):
        others = tuple(other for other in range(first.ndim) if other != axis)
        cut = (*box, ...)  # the axes before this one are cropped already
        filled = np.flatnonzero(first[cut].any(axis=others) | second[cut].any(axis=others))
        box.append(slice(int(filled[0]), int(filled[-1]) + 1) if filled.size else slice(0, 0))
    return tuple(box)


def confusion(
    prediction: np.ndarray, label: np.ndarray, num_classes: int
) -> np.ndarray:  # (num_classes + 1, num_classes + 1) int64
    """Count the voxels of each predicted class (row) and true class (column), background first.

    Values above `num_classes` count as background.
    """
    size = num_classes + 1
    either = np.flatnonzero((prediction != 0) | (label != 0))
    rows, columns = (a.ravel()[either].astype(np.int64) for a in (prediction, label))
    rows[rows > num_classes] = 0
    columns[columns > num_classes] = 0
    counts = np.bincount(rows * size + columns, minlength=size * size).reshape(size, size)
    counts[0, 0] += prediction.size - len(either)
    return counts


def surface_voxels(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Return the indices (N, ndim) of the surface voxels of each class 1…num_classes.

    A surface voxel has a face neighbour of another value, or lies at the edge of the array. That
    does not depend on the class, so one comparison along each axis serves all classes.
    """
    surface = np.zeros(labels.shape, dtype=bool)
    for axis in range(labels.ndim):
        values, mask = np.moveaxis(labels, axis, 0), np.moveaxis(surface, axis, 0)
        differs = values[1:] != values[:-1]
        mask[1:] |= differs
        mask[:-1] |= differs
        mask[:1] = True
        mask[-1:] = True
    surface &= labels != 0
    voxels = np.flatnonzero(surface)
    classes = labels.ravel()[voxels]
    indices = np.stack(np.unravel_index(voxels, labels.shape), axis=-1)
    return [indices[classes == index] for index in range(1, num_classes + 1)]


def surface_distances(
    first: np.ndarray, second: np.ndarray, spacing: Sequence[float] | float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance from each surface voxel to the other surface, in both directions.

    A k-d tree finds the same nearest voxel as a distance transform of the volume, at a cost that
    grows with the surface and not with the volume.

    Args:
        first, second: (N, ndim) and (M, ndim) voxel indices, not empty.
        spacing: per axis; 1 for distances in voxels.

    Returns:
        (N,) and (M,) distances.
    """
    first, second = first * np.asarray(spacing), second * np.asarray(spacing)
    # An unbalanced tree finds the same neighbours and is faster to build: it needs no medians.
    trees = [KDTree(points, balanced_tree=False) for points in (first, second)]
    return trees[1].query(first, workers=-1)[0], trees[0].query(second, workers=-1)[0]


def hausdorff95(distances: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the 95th percentile of both directed distance sets pooled."""
    return float(np.percentile(np.concatenate(distances), 95))


def average_distance(distances: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the average symmetric surface distance: the mean of both distance sets pooled."""
    return float(np.concatenate(distances).mean())
