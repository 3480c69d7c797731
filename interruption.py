"""Stopping when asked: a signal is noted, the step is finished, the state saved."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

# Of a run that saved its state and can go on by --resume; sysexits' EX_TEMPFAIL: try again.
EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SLURM sends any of them


class Interruption:
    """While it is entered, the first signal is noted in `asked`; a second ends the process."""

    def __init__(self) -> None:
        self.asked = False
        self.owner = os.getpid()
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python's rule for handlers
            self.before = {one: signal.signal(one, self._note) for one in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for one, handler in self.before.items():
            signal.signal(one, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.owner:  # a data loader's worker: its owner decides
            return
        self.asked = True
        for one in SIGNALS:
            signal.signal(one, signal.SIG_DFL)
        name = signal.Signals(number).name
        os.write(2, f"{name}: finishing the step and saving; again to end at once\n".encode())


def ignore_in_worker(worker: int) -> None:
    """As `worker_init_fn`: a signal to the whole process group must not lose a worker's batch."""
    del worker
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
