"""The TensorBoard files of a run, by tensorboardX."""

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
    """A TensorBoard file that is written by the calling thread.

    tensorboardX's `SummaryWriter` passes events to a thread, which dies on a full disk; training
    then waits for it forever. Here the caller gets the error.

    Args:
        folder: made if it does not exist.
        step: number of the next step. TensorBoard hides the events of earlier files from this step
            on, because these steps are trained again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        if step:
            start = SessionLog(status=SessionLog.START)
            self.file.write_event(Event(wall_time=time.time(), step=step, session_log=start))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve."""
        self._add(summary.scalar(name, value), step)

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:  # (H, W, 3) uint8
        """Add a picture."""
        self._add(summary.image(name, picture, dataformats="HWC"), step)

    def _add(self, what: Summary, step: int) -> None:
        self.file.write_event(Event(wall_time=time.time(), step=step, summary=what))

    def flush(self) -> None:
        """Make the events visible to a running TensorBoard."""
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()
