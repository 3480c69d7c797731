"""Stopping when asked: a signal is noted, the step is finished, the state saved."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

# Of a run that saved its state and can go on by --resume; sysexits' EX_TEMPFAIL: try again.
EXIT_INTERRUPTED = 75
# SLURM sends any of the first three, a closed terminal the last
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ONE_REQUEST = 2.0  # seconds: a scheduler and torchrun's agent may both pass the same request on


def heeded_signals() -> list[signal.Signals]:
    """The signals that ask to stop; a closed terminal does not where nohup keeps it away."""
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [one for one in SIGNALS if not (nohup and one is signal.SIGHUP)]


class Interruption:
    """While it is entered, the first signal is noted in `asked`; a later second ends the process.

    Args:
        with_parent: the end of the parent process asks to stop as well: of torchrun's agent, which
            was killed and cannot hand a signal on.
    """

    def __init__(self, *, with_parent: bool = False) -> None:
        self.noted_at: float | None = None
        self.owner = os.getpid()
        self.parent = os.getppid() if with_parent else None
        self.before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether to stop."""
        lost = self.parent is not None and os.getppid() != self.parent
        return lost or self.noted_at is not None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python's rule for handlers
            self.before = {one: signal.signal(one, self._note) for one in heeded_signals()}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for one, handler in self.before.items():
            signal.signal(one, handler)
        if kind is not None:
            end_workers()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.owner:  # a data loader's worker: its owner decides
            return
        if self.noted_at is None:
            self.noted_at = time.monotonic()
            name = signal.Signals(number).name
            os.write(2, f"{name}: finishing the step and saving; again to end at once\n".encode())
        elif time.monotonic() - self.noted_at > ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def ignore_in_worker(worker: int) -> None:
    """As `worker_init_fn`: a signal to the whole process group must not lose a worker's batch."""
    del worker
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)


def end_workers() -> None:
    """End what a failed run leaves of its loader workers, which ignore the signal that would."""
    workers = multiprocessing.active_children()
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would take it for a fault
    for worker in workers:
        worker.kill()
        worker.join()
