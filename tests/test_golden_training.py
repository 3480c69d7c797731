"""Parity of the schedule and of eight training steps with the reference implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_rule import MODULES, golden_model, read_json

from trainer import freeze_unreached, learning_rate, make_optimizer, training_step
from training.losses import SegmentationLoss

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("key", read_json("lr_schedule.json"))
def test_learning_rate(key: str):
    expected = read_json("lr_schedule.json")[key]
    exponent, warmup = key.removeprefix("exp").split("_warmup")
    found = [
        learning_rate(
            step,
            base_lr=0.005,
            warmup=250 if warmup == "True" else 0,
            max_iterations=18600,
            exponent=float(exponent),
        )
        for step in expected["iterations"]
    ]
    assert found == pytest.approx(expected["lr_used_by_step"], rel=1e-9)


@pytest.mark.parametrize("variant", MODULES)
def test_eight_steps(variant: str):
    expected = read_json(f"train_{variant}.json")
    model = golden_model(224, variant, zero_up=True)
    trainable = sum(p.requires_grad for p in model.parameters())
    assert trainable == expected["trainable"]
    freeze_unreached(model)
    criterion = SegmentationLoss(9, dice_weight=0.8)
    optimizer = make_optimizer(model, adamw=True, base_lr=expected["base_lr"])
    for step, reference in enumerate(expected["steps"]):
        rng = np.random.default_rng([0, 100 + step])
        image = rng.random((expected["batch"], 1, 224, 224), dtype=np.float32)
        label = rng.integers(0, 9, (expected["batch"], 7, 7)).repeat(8, 1).repeat(8, 2)
        batch = {
            "image": torch.from_numpy(image).repeat(1, 3, 1, 1),
            "low_res_label": torch.from_numpy(label),
        }
        lr = learning_rate(
            step,
            base_lr=expected["base_lr"],
            warmup=expected["warmup_period"],
            max_iterations=expected["max_iterations"],
            exponent=0.9,
        )
        assert lr == pytest.approx(reference["lr_used"], rel=1e-9)
        terms, _ = training_step(model, batch, criterion, optimizer, lr)
        for name, value in terms.items():
            assert value.item() == pytest.approx(reference[name], rel=5e-5), (step, name)
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(grad is not None for grad in grads)
        assert len(grads) == expected["trainable_with_grad"]
        norm = torch.stack([grad.norm() for grad in grads]).norm().item()
        assert norm == pytest.approx(reference["grad_norm"], rel=1e-3), step
