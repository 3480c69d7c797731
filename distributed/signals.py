"""Stopping on request: a signal is noted, the step is finished, and the state is saved."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

# The run saved its state and can continue with --resume (EX_TEMPFAIL of sysexits: try again).
EXIT_INTERRUPTED = 75
# SLURM sends one of the first three; a closed terminal sends the last.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Seconds in which two signals count as one: a scheduler and torchrun may both pass a request on.
ONE_REQUEST = 2.0
# Number of the request to Linux for a signal at the parent's end.
PR_SET_PDEATHSIG = 1


def heeded_signals() -> list[signal.Signals]:
    """Return the signals that ask to stop. Under nohup, a closed terminal does not."""
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if not (nohup and number is signal.SIGHUP)]


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let the first signal raise `KeyboardInterrupt(number)`, so that every program cleans up.

    Later signals are ignored, because cleaning up takes a moment. `exit_on_bad_input` around this
    context turns the exception into one line and an exit code.
    """
    # Python allows signal handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = heeded_signals()

    def stop(number: int, frame: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number))

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interruption:
    """A context in which the first signal sets `asked`, and a later second one ends the process.

    Args:
        with_parent: the end of the parent process asks to stop as well. The parent is torchrun's
            agent, which cannot pass a signal on after it was killed.
    """

    def __init__(self, *, with_parent: bool = False) -> None:
        self.noted_at: float | None = None
        self.owner = os.getpid()
        self.parent = os.getppid() if with_parent else None
        self.before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal or the end of the parent asked to stop."""
        lost = self.parent is not None and os.getppid() != self.parent
        return lost or self.noted_at is not None

    def __enter__(self) -> Interruption:
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in heeded_signals()}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is not None:
            end_workers()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.owner:  # A loader process leaves the decision to its parent.
            return
        if self.noted_at is None:
            self.noted_at = time.monotonic()
            name = signal.Signals(number).name
            said = f"{name}: finishing the step and saving; again to end at once\n"
            with contextlib.suppress(OSError):  # The terminal may be closed.
                os.write(2, said.encode())
        elif time.monotonic() - self.noted_at > ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def end_with_parent(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Get a signal when the parent process ends, however it ended; at once if it has ended.

    Call it in a process that the main thread of its parent started: Linux takes the end of that
    thread for the end of the parent.

    Args:
        parent: the number of the process that started this one.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def ignore_in_worker(worker: int) -> None:
    """Ignore signals in a loader process, as its `worker_init_fn`, and end with the parent.

    A signal to the whole process group would otherwise lose the batch that it prepares.
    """
    del worker
    end_with_parent(multiprocessing.parent_process().pid, signal.SIGKILL)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Kill the loader processes of a failed run, because they ignore signals."""
    workers = multiprocessing.active_children()
    if workers:
        # PyTorch's handler would report their end as an error.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
        worker.join()
