"""DSC, HD95 and ASSD equal medpy's for masks of many kinds."""

from __future__ import annotations

import numpy as np
import pytest
from medpy.metric import binary
from scipy import ndimage

from evaluation.metrics import ABSENT, FALSE_ORGAN, MISSED, confusion, mean, score_volume

SPACING = (3.0, 0.7, 0.8)


def in_plane(*masks: np.ndarray) -> list[np.ndarray]:
    """Return the masks as scores take their distances: a volume of one slice is a picture."""
    return [mask[0] if mask.ndim == 3 and len(mask) == 1 else mask for mask in masks]


def blob(rng: np.random.Generator, shape: tuple[int, ...], share: float) -> np.ndarray:
    """Return a random mask with smooth outlines; it is never empty."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5)
    return field >= np.quantile(field, 1 - share)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(12, 25, 31), (1, 16, 16), (5, 1, 9), (20, 24)])
def test_scores_equal_medpy(seed: int, shape: tuple[int, ...]):
    rng = np.random.default_rng(seed)
    prediction, label = blob(rng, shape, 0.1), blob(rng, shape, 0.2)
    prediction |= rng.random(shape) < 0.01  # scattered false positives
    score = score_volume(prediction, label, 1, SPACING[-len(shape) :])[0]
    assert score.dsc == pytest.approx(binary.dc(prediction, label), abs=1e-12)
    assert score.samed_hd95 == pytest.approx(binary.hd95(prediction, label), abs=1e-9)
    masks = in_plane(prediction, label)
    spacing = SPACING[-masks[0].ndim :]
    assert score.hd95_voxels == pytest.approx(binary.hd95(*masks), abs=1e-9)
    assert score.hd95_mm == pytest.approx(binary.hd95(*masks, spacing), abs=1e-9)
    assert score.assd_mm == pytest.approx(binary.assd(*masks, spacing), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(9, 21, 17), (1, 20, 20), (7, 1, 30), (15, 22)])
def test_all_classes_at_once_equal_medpy_class_by_class(seed: int, shape: tuple[int, ...]):
    """With touching classes, stray voxels, and classes that one mask or both masks lack."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal((2, *shape)), (0, *[1.5] * len(shape)))
    prediction, label = (np.digitize(f, np.quantile(f, [0.6, 0.75, 0.9])) for f in field)
    prediction, label = prediction.astype(np.uint8), label.astype(np.uint8)
    prediction[rng.random(shape) < 0.02] = 1
    prediction[(0,) * len(shape)], label[(-1,) * len(shape)] = 5, 6
    scores = score_volume(prediction, label, 6, SPACING[-len(shape) :])
    for index in (1, 2, 3):
        masks = prediction == index, label == index
        assert scores[index - 1].dsc == pytest.approx(binary.dc(*masks), abs=1e-12)
        assert scores[index - 1].samed_hd95 == pytest.approx(binary.hd95(*masks), abs=1e-9)
        masks = in_plane(*masks)
        assert scores[index - 1].hd95_voxels == pytest.approx(binary.hd95(*masks), abs=1e-9)
        mm = binary.assd(*masks, SPACING[-masks[0].ndim :])
        assert scores[index - 1].assd_mm == pytest.approx(mm, abs=1e-9)
    assert [score.outcome for score in scores[3:]] == [ABSENT, FALSE_ORGAN, MISSED]


def test_empty_volumes_have_no_class():
    empty = np.zeros((3, 4, 5), dtype=np.uint8)
    assert [score.outcome for score in score_volume(empty, empty, 2, SPACING)] == [ABSENT] * 2


def test_confusion_counts_every_voxel_once():
    rng = np.random.default_rng(0)
    prediction, label = rng.integers(0, 5, (2, 6, 7, 8), dtype=np.uint8)
    counts = confusion(prediction, label, 3)  # label 4 is above 3: background
    assert counts.sum() == prediction.size
    assert counts[2, 3] == np.count_nonzero((prediction == 2) & (label == 3))
    assert counts[0, 1] == np.count_nonzero(np.isin(prediction, (0, 4)) & (label == 1))


def test_a_mask_that_touches_the_border_has_a_surface_there():
    full = np.ones((3, 4, 5), dtype=bool)
    inner = np.zeros_like(full)
    inner[1, 1:3, 1:4] = True
    score = score_volume(full, inner, 1, SPACING)[0]
    assert score.hd95_mm == pytest.approx(binary.hd95(full, inner, SPACING), abs=1e-9)


def test_a_volume_of_one_slice_scores_like_the_picture():
    """As a volume, every voxel of the organ would be surface: HD95 1 here, between outlines 3."""
    label, prediction = np.zeros((2, 1, 40, 40), np.uint8)
    label[0, 5:35, 5:35] = 1
    prediction[0, 5:35, 5:38] = 1
    spacing = (5.0, 0.5, 2.0)
    as_volume = score_volume(prediction, label, 1, spacing)[0]
    as_picture = score_volume(prediction[0], label[0], 1, spacing[1:])[0]
    for name in ("dsc", "hd95_voxels", "hd95_mm", "assd_mm", "nsd", "hd95_to_label_mm"):
        assert getattr(as_volume, name) == getattr(as_picture, name), name
    assert as_volume.hd95_voxels == pytest.approx(binary.hd95(prediction[0], label[0])) == 3
    assert as_volume.hd95_mm == pytest.approx(6)
    assert as_volume.samed_hd95 == binary.hd95(prediction, label) < 3


def test_an_organ_in_one_slice_of_a_volume_is_no_picture():
    label, prediction = np.zeros((2, 3, 20, 20), np.uint8)
    label[1, 5:15, 5:15] = 1
    prediction[1, 5:15, 5:18] = 1
    score = score_volume(prediction, label, 1, (5.0, 1.0, 1.0))[0]
    assert score.hd95_voxels == score.samed_hd95 == binary.hd95(prediction, label)


def test_without_spacing_there_are_no_millimetres():
    score = score_volume(np.ones((2, 2, 2), bool), np.ones((2, 2, 2), bool), 1)[0]
    assert (score.dsc, score.hd95_voxels, score.hd95_mm, score.assd_mm) == (1, 0, None, None)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        score_volume(np.ones((2, 2), bool), np.ones((2, 3), bool), 1)


def test_mean_leaves_out_what_is_not_defined():
    assert mean([1.0, None, 2.0]) == 1.5 and mean([None]) is None
