"""Parity of the schedule and of eight training steps with the reference implementation."""

from __future__ import annotations

import pytest
import torch
from golden_rule import MODULES, golden_model, golden_steps, read_json

from trainer import learning_rate

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
    trainable = sum(p.requires_grad for p in golden_model(224, variant).parameters())
    assert trainable == read_json(f"train_{variant}.json")["trainable"]
    tolerances = {"lr_used": 1e-9, "grad_norm": 1e-3}
    count = 0
    for found, reference in golden_steps(variant, torch.device("cpu")):
        for name, value in found.items():
            assert value == pytest.approx(reference[name], rel=tolerances.get(name, 5e-5)), name
        count += 1
    assert count == 8
