"""Compare the scores of a test run with medpy, which computed SAMed's published numbers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from common.errors import require_package
from evaluation.metrics import ClassScore

TOLERANCE = 1e-6  # largest allowed difference of DSC (0…1) and of HD95 (voxels)
EXIT_MEDPY_DIFFERS = 4


@dataclass(frozen=True)
class CheckedPair:
    """DSC and HD95 (voxels, samed rule) of one class in one case, computed twice."""

    case: str
    index: int  # class, 1…N
    scores: tuple[float, float]  # by evaluation/metrics.py
    reference: tuple[float, float]  # by medpy

    @property
    def differences(self) -> tuple[float, float]:
        """The absolute differences of DSC and of HD95."""
        dsc, hd95 = np.abs(np.subtract(self.scores, self.reference)).tolist()
        return dsc, hd95

    @property
    def agrees(self) -> bool:
        """Whether both differences are within the tolerance; NaN never is."""
        return all(difference <= TOLERANCE for difference in self.differences)


def require_medpy() -> None:
    """Raise an `InputError` if medpy cannot be imported."""
    require_package("medpy.metric")


class MedpyCheck:
    """Score each case a second time with medpy, and keep both results.

    Several threads may add cases at the same time.

    Args:
        progress: called with 1 after each class of each case.
    """

    def __init__(self, progress: Callable[[int], object]) -> None:
        self.progress = progress
        self.pairs: list[CheckedPair] = []
        self.lock = threading.Lock()

    def add_case(
        self, case: str, prediction: np.ndarray, label: np.ndarray, scores: Sequence[ClassScore]
    ) -> None:
        """Compare the scores of one case, given its prediction and label (D, H, W)."""
        boxes = class_boxes(prediction, label, len(scores))
        for index, (score, box) in enumerate(zip(scores, boxes, strict=True), start=1):
            reference = medpy_scores(prediction[box] == index, label[box] == index)
            pair = CheckedPair(case, index, (score.samed_dsc, score.samed_hd95), reference)
            with self.lock:
                self.pairs.append(pair)
                self.progress(1)


def class_boxes(
    prediction: np.ndarray, label: np.ndarray, num_classes: int
) -> list[tuple[slice, ...]]:
    """Return the smallest box around each class 1…num_classes in both arrays.

    Inside it medpy computes the same bits as in the whole volume, in a fraction of the time. The
    boxes come from scipy, so that the check does not depend on the cropping in `metrics.py`.
    """
    empty = (slice(0, 0),) * label.ndim
    boxes = []
    for first, second in zip(
        ndimage.find_objects(prediction, num_classes),
        ndimage.find_objects(label, num_classes),
        strict=True,
    ):
        ranges = zip(first or second or empty, second or first or empty, strict=True)
        boxes.append(tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in ranges))
    return boxes


def medpy_scores(prediction: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Return DSC and HD95 (voxels) of two masks by medpy, with the original's empty-mask rule."""
    from medpy.metric import binary

    if prediction.any() and label.any():
        return float(binary.dc(prediction, label)), float(binary.hd95(prediction, label))
    return (1.0, 0.0) if prediction.any() else (0.0, 0.0)


def report_check(pairs: Sequence[CheckedPair], class_names: Sequence[str]) -> bool:
    """Log how far the scores are from medpy's; return whether all agree."""
    dsc, hd95 = np.max([pair.differences for pair in pairs], axis=0)
    logging.info(
        "medpy: compared DSC and HD95 of %d pairs of case and class; largest differences: "
        "DSC %.2g, HD95 %.2g voxels",
        len(pairs),
        dsc,
        hd95,
    )
    wrong = sorted(
        (pair for pair in pairs if not pair.agrees), key=lambda pair: (pair.case, pair.index)
    )
    for pair in wrong:
        logging.error(
            "%s, %s: DSC %.9g and HD95 %.9g differ from medpy's %.9g and %.9g",
            pair.case,
            class_names[pair.index - 1],
            *pair.scores,
            *pair.reference,
        )
    return not wrong
