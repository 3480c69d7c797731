"""Between logging steps the training loop never waits for the device."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_FLAGS, write_slices
from torch.utils._python_dispatch import TorchDispatchMode

import train
from training.checkpoint import Checkpoint
from training.run_log import RunLog

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parent.parent
# Tensor methods that copy a value to the host, and operators whose result has a size that depends
# on values. The host has to wait for both.
TO_HOST = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
SIZED_BY_VALUES = ("nonzero", "masked_select", "unique", "is_nonzero", "equal", "bincount")


class Watch(TorchDispatchMode):
    """Records what would wait for a device outside of `allowed` sections."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = 0
        self.seen: list[str] = []

    def note(self, what: str) -> None:
        if not self.allowed:
            self.seen.append(what)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(word in name for word in SIZED_BY_VALUES):
            self.note(name)
        return func(*args, **(kwargs or {}))


def watched(watch: Watch, name: str, original):
    """Return the Tensor method `name`, which is recorded when a file of this project calls it.

    Calls by PyTorch do not count: its optimisers read step counters that are on the host.
    """

    def method(self, *args, **kwargs):
        caller = Path(sys._getframe(1).f_code.co_filename)
        if caller.is_relative_to(REPOSITORY) and "site-packages" not in caller.parts:
            watch.note(f"{name} in {caller.name}")
        return original(self, *args, **kwargs)

    return method


def allowed(watch: Watch, original):
    """Return a method that may wait for the device."""

    def method(*args, **kwargs):
        watch.allowed += 1
        try:
            return original(*args, **kwargs)
        finally:
            watch.allowed -= 1

    return method


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--use_amp"],
        ["--clip_grad", "0.5"],
        "--lora_dropout 0.1 --lora_kind dora".split(),
        ["--prompt_prob", "0.7"],
    ],
)
def test_the_training_loop_waits_only_to_log(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    watch, logged = Watch(), []
    for name in TO_HOST:
        monkeypatch.setattr(torch.Tensor, name, watched(watch, name, getattr(torch.Tensor, name)))
    flush = allowed(watch, RunLog.flush)
    monkeypatch.setattr(RunLog, "flush", lambda log: logged.append(len(log.waiting)) or flush(log))
    monkeypatch.setattr(RunLog, "pictures", allowed(watch, RunLog.pictures))
    require = allowed(watch, Checkpoint.require_finite)  # called before weights are saved
    monkeypatch.setattr(Checkpoint, "require_finite", require)

    steps = train.trainer_synapse

    def train_watched(*args, **kwargs):
        with watch:
            return steps(*args, **kwargs)

    # Saving an adapter at the end may wait, so it is left out.
    monkeypatch.setattr(train, "trainer_synapse", train_watched)
    monkeypatch.setattr("lora.LoRAModel.save_lora_parameters", lambda *args, **kwargs: None)
    data = write_slices(tmp_path / "data", count=8)
    common = ["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS]
    short = ["--batch_size", "2", "--max_epochs", "1", "--stop_epoch", "1", "--log_every", "2"]
    train.main([*common, *short, "--AdamW", "--warmup", *flags])
    assert watch.seen == []
    assert logged[:3] == [0, 2, 2]  # the state before the first step, and four steps in two groups


def test_the_watch_sees_what_waits(monkeypatch: pytest.MonkeyPatch):
    watch = Watch()
    monkeypatch.setattr(torch.Tensor, "item", watched(watch, "item", torch.Tensor.item))
    with watch:
        torch.ones(2).sum().item()
        torch.ones(2).nonzero()
        allowed(watch, lambda: torch.ones(1).item())()
    assert watch.seen == ["item in test_no_sync.py", "nonzero"]
