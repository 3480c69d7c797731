"""Scalars and pictures for TensorBoard."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


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
