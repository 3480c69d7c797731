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
NSD_TOLERANCE = 2.0  # mm


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
    hd95_to_label_mm: float | None = None  # of the distances from the prediction's surface alone
    hd95_to_prediction_mm: float | None = None  # and from the label's
    nsd: float | None = None  # 0…1, share of both surfaces within the tolerance of the other


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

    All classes share one pass over the voxels; what follows grows with the surfaces alone, so
    that neither the size of a volume nor stray voxels far from an organ cost much.

    Args:
        prediction, label: classes (D, H, W) or (H, W), unsigned integers or bool; not changed.
        spacing: mm per voxel in array order (z, y, x), if known.
        tolerance: of the normalised surface Dice, mm.

    Returns:
        Scores of the classes in order, and the voxels (num_classes + 1, num_classes + 1) of every
        predicted class (row) and true one (column), background first.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {prediction.shape} and label {label.shape} differ in shape")
    voxels = prediction.size
    box = joint_box(prediction, label)  # no surface and no distance depends on what is outside
    prediction, label = prediction[box], label[box]
    counts = confusion(prediction, label, num_classes)
    counts[0, 0] += voxels - prediction.size
    surfaces = zip(
        surface_voxels(prediction, num_classes), surface_voxels(label, num_classes), strict=True
    )
    scores = [
        score_class(
            int(counts[index, index]),
            int(counts[index].sum()),
            int(counts[:, index].sum()),
            pair,
            spacing,
            tolerance,
        )
        for index, pair in enumerate(surfaces, start=1)
    ]
    return scores, counts


def score_class(
    overlap: int,
    predicted: int,
    real: int,
    surfaces: tuple[np.ndarray, np.ndarray],
    spacing: Sequence[float] | None = None,
    tolerance: float = NSD_TOLERANCE,
) -> ClassScore:
    """Score one class from what is left of its masks.

    Args:
        overlap, predicted, real: voxels in both masks, in the prediction, in the label.
        surfaces: indices (N, ndim) of the surface voxels of prediction and label.
        spacing: mm per voxel in array order, if known.
        tolerance: of the normalised surface Dice, mm.
    """
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
            nsd=None if outcome == ABSENT or spacing is None else 0.0,
        )
    dsc = 2.0 * overlap / (predicted + real)
    hd95 = hausdorff95(surface_distances(*surfaces))
    if spacing is None:
        return ClassScore(
            outcome=BOTH,
            samed_dsc=dsc,
            samed_hd95=hd95,
            dsc=dsc,
            hd95_voxels=hd95,
            hd95_mm=None,
            assd_mm=None,
        )
    distances = surface_distances(*surfaces, spacing)
    return ClassScore(
        outcome=BOTH,
        samed_dsc=dsc,
        samed_hd95=hd95,
        dsc=dsc,
        hd95_voxels=hd95,
        hd95_mm=hausdorff95(distances),
        assd_mm=average_distance(distances),
        hd95_to_label_mm=float(np.percentile(distances[0], 95)),
        hd95_to_prediction_mm=float(np.percentile(distances[1], 95)),
        nsd=float(np.mean(np.concatenate(distances) <= tolerance)),
    )


def calculate_metric_percase(pred: np.ndarray, gt: np.ndarray) -> tuple[float, float]:
    """(DSC, HD95 in voxels) by the original's rule for empty masks; changes neither input."""
    score = score_volume(np.asarray(pred) > 0, np.asarray(gt) > 0, 1)[0]
    return score.samed_dsc, score.samed_hd95


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are defined; None if none is."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def joint_box(first: np.ndarray, second: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around all that is not 0 in either; of no voxels where all is 0."""
    box: list[slice] = []
    for axis in range(first.ndim):
        others = tuple(other for other in range(first.ndim) if other != axis)
        cut = (*box, ...)  # later axes look only into what the earlier ones left
        filled = np.flatnonzero(first[cut].any(axis=others) | second[cut].any(axis=others))
        box.append(slice(int(filled[0]), int(filled[-1]) + 1) if filled.size else slice(0, 0))
    return tuple(box)


def confusion(
    prediction: np.ndarray, label: np.ndarray, num_classes: int
) -> np.ndarray:  # (num_classes + 1, num_classes + 1) int64
    """How many voxels of label j (column) are predicted as i (row); values beyond count as 0."""
    size = num_classes + 1
    either = np.flatnonzero((prediction != 0) | (label != 0))
    rows, columns = (a.ravel()[either].astype(np.int64) for a in (prediction, label))
    rows[rows > num_classes] = 0
    columns[columns > num_classes] = 0
    counts = np.bincount(rows * size + columns, minlength=size * size).reshape(size, size)
    counts[0, 0] += prediction.size - len(either)
    return counts


def surface_voxels(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Of each class, the indices (N, ndim) of its voxels with a face neighbour outside it.

    Beyond the array nothing belongs to any class. Equal neighbours differ from no class and
    unequal ones from both, so one comparison along each axis serves all classes.
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
    """Distance of every surface voxel to the other surface, in both directions.

    Args:
        first, second: (N, ndim) and (M, ndim) voxel indices, not empty.
        spacing: per axis; 1 for distances in voxels.

    Returns:
        (N,) and (M,) distances. A k-d tree finds the same nearest voxel as a distance transform
        of the volume, at a cost that grows with the surface and not with the box.
    """
    first, second = first * np.asarray(spacing), second * np.asarray(spacing)
    # an unbalanced tree gives the same neighbours and is built without sorting for medians
    trees = [KDTree(points, balanced_tree=False) for points in (first, second)]
    return trees[1].query(first, workers=-1)[0], trees[0].query(second, workers=-1)[0]


def hausdorff95(distances: tuple[np.ndarray, np.ndarray]) -> float:
    """95th percentile of both directed distance sets pooled."""
    return float(np.percentile(np.concatenate(distances), 95))


def average_distance(distances: tuple[np.ndarray, np.ndarray]) -> float:
    """Average symmetric surface distance: the mean of both directed distance sets pooled."""
    return float(np.concatenate(distances).mean())
