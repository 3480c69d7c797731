"""Parity of loss, schedule, augmentation and metrics with the reference implementation."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from golden_rule import read_json, read_npz

from datasets.augmentation import Augmentation, prepare_batch
from datasets.resampling import resize_images
from evaluation.metrics import score_volume
from training.losses import Focal_loss, SegmentationLoss


@pytest.mark.parametrize("case", ["all", "absent"])
def test_losses(case: str):
    expected = read_json("loss.json")[case]
    rng = np.random.default_rng([0, 1])
    logits = torch.from_numpy((rng.standard_normal((2, 9, 56, 56)) * 2).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, 9, (2, 56, 56)))
    if case == "absent":
        labels[labels > 4] = 0
    logits.requires_grad_(True)
    terms = SegmentationLoss(9, dice_weight=0.8)(logits, labels)
    terms["loss"].backward()
    found = {
        "ce": terms["loss_ce"].item(),
        "dice": terms["loss_dice"].item(),
        "total_0.8": terms["loss"].item(),
        "grad_norm": logits.grad.norm().item(),
        "focal": Focal_loss(alpha=0.25, gamma=2, num_classes=9)(logits, labels).item(),
    }
    assert found == pytest.approx(expected, rel=1e-5)


AUGMENTATION = read_npz("augmentation.npz")


def parse_branch(name: str) -> Augmentation:
    """Return the choices that a name such as `rot90_2_flip_1`, `rotate_-7` or `none` means."""
    if turned := re.fullmatch(r"rot90_(\d)_flip_(\d)", name):
        return Augmentation(int(turned[1]), int(turned[2]))
    if rotated := re.fullmatch(r"rotate_(-?\d+)", name):
        return Augmentation(angle=int(rotated[1]))
    assert name == "none"
    return Augmentation()


@pytest.mark.parametrize(
    "branch", [key.removesuffix("_low_res_label") for key in AUGMENTATION if "low_res" in key]
)
def test_augmentation(branch: str):
    batch = prepare_batch(
        [torch.from_numpy(AUGMENTATION["image"])],
        [torch.from_numpy(AUGMENTATION["label"].astype(np.uint8))],
        [parse_branch(branch)],
        output_size=(128, 128),
        low_res=(32, 32),
    )
    image = batch["image"][0].numpy()
    assert np.abs(image - AUGMENTATION[f"{branch}_image"]).max() <= 1e-5
    assert np.array_equal(batch["label"][0], AUGMENTATION[f"{branch}_label"])
    assert np.array_equal(batch["low_res_label"][0], AUGMENTATION[f"{branch}_low_res_label"])


def test_zoom_of_other_shapes():
    image = torch.from_numpy(AUGMENTATION["image"])
    wide = resize_images(image[:40], (128, 128)).numpy()
    assert np.abs(wide - AUGMENTATION["nonsquare_zoom_order3"]).max() <= 1e-5
    there_and_back = resize_images(resize_images(image[:40], (28, 28)), (64, 64)).numpy()
    assert np.abs(there_and_back - AUGMENTATION["down_then_up"]).max() <= 1e-5


def test_metrics():
    volumes, expected = read_npz("metrics.npz"), read_json("metrics.json")
    before = {key: value.copy() for key, value in volumes.items()}
    scores = score_volume(volumes["prediction"], volumes["label"], 9, expected["spacing"])
    assert all(np.array_equal(before[key], volumes[key]) for key in volumes)
    for index, score in enumerate(scores):
        reference = expected["dice_hd95_voxels"][index]
        assert (score.samed_dsc, score.samed_hd95) == pytest.approx(reference, abs=1e-6)
        for value, key in ((score.hd95_mm, "hd95_mm"), (score.assd_mm, "assd_mm")):
            if expected[key][index] is None:
                assert value is None
            else:
                assert value == pytest.approx(expected[key][index], abs=1e-6)
