"""DSC, HD95 and ASSD equal medpy's, whatever the masks look like."""

from __future__ import annotations

import numpy as np
import pytest
from medpy.metric import binary
from scipy import ndimage

from metrics import mean, score_class

SPACING = (3.0, 0.7, 0.8)


def blob(rng: np.random.Generator, shape: tuple[int, ...], share: float) -> np.ndarray:
    """A random mask with smooth outlines; never empty."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5)
    return field >= np.quantile(field, 1 - share)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(12, 25, 31), (1, 16, 16), (5, 1, 9), (20, 24)])
def test_scores_equal_medpy(seed: int, shape: tuple[int, ...]):
    rng = np.random.default_rng(seed)
    prediction, label = blob(rng, shape, 0.1), blob(rng, shape, 0.2)
    prediction |= rng.random(shape) < 0.01  # scattered false positives
    spacing = SPACING[-len(shape) :]
    score = score_class(prediction, label, spacing)
    assert score.dsc == pytest.approx(binary.dc(prediction, label), abs=1e-12)
    assert score.hd95_voxels == pytest.approx(binary.hd95(prediction, label), abs=1e-9)
    assert score.hd95_mm == pytest.approx(binary.hd95(prediction, label, spacing), abs=1e-9)
    assert score.assd_mm == pytest.approx(binary.assd(prediction, label, spacing), abs=1e-9)


def test_a_mask_that_touches_the_border_has_a_surface_there():
    full = np.ones((3, 4, 5), dtype=bool)
    inner = np.zeros_like(full)
    inner[1, 1:3, 1:4] = True
    score = score_class(full, inner, SPACING)
    assert score.hd95_mm == pytest.approx(binary.hd95(full, inner, SPACING), abs=1e-9)


def test_without_spacing_there_are_no_millimetres():
    score = score_class(np.ones((2, 2, 2)), np.ones((2, 2, 2)))
    assert (score.dsc, score.hd95_voxels, score.hd95_mm, score.assd_mm) == (1, 0, None, None)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        score_class(np.ones((2, 2)), np.ones((2, 3)))


def test_mean_leaves_out_what_is_not_defined():
    assert mean([1.0, None, 2.0]) == 1.5 and mean([None]) is None
