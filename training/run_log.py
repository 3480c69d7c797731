"""The logs of a training run: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from common.errors import EXIT_BAD_INPUT, InputError, cannot_write, warn
from common.writing import flush_folder
from datasets.colours import label_colours

if TYPE_CHECKING:
    from training.events import Events

METRICS = "metrics.jsonl"


class RunLog:
    """Writes the scalars of a run, and watches that they are finite.

    Scalars stay on the device and are fetched together, so that a step does not wait for them.

    Args:
        folder: the run folder; None on all ranks but the first, which watch and write nothing.
        every: steps between fetches.
        names_of: returns the names of the slices of a step, from the facts of the step.
        skip: number of updates that may be skipped because a watched term is not finite.
        watched: the terms that must be finite.
        position: where an earlier log in this folder is cut and continued.
        step: number of the next step.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        every: int,
        names_of: Callable[[dict[str, Any]], Sequence[str]] = lambda facts: (),
        skip: int = 0,
        watched: Sequence[str] = ("loss", "grad_norm"),
        position: dict[str, Any] | None = None,
        step: int = 0,
    ) -> None:
        position = position or {"bytes": 0, "epoch_losses": [], "last_loss": math.nan, "skipped": 0}
        self.folder = folder
        self.every = every
        self.names_of = names_of
        self.skip = skip
        self.watched = watched
        self.waiting: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = []
        self.epoch_losses: list[float] = list(position["epoch_losses"])
        self.last_loss: float = position["last_loss"]
        self.skipped: int = position["skipped"]
        self.bytes: int = position["bytes"]
        self.events: Events | None = None
        if folder is not None:
            try:
                self.events = _open_events(folder / "log", step)
                self.metrics = (folder / METRICS).open("ab")
                flush_folder(folder)
            except OSError as error:
                raise cannot_write(folder / METRICS, error) from None
            self._cut()

    def _cut(self) -> None:
        """Cut the file where the state was saved, and at the end of a line if it was edited."""
        path = self.folder / METRICS
        with path.open("rb") as file:
            kept = file.read(self.bytes)
        if len(kept) < self.bytes or kept[-1:] not in (b"", b"\n"):
            logging.warning(
                "%s was shortened or edited since the state was saved; it goes on after its last "
                "whole line",
                path,
            )
        self.bytes = kept.rfind(b"\n") + 1
        self.metrics.truncate(self.bytes)

    def step(self, facts: dict[str, Any], terms: dict[str, torch.Tensor]) -> None:
        """Keep the plain facts of a step (step, epoch, lr) and its scalars on the device."""
        self.waiting.append((facts, terms))
        if len(self.waiting) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Fetch the waiting scalars with one copy and write them.

        Raises:
            InputError: more than `skip` updates had a watched term that is not finite.
        """
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        names = list(waiting[0][1])
        on_device = [terms[name] for _, terms in waiting for name in names]
        values = torch.stack(on_device).view(-1, len(names)).tolist()
        for (facts, _), row in zip(waiting, values, strict=True):
            scalars = dict(zip(names, row, strict=True))
            finite = {name: v if math.isfinite(v) else None for name, v in scalars.items()}
            spoilt = next((name for name in self.watched if finite.get(name, 0) is None), None)
            if spoilt is not None:
                self._not_finite(facts, spoilt, scalars[spoilt])
                continue
            self.epoch_losses.append(scalars["loss"])
            self.last_loss = scalars["loss"]
            self.write(facts | finite)
            shown = {f"info/{name}": v for name, v in finite.items() if v is not None}
            self.scalars(shown | {"info/lr": facts["lr"]}, facts["step"])
        self._sync()

    def _sync(self, *, to_disk: bool = False) -> None:
        if self.folder is None:
            return
        try:
            if self.events is not None:
                self.events.flush()
            self.metrics.flush()
            if to_disk:
                os.fsync(self.metrics.fileno())
        except OSError as error:
            raise cannot_write(self.folder / METRICS, error) from None

    def _not_finite(self, facts: dict[str, Any], name: str, value: float) -> None:
        self.skipped += 1
        slices = list(self.names_of(facts))
        what = {"grad_norm": "gradient's norm"}.get(name, name)
        if self.skipped <= self.skip:
            self.write(facts | {"loss": None, "skipped": slices})
            if self.folder is not None:
                logging.warning(
                    "step %d: the %s is %s, the update was left out (%d of at most %d); slices %s",
                    facts["step"],
                    what,
                    value,
                    self.skipped,
                    self.skip,
                    ", ".join(slices),
                )
            return
        if self.folder is None:  # The first rank reports it.
            raise SystemExit(EXIT_BAD_INPUT)
        raise InputError(
            f"the {what} is {value} at step {facts['step']} (slices {', '.join(slices)}); look at "
            "these slices, lower --base_lr, lengthen --warmup_period or pass --clip_grad; "
            "--skip_nan N leaves out up to N such updates"
        )

    def end_epoch(
        self, epoch: int, step: int, seconds: float, peak_memory: int | None = None
    ) -> float:
        """Write a line about the epoch, and return the mean loss of its steps.

        Args:
            step: number of the next step, over all epochs.
            seconds: that the steps of this epoch took.
            peak_memory: bytes, see `training.memory.peak_memory`.
        """
        self.flush()
        losses = self.epoch_losses
        loss = sum(losses) / len(losses) if losses else math.nan
        self.write(
            {"epoch": epoch, "steps": step, "mean_loss": loss if losses else None}
            | {"seconds": seconds, "peak_memory": peak_memory}
        )
        self.epoch_losses = []
        return loss

    def write(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        line = (json.dumps(record) + "\n").encode()
        self.bytes += len(line)
        if self.folder is None:
            return
        try:
            self.metrics.write(line)
        except OSError as error:
            raise cannot_write(self.folder / METRICS, error) from None

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Show numbers in TensorBoard."""
        if self.events is not None:
            with self._writing_events():
                for name, value in values.items():
                    self.events.scalar(name, value, step)

    def position(self) -> dict[str, Any]:
        """Flush all lines to disk, and return what a later `RunLog` needs to continue from here.

        Raises:
            InputError: the file was deleted, or another process writes into it.
        """
        self.flush()
        self._sync(to_disk=True)
        self._require_own_file()
        return {
            "bytes": self.bytes,
            "epoch_losses": self.epoch_losses,
            "last_loss": self.last_loss,
            "skipped": self.skipped,
        }

    def _require_own_file(self) -> None:
        """Notice that the run folder was deleted, or that a second run writes into it.

        The lock of the folder does not tell: it is deleted with the folder, and some network file
        systems cannot lock.
        """
        if self.folder is None:
            return
        path = self.folder / METRICS
        try:
            there = path.stat()
        except FileNotFoundError:
            there = None
        except OSError as error:
            raise cannot_write(path, error) from None
        if there is None or not os.path.samestat(there, os.fstat(self.metrics.fileno())):
            raise InputError(
                f"{path} was deleted or replaced while the run wrote it, so the run stopped; if "
                f"the states beside it are still there, go on by --resume {self.folder}"
            )
        if there.st_size > self.bytes:
            raise InputError(
                f"another process writes into {self.folder}, so this one stopped; end the other "
                f"one and go on by --resume {self.folder}"
            )
        self.bytes = there.st_size  # less than before if someone shortened the file

    def pictures(
        self,
        step: int,
        image: torch.Tensor,
        logits: torch.Tensor,
        label: torch.Tensor,
        class_names: Sequence[str],
    ) -> None:
        """Show a sample: image (3, S, S), logits (C, s, s) and label (s, s)."""
        if self.events is None:
            return
        colours = label_colours(class_names)
        small = F.interpolate(image[None].float(), label.shape, mode="area")[0]
        grey = small - small.min()
        # The limit keeps a constant slice from a division by 0.
        grey = grey / grey.max().clamp_min(1e-6)
        pictures = {
            "Image": (grey.cpu().numpy().transpose(1, 2, 0) * 255).astype(np.uint8),
            "Prediction": colours[logits.argmax(dim=0).cpu().numpy()],
            "GroundTruth": colours[label.cpu().numpy()],
        }
        with self._writing_events():
            for name, picture in pictures.items():  # (H, W, 3) uint8
                self.events.picture(f"train/{name}", picture, step)

    @contextlib.contextmanager
    def _writing_events(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self.folder / "log", error) from None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        """Write the waiting scalars and close the files."""
        try:
            self.flush()
        finally:
            if self.folder is not None:
                for file in filter(None, (self.metrics, self.events)):
                    # A full disk was reported before.
                    with contextlib.suppress(OSError):
                        file.close()


def _open_events(folder: Path, step: int) -> Events | None:
    """Open the events of a run; None, with a warning, where tensorboardX is not installed."""
    try:
        from training.events import Events
    except ModuleNotFoundError as error:
        warn(
            f"{error.name} is not installed, so no files for TensorBoard are written; {METRICS} "
            "has the same numbers"
        )
        return None
    return Events(folder, step)
