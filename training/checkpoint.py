"""The full state of a training run: what it needs to continue as if it had never stopped.

A state is one file, `states/step_0001234-<start of its SHA-256>.pth`. It gets its name when it is
complete. A file whose content does not match its name is ignored, and the state before it is used.
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

from common.errors import EXIT_BAD_INPUT, InputError, first_line
from common.files import sha256_of
from common.tensors import load_tensors, save_tensors
from common.writing import remove_partials
from config.settings import adapter_settings
from distributed.ranks import Ranks
from distributed.signals import EXIT_INTERRUPTED, Interruption
from training.run_log import RunLog
from training.trained import Trained

# What a rank wants to do after a step. The largest value of all ranks counts.
GO_ON, SAVE, STOP = range(3)
STATES = "states"
NAME = re.compile(r"step_(\d+)-([0-9a-f]{16})\.pth")


@dataclasses.dataclass
class Progress:
    """The position of a run, and the results of its validations (`validation.note_validation`)."""

    epoch: int = 0
    # Steps done in this epoch, and seconds they took.
    done: int = 0
    seconds: float = 0.0
    # Steps done in all epochs.
    step: int = 0
    best_score: float | None = None
    best_epoch: int | None = None
    # Validations since the best one.
    not_better: int = 0
    # For each class whose DSC is 0: the number of validations in a row.
    at_zero: dict[str, int] = dataclasses.field(default_factory=dict)

    def end_step(self, seconds: float) -> None:
        """Count a step that took so many seconds."""
        self.step += 1
        self.done += 1
        self.seconds += seconds

    def begin_epoch(self, epoch: int) -> None:
        """Move on to the start of an epoch."""
        self.epoch, self.done, self.seconds = epoch, 0, 0.0

    def out_of_patience(self, patience: int | None) -> bool:
        """Return whether early stopping ends the run."""
        return patience is not None and self.not_better >= patience


class Checkpoint:
    """Saves the states and adapters of a run. Every rank calls it; the first rank writes.

    Args:
        folder: the run folder.
        args: the flags of `train.py`.
        run: the position of the run, which the training loop moves on.
    """

    def __init__(
        self,
        folder: Path,
        args: argparse.Namespace,
        run: Progress,
        trained: Trained,
        log: RunLog,
        ranks: Ranks,
    ) -> None:
        self.folder, self.args, self.run, self.trained = folder, args, run, trained
        self.log, self.ranks = log, ranks
        self.saved_at = time.monotonic()

    def after_step(self, interruption: Interruption) -> None:
        """Save the state if it is time or if a signal asks for it; all ranks do the same.

        Raises:
            SystemExit: a signal asked to stop (`EXIT_INTERRUPTED`).
        """
        wish = STOP if interruption.asked else SAVE if self._due() else GO_ON
        agreed = self.ranks.agree(wish)
        if agreed != GO_ON:
            self.save()
        if agreed == STOP:
            self.stop()

    def stop(self) -> None:
        """End the program; the state was just saved."""
        logging.info("stopped after step %d; go on by --resume %s", self.run.step, self.folder)
        raise SystemExit(EXIT_INTERRUPTED)

    def save(self) -> None:
        """Write the full state, and delete the oldest ones beyond `--keep_states`.

        Raises:
            InputError: weights are NaN or infinite, or the disk is full; earlier states are intact.
        """
        state = self.capture()
        self.require_finite()
        if self.ranks.first:
            save_state(self.folder, state, keep=self.args.keep_states)
        # Wait for the first rank: a rank that ended now would end the first one while it writes.
        self.ranks.agree(SAVE)
        self.saved_at = time.monotonic()

    def capture(self) -> dict[str, Any]:
        """Return everything that training changes. The weights are the same on all ranks."""
        return {
            "progress": dataclasses.asdict(self.run),
            **self.trained.state(),
            "log": self.log.position(),
            "random": self.ranks.gather(random_state()),
        }

    def save_adapter(self, name: str) -> None:
        """Write the adapter file, of the average if there is one, and log its hash.

        It raises the same errors as `save`.
        """
        self.require_finite()
        if self.ranks.first:
            path = self.folder / name
            with self.trained.average.in_use():
                settings = adapter_settings(self.args)
                digest = self.trained.model.save_lora_parameters(path, settings=settings)
            self.log.write({"saved": name, "steps": self.run.step, "sha256": digest})
            logging.info("saved %s", path)

    def require_finite(self) -> None:
        """Refuse weights that are NaN or infinite: a NaN gradient can follow a finite loss.

        Raises:
            InputError: a weight is not finite; on the other ranks the program just ends.
        """
        weights = self.trained.values()
        finite = torch.stack([value.isfinite().all() for value in weights.values()]).tolist()
        spoilt = [name for name, is_finite in zip(weights, finite, strict=True) if not is_finite]
        if spoilt and not self.ranks.first:
            # All ranks have the same weights, so the first rank reports it.
            raise SystemExit(EXIT_BAD_INPUT)
        if spoilt:
            raise InputError(
                f"{len(spoilt)} weights are NaN or infinite after step {self.run.step - 1}, first "
                f"{spoilt[0].replace('sam.', '', 1)}; lower --base_lr, lengthen --warmup_period or "
                "pass --clip_grad, and go on from the state before by --resume"
            )

    def _due(self) -> bool:
        """Return whether it is time to save; the clock of the first rank decides."""
        if not self.ranks.first:
            return False
        every = self.args.save_steps
        late = time.monotonic() - self.saved_at >= 60 * self.args.save_minutes
        return late or bool(every and self.run.step % every == 0)


def restore(state: dict[str, Any], trained: Trained, ranks: Ranks) -> Progress:
    """Put a state back into a run of the same settings, and return its position.

    Raises:
        InputError: the state belongs to another network.
    """
    try:
        trained.restore(state)
        if ranks.rank < len(state["random"]):
            set_random_state(state["random"][ranks.rank])
        return Progress(**state["progress"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"the saved state belongs to another network or program ({first_line(error)}); start a "
            "new run without --resume"
        ) from None


def save_state(folder: Path, state: dict[str, Any], *, keep: int) -> Path:
    """Write a state, and delete all but the states of the newest `keep` steps.

    Raises:
        InputError: the disk is full or read-only; earlier states are untouched.
    """
    name = f"step_{state['progress']['step']:07d}.pth"
    path, _ = save_tensors(state, folder / STATES / name, hash_in_name=True)
    kept = {_step(path): path}
    for older in saved_states(folder):
        if len(kept) < keep:
            kept.setdefault(_step(older), older)
        if older not in kept.values():
            # A state that cannot be deleted does no harm.
            with contextlib.suppress(OSError):
                older.unlink()
    return path


def saved_states(folder: Path) -> list[Path]:
    """Return the states of a run, the newest first: the number of steps tells, not the time.

    Raises:
        InputError: the folder of the states cannot be read.
    """
    found = [path for path in _state_files(folder) if NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def damaged_states(folder: Path) -> list[Path]:
    """Return the damaged states that were set aside."""
    return [path for path in _state_files(folder) if path.suffix == ".damaged"]


def _state_files(folder: Path) -> list[Path]:
    try:
        return sorted((folder / STATES).iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(
            f"the states in {folder / STATES} cannot be read ({error.strerror}); give the right to "
            "read them, or put the folder back"
        ) from None


def newest_state(folder: Path) -> dict[str, Any] | None:
    """Read the newest state that is intact; None if the run stopped before its first state.

    Raises:
        InputError: there are states, but all of them are damaged, or one cannot be read.
    """
    for left in (folder, folder / STATES):
        remove_partials(left)
    paths = saved_states(folder)
    for path in paths:
        try:
            intact = sha256_of(path).startswith(NAME.fullmatch(path.name)[2])
        except OSError as error:
            raise InputError(
                f"the state {path} cannot be read ({error.strerror}); mend that and start again"
            ) from None
        if intact:
            return load_tensors(path)
        logging.warning("%s is damaged; the state before it is used", path)
        path.rename(path.with_suffix(".damaged"))
    if paths or damaged_states(folder):
        raise InputError(
            f"every saved state in {folder / STATES} is damaged; start a new run, from the newest "
            f"adapter by --lora_ckpt if there is one, or begin this one anew by --resume {folder} "
            "--restart (its files are then kept in a folder before-N/)"
        )
    return None


def random_state() -> dict[str, Any]:
    """Return the states of all random generators of this process, in plain containers."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states that `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _step(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])
