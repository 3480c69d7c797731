"""Parity of slice-by-slice evaluation of a real CT volume with the reference implementation."""

from __future__ import annotations

import numpy as np
import pytest
from golden_rule import golden_model, read_json, read_npz
from real_data import REAL_DATA, needs_real_data

import utils
from datasets.registry import SYNAPSE
from volumes import read_volume


@needs_real_data
def test_volume(tmp_path):
    expected, arrays = read_json("volume.json"), read_npz("volume.npz")
    raw, _ = read_volume(REAL_DATA / "ct" / "abdomen_crop.nii.gz")
    low, high = SYNAPSE.window
    image = ((np.clip(raw, low, high) - low) / (high - low)).astype(np.float32)
    first, last = expected["slices"]
    scores = utils.test_single_volume(
        image[None, first:last],
        arrays["label"][None],
        golden_model(224),
        classes=8,
        patch_size=[expected["img_size"]] * 2,
        input_size=[expected["input_size"]] * 2,
        test_save_path=tmp_path,
        case="case0001",
    )
    prediction, _ = read_volume(tmp_path / "case0001_pred.nii.gz")
    assert (prediction == arrays["prediction"]).mean() >= 0.999
    reference = expected["dice_hd95"]
    assert [dsc for dsc, _ in scores] == pytest.approx([dsc for dsc, _ in reference], abs=0.002)
