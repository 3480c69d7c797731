"""Work in several processes, none of which outlives this one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from distributed.signals import SIGNALS, end_with_parent

# Seconds that a process may take to drop its work before it is killed.
GRACE = 5.0


@dataclass(frozen=True)
class Killed:
    """Stands for the result of a task whose process ended before it had one."""

    code: int  # exit code as in `multiprocessing`; below 0: minus the signal's number

    def __str__(self) -> str:
        if self.code >= 0:
            return f"ended with code {self.code}"
        try:
            return f"was killed by {signal.Signals(-self.code).name}"
        except ValueError:
            return f"was killed by signal {-self.code}"


@dataclass(frozen=True)
class _Failure:
    traceback: str


def in_processes(
    function: Callable[[Any], Any], tasks: Sequence[Any], workers: int
) -> Iterator[tuple[int, Any]]:
    """Yield the index of each task with its result, as they finish.

    A task whose process was killed gives `Killed`, and another process does the remaining tasks. On
    leaving early, e.g. by Ctrl-C, the processes drop their tasks and end; wrap the call by
    `contextlib.closing` so that this happens at once.

    Args:
        function: of one task; it must be importable, because the processes are spawned. (A forked
            process would inherit locked threads of torch.) If it uses torch, its module imports it.

    Raises:
        RuntimeError: the function raised an error, whose traceback is the message.
    """
    waiting = deque(enumerate(tasks))
    crew: list[BaseProcess] = []
    busy: dict[Connection, tuple[BaseProcess, int]] = {}

    def give(process: BaseProcess, connection: Connection) -> None:
        index, task = waiting.popleft()
        busy[connection] = process, index
        with contextlib.suppress(OSError):  # It is dead already, which `recv` finds out.
            connection.send(task)

    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                give(*_start(function, crew))
            for connection in wait(list(busy)):
                process, index = busy.pop(connection)
                try:
                    result = connection.recv()
                except (EOFError, OSError):
                    process.join()
                    result = Killed(process.exitcode)
                if isinstance(result, _Failure):
                    raise RuntimeError(result.traceback)
                if waiting and not isinstance(result, Killed):
                    give(process, connection)
                else:
                    connection.close()  # The process ends.
                yield index, result
    except BaseException:
        for process in crew:
            process.terminate()
        raise
    finally:
        for process in crew:
            process.join(GRACE)
            if process.is_alive():
                process.kill()
                process.join()


def _start(
    function: Callable[[Any], Any], crew: list[BaseProcess]
) -> tuple[BaseProcess, Connection]:
    """Start a process and add it to the crew."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(function, theirs))
    process.start()
    crew.append(process)
    theirs.close()
    return process, ours


def _work(function: Callable[[Any], Any], connection: Connection) -> None:
    """Do the tasks that come through a connection until it is closed."""
    end_with_parent(multiprocessing.parent_process().pid, signal.SIGKILL)
    for number in SIGNALS:  # A terminal or scheduler sends them to all; the parent decides.
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _drop)
    # The processes run in parallel already. Work without torch does not wait until it is imported.
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    try:
        while True:
            task = connection.recv()
            try:
                result = function(task)
            except Exception:
                result = _Failure(traceback.format_exc())
            connection.send(result)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # The parent has no more tasks, or is gone.
    except SystemExit as stop:
        os._exit(stop.code)  # at once: taking torch down would need seconds


def _drop(*_: object) -> None:
    """Drop the task; its unfinished files are removed on the way out of `_work`."""
    raise SystemExit(128 + signal.SIGTERM)
