"""The decays of the learning rate and the optimisers, against closed forms and PyTorch's own."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY_FLAGS, tiny_model

import train
from common.errors import InputError
from config.flags import train_parser
from config.settings import complete
from trainer import DECAYS, learning_rate, learning_rate_of, make_optimizer
from training.optimizers import OPTIMIZERS

BASE, STEPS = 0.005, 1000


def rates(schedule: str, warmup: int = 0, steps: int = STEPS, exponent: float = 0.9) -> list[float]:
    return [
        learning_rate(
            step,
            base_lr=BASE,
            warmup=warmup,
            max_iterations=steps,
            exponent=exponent,
            schedule=schedule,
        )
        for step in range(steps + 1)
    ]


def test_the_choices_are_the_rows():
    flags = train_parser().flags
    assert flags["schedule"].choices == tuple(DECAYS)
    assert flags["optimizer"].choices == tuple(OPTIMIZERS)


def test_the_published_schedule_has_the_bits_it_had():
    for warmup in (0, 250):
        expected = []
        for step in range(STEPS + 1):
            previous = max(step - 1, 0)
            rising = BASE * (previous + 1) / (warmup or 1)
            falling = BASE * (1 - (previous - warmup) / STEPS) ** 0.9
            expected.append(rising if previous < warmup else falling)
        assert rates("poly", warmup) == expected


@pytest.mark.parametrize("warmup", [0, 1, 7, 250])
def test_cosine_is_the_closed_form(warmup: int):
    found = rates("cosine", warmup)
    for step, rate in enumerate(found):
        done = (max(step - 1, 0) - warmup) / STEPS
        if done >= 0:
            assert rate == pytest.approx(BASE * math.cos(math.pi / 2 * done) ** 2, abs=1e-15)
    assert max(found) == BASE and min(found) >= 0
    # As in the published schedule, a step runs with the rate of the step before.
    assert found[0] == found[1] == (BASE / warmup if warmup else BASE)
    decay = found[warmup + 1 :]
    assert decay == sorted(decay, reverse=True)


def test_cosine_ends_at_0_and_not_before():
    assert DECAYS["cosine"](1.0, 0.9) == 1 and DECAYS["cosine"](0.0, 0.9) == 0
    assert rates("cosine")[-1] > 0  # the last step of training is the one before
    for steps in (1, 2, 3, 5):
        assert all(0 <= rate <= BASE for rate in rates("cosine", steps=steps))


def test_cosine_is_pytorchs():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], BASE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    theirs = []
    for _ in range(STEPS):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates("cosine")[1:] == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 7])
def test_constant_stays(warmup: int):
    found = rates("constant", warmup)
    assert set(found[warmup + 1 :]) == {BASE}
    assert found[: warmup + 1] == rates("poly", warmup)[: warmup + 1]


@pytest.mark.parametrize("schedule", DECAYS)
def test_the_flags_reach_the_rate(schedule: str):
    args = argparse.Namespace(root_path="x", num_classes=2, schedule=schedule, base_lr=BASE)
    args.warmup, args.warmup_period = True, 7
    args = complete(args)
    found = [learning_rate_of(args, step, STEPS) for step in range(STEPS + 1)]
    assert found == rates(schedule, 7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_pytorchs(name: str):
    other = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    model, twin = tiny_model(), tiny_model()
    twin.load_state_dict(model.state_dict())
    options = {"sgd": {"momentum": 0.9, "weight_decay": 1e-4}, "adamw": {"weight_decay": 0.1}}
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    pairs = (
        (model, make_optimizer(model, name, 0.01)),
        (twin, other(trained, lr=0.01, **options[name])),
    )
    for network, optimizer in pairs:
        torch.manual_seed(1)
        for _ in range(3):
            for parameter in network.parameters():
                parameter.grad = None
                if parameter.requires_grad:
                    parameter.grad = torch.randn_like(parameter)
            optimizer.step()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)
    kept = [v for v in pairs[0][1].state[trained_of(model)].values() if v is not None and v.ndim]
    assert len(kept) == OPTIMIZERS[name].kept


def trained_of(model: torch.nn.Module) -> torch.nn.Parameter:
    """Return a matrix that trains."""
    return next(p for p in model.parameters() if p.requires_grad and p.ndim == 2)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_an_exponent_without_effect_is_refused(schedule: str, tmp_path: Path):
    argv = ["--root_path", str(tmp_path), *TINY_FLAGS, "--schedule", schedule, "--lr_exp", "7"]
    with pytest.raises(InputError, match=r"--lr_exp 7\.0 has no effect with --schedule"):
        train.main(argv)
