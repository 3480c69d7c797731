"""The full state of a training run: what it takes to go on as if it had never stopped.

A state is one file, `states/step_0001234-<start of its SHA-256>.pth`. It appears under its name
only when it is whole, and a file that does not match its name is passed over for the one before.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.errors import EXIT_BAD_INPUT, InputError
from common.files import load_tensors, remove_partials, save_tensors, sha256_of
from config.settings import adapter_settings
from distributed.ranks import SAVED, Ranks, note_for_launcher
from distributed.signals import EXIT_INTERRUPTED, Interruption
from lora import LoRAModel
from training.run_log import RunLog

GO_ON, SAVE, STOP = range(3)  # what a rank may wish after a step; the largest wish counts
STATES = "states"
NAME = re.compile(r"step_(\d+)-([0-9a-f]{16})\.pth")


@dataclasses.dataclass
class Progress:
    """Where a run is, and what its validations have found; see `validation.note_validation`."""

    epoch: int = 0  # the one in progress
    done: int = 0  # its steps so far
    step: int = 0  # all steps so far
    seconds: float = 0.0  # that the epoch in progress took so far
    best_score: float | None = None
    best_epoch: int | None = None
    not_better: int = 0  # validations since the best
    at_zero: dict[str, int] = dataclasses.field(default_factory=dict)  # validations in a row

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether early stopping ends the run."""
        return patience is not None and self.not_better >= patience


class Checkpoint:
    """Saves a run's state and adapters. Every rank calls it; the first one writes.

    Args:
        folder: the run's.
        args: the flags of `train.py`.
        run: the live position, which the training loop moves.
    """

    def __init__(
        self,
        folder: Path,
        args: argparse.Namespace,
        run: Progress,
        model: LoRAModel,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        log: RunLog,
        ranks: Ranks,
    ) -> None:
        self.folder, self.args, self.run = folder, args, run
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.log, self.ranks = log, ranks
        self.saved_at = time.monotonic()

    def after_step(self, interruption: Interruption) -> None:
        """Save if it is time, or if a signal asks for it; all ranks agree on which.

        Raises:
            SystemExit: after a signal, with `EXIT_INTERRUPTED`.
        """
        wish = self.ranks.agree(STOP if interruption.asked else SAVE if self._due() else GO_ON)
        if wish != GO_ON:
            self.save()
        if wish == STOP:
            self.stop()

    def stop(self) -> None:
        """End with the state that was just saved."""
        note_for_launcher(SAVED)
        logging.info("stopped after step %d; go on by --resume %s", self.run.step, self.folder)
        raise SystemExit(EXIT_INTERRUPTED)

    def save(self) -> None:
        """Write the full state; older ones beyond `--keep_states` are deleted.

        Raises:
            InputError: weights are NaN or infinite, or the disk is full; the states before stay.
        """
        state = self.capture()
        self.require_finite()
        if self.ranks.first:
            save_state(self.folder, state, keep=self.args.keep_states)
        self.ranks.agree(SAVE)  # a rank that ended before the first has written would end it
        self.saved_at = time.monotonic()

    def capture(self) -> dict[str, Any]:
        """Everything that training changes; weights are the same on all ranks."""
        return {
            "progress": dataclasses.asdict(self.run),
            "model": {name: value.detach() for name, value in _changing(self.model).items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "log": self.log.position(),
            "random": self.ranks.gather(random_state()),
        }

    def save_adapter(self, name: str) -> None:
        """Write the adapter file, and its hash into the log; raises as `save` does."""
        self.require_finite()
        if self.ranks.first:
            path = self.folder / name
            digest = self.model.save_lora_parameters(path, settings=adapter_settings(self.args))
            self.log.write({"saved": name, "steps": self.run.step, "sha256": digest})
            logging.info("saved %s", path)

    def require_finite(self) -> None:
        """Refuse to keep weights that a gradient of NaN has spoilt while the loss was finite."""
        weights = _changing(self.model)
        finite = torch.stack([value.isfinite().all() for value in weights.values()]).tolist()
        spoilt = [name for name, good in zip(weights, finite, strict=True) if not good]
        if spoilt and not self.ranks.first:  # the first rank, whose weights are the same, says it
            raise SystemExit(EXIT_BAD_INPUT)
        if spoilt:
            raise InputError(
                f"{len(spoilt)} weights are NaN or infinite after step {self.run.step - 1}, first "
                f"{spoilt[0].removeprefix('sam.')}; lower --base_lr, lengthen --warmup_period or "
                "pass --clip_grad, and go on from the state before by --resume"
            )

    def _due(self) -> bool:
        """Whether the first rank finds that it is time; the clocks of others do not count."""
        if not self.ranks.first:
            return False
        every = self.args.save_steps
        late = time.monotonic() - self.saved_at >= 60 * self.args.save_minutes
        return late or bool(every and self.run.step % every == 0)


def restore(
    state: dict[str, Any],
    model: LoRAModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    ranks: Ranks,
) -> Progress:
    """Put a state back into a run that was built with the same settings; returns where it is."""
    own = _changing(model)
    if own.keys() != state["model"].keys():
        raise InputError("the saved state is of another network; start a new run without --resume")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state["model"][name])
    optimizer.load_state_dict(state["optimizer"])
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    if ranks.rank < len(state["random"]):
        set_random_state(state["random"][ranks.rank])
    return Progress(**state["progress"])


def save_state(folder: Path, state: dict[str, Any], *, keep: int) -> Path:
    """Write a state and delete all but those of the newest `keep` steps.

    Raises:
        InputError: the disk is full or read-only; the states before are untouched.
    """
    name = f"step_{state['progress']['step']:07d}.pth"
    path, _ = save_tensors(state, folder / STATES / name, hash_in_name=True)
    kept = {_step(path): path}
    for other in saved_states(folder):
        if len(kept) < keep:
            kept.setdefault(_step(other), other)
        if other not in kept.values():
            with contextlib.suppress(OSError):  # one too many does no harm
                other.unlink()
    return path


def saved_states(folder: Path) -> list[Path]:
    """The states of a run, the newest first."""
    found = [path for path in (folder / STATES).glob("step_*.pth") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True)


def newest_state(folder: Path) -> dict[str, Any] | None:
    """The newest state that is whole; None if the run was stopped before its first.

    Raises:
        InputError: there are states and all are damaged.
    """
    remove_partials(folder / STATES)
    paths = saved_states(folder)
    for path in paths:
        if sha256_of(path).startswith(NAME.fullmatch(path.name)[2]):
            return load_tensors(path)
        logging.warning("%s is damaged; the state before it is used", path)
        path.rename(path.with_suffix(".damaged"))
    if paths or list((folder / STATES).glob("step_*.damaged")):
        raise InputError(
            f"every saved state in {folder / STATES} is damaged; start a new run, from the newest "
            "adapter by --lora_ckpt if there is one"
        )
    return None


def random_state() -> dict[str, Any]:
    """The state of every generator of this process, in plain containers."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo whatever was drawn since `random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _changing(model: LoRAModel) -> dict[str, torch.Tensor]:
    """What trains, and what the adapter file holds; the rest comes from the base weights."""
    return {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if (isinstance(value, nn.Parameter) and value.requires_grad)
        or name.removeprefix("sam.") in model.saved
    }


def _step(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])
