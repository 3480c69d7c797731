"""Parity of slice-by-slice evaluation of a real CT volume with the reference implementation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from golden_rule import golden_model, read_json, read_npz
from real_data import REAL_DATA, needs_real_data

import utils
from datasets.registry import SYNAPSE

pytest.importorskip("SimpleITK")
pytest.importorskip("nibabel")
from datasets.scans.volumes import read_volume

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parent.parent


def golden_image(expected: dict) -> np.ndarray:  # (D, H, W) float32
    """Return the slices of the real CT that the golden labels belong to."""
    raw, _ = read_volume(REAL_DATA / "ct" / "abdomen_crop.nii.gz")
    low, high = SYNAPSE.intensity.low, SYNAPSE.intensity.high
    image = ((np.clip(raw, low, high) - low) / (high - low)).astype(np.float32)
    return image[slice(*expected["slices"])]


@needs_real_data
def test_volume(tmp_path):
    expected, arrays = read_json("volume.json"), read_npz("volume.npz")
    scores = utils.test_single_volume(
        golden_image(expected)[None],
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


@needs_real_data
def test_base_weights_and_published_adapter_through_test_py(tmp_path):
    """Downloaded weights and adapter, and a volume as the original preprocessed it."""
    expected, arrays = read_json("volume.json"), read_npz("volume.npz")
    model = golden_model(224)
    # Like the published file, this adapter has no settings.
    model.save_lora_parameters(tmp_path / "epoch_159.pth")
    base = {key: value for key, value in model.sam.state_dict().items() if "updates" not in key}
    torch.save(base, tmp_path / "sam_vit_b.pth")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "test_vol.txt").write_text("case0001\n")
    with h5py.File(tmp_path / "case0001.npy.h5", "w") as file:
        file["image"], file["label"] = golden_image(expected), arrays["label"].astype(np.float32)
    command = [sys.executable, str(REPOSITORY / "test.py"), "--volume_path", str(tmp_path)]
    command += ["--ckpt", str(tmp_path / "sam_vit_b.pth"), "--is_savenii", "--device", "cpu"]
    command += ["--lora_ckpt", str(tmp_path / "epoch_159.pth"), "--output_dir", str(tmp_path)]
    command += ["--img_size", str(expected["img_size"])]
    command += ["--input_size", str(expected["input_size"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    prediction, _ = read_volume(tmp_path / "predictions" / "case0001_pred.nii.gz")
    assert (prediction == arrays["prediction"]).mean() >= 0.999
    classes = json.loads((tmp_path / "results.json").read_text())["classes"]
    found = [row["mean"]["samed_dsc"] for row in classes]
    assert found == pytest.approx([dsc for dsc, _ in expected["dice_hd95"]], abs=0.002)
