"""What a training run writes while it goes: log.txt, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from common.errors import EXIT_BAD_INPUT, InputError, cannot_write
from datasets.colours import label_colours

METRICS = "metrics.jsonl"


class RunLog:
    """Scalars are kept on the device and fetched together, so that steps need not wait for them.

    Args:
        folder: the run's; None on all ranks but the first: the losses are watched, nothing written.
        every: steps between fetches.
        names_of: the names of the slices of a step, given its facts.
        skip: updates that may be left out because something watched is not finite.
        watched: the terms that have to be finite.
        position: of an earlier log in this folder, which is cut there and continued.
        step: the next one.
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
        if folder is not None:
            try:
                self.events = Events(folder / "log", step)
                self.metrics = (folder / METRICS).open("ab")
            except OSError as error:
                raise cannot_write(folder / METRICS, error) from None
            self.bytes = min(self.bytes, self.metrics.tell())  # should lines have been deleted
            self.metrics.truncate(self.bytes)

    def step(self, facts: dict[str, Any], terms: dict[str, torch.Tensor]) -> None:
        """Note one step: plain facts (step, epoch, lr) and scalars still on the device."""
        self.waiting.append((facts, terms))
        if len(self.waiting) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Fetch what is waiting with one copy and write it.

        Raises:
            InputError: more than `skip` updates had a loss or a gradient that is not finite.
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
                    *(facts["step"], what, value, self.skipped, self.skip, ", ".join(slices)),
                )
            return
        if self.folder is None:  # the first rank says it
            raise SystemExit(EXIT_BAD_INPUT)
        raise InputError(
            f"the {what} is {value} at step {facts['step']} (slices {', '.join(slices)}); look at "
            "these slices, lower --base_lr, lengthen --warmup_period or pass --clip_grad; "
            "--skip_nan N leaves out up to N such updates"
        )

    def end_epoch(self, epoch: int, step: int, seconds: float) -> float:
        """Write one line about the epoch; returns the mean loss of its steps."""
        self.flush()
        losses = self.epoch_losses
        loss = sum(losses) / len(losses) if losses else math.nan
        self.write(
            {"epoch": epoch, "steps": step, "mean_loss": loss if losses else None}
            | {"seconds": seconds}
        )
        self.epoch_losses = []
        return loss

    def write(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
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
        if self.folder is not None:
            with self._writing_events():
                for name, value in values.items():
                    self.events.scalar(name, value, step)

    def position(self) -> dict[str, Any]:
        """What another `RunLog` needs to go on from here, all lines before it being on disk."""
        self.flush()
        self._sync(to_disk=True)
        return {
            "bytes": self.bytes,
            "epoch_losses": self.epoch_losses,
            "last_loss": self.last_loss,
            "skipped": self.skipped,
        }

    def pictures(
        self, step: int, image: torch.Tensor, logits: torch.Tensor, label: torch.Tensor
    ) -> None:
        """Show one sample: image (3, S, S), logits (C, S/4, S/4) and label (S/4, S/4)."""
        if self.folder is None:
            return
        colours = label_colours(len(logits) - 1)
        small = F.interpolate(image[None].float(), label.shape, mode="area")[0]
        grey = small - small.min()
        grey = grey / grey.max().clamp_min(1e-6)  # a constant slice is black, not a division by 0
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
        """Write what is waiting and close the files."""
        try:
            self.flush()
        finally:
            if self.folder is not None:
                for file in (self.metrics, self.events):
                    with contextlib.suppress(OSError):  # of a full disk, which was reported
                        file.close()


class Events:
    """One file of events, written by this thread.

    tensorboardX's `SummaryWriter` hands events to a thread of its own; on a full disk that thread
    dies, and the training waits for it for ever. Here the disk's error is the caller's.

    Args:
        folder: made if it is missing.
        step: the next one; events from it on that an earlier file holds are hidden, since these
            steps are trained again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        if step:
            start = SessionLog(status=SessionLog.START)
            self.file.write_event(Event(wall_time=time.time(), step=step, session_log=start))

    def scalar(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""
        self._add(summary.scalar(name, value), step)

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:  # (H, W, 3) uint8
        """A picture of a step."""
        self._add(summary.image(name, picture, dataformats="HWC"), step)

    def _add(self, what: Summary, step: int) -> None:
        self.file.write_event(Event(wall_time=time.time(), step=step, summary=what))

    def flush(self) -> None:
        """Show what was written to a TensorBoard that watches."""
        self.file.flush()

    def close(self) -> None:
        """No event follows."""
        self.file.close()
