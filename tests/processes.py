"""Programs in separate processes, which tests can kill.

A server process imports everything once, also what training itself imports late. Each process of a
test is a fork of the server and starts at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import quick_server
import shortened  # noqa: F401
import torch
import torch._dynamo

import datasets.scans.volumes  # noqa: F401
import predict  # noqa: F401
import test  # noqa: F401
import train
import training.events  # noqa: F401
from common.errors import exit_on_bad_input
from distributed.signals import Interruption

REPOSITORY = Path(__file__).resolve().parent.parent
# The server must start no PyTorch thread, or its forks could not start theirs.
os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
# A thread that waits for another leaves it the core, as several tests run at once.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["processes", "warm_start"])


def start(
    argv: list[str],
    log: Path,
    ranks: int = 1,
    *,
    before: Callable[[], None] | None = None,
    program: Callable[[list[str]], None] = train.main,
) -> list[BaseProcess]:
    """Start a program in one process for each rank; append their output to `log`.

    Args:
        before: a function of this module that each process calls first.
        program: the `main` of `train.py`, `test.py` or `predict.py`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "test",
        }
        given = {name: str(value) for name, value in variables.items()} if ranks > 1 else {}
        process = CONTEXT.Process(target=_run, args=(program, argv, str(log), given, before))
        process.start()
        started.append(process)
    return started


def run(
    argv: list[str],
    log: Path,
    ranks: int = 1,
    *,
    program: Callable[[list[str]], None] = train.main,
) -> list[int]:
    """Run a program to its end and return the exit codes of all ranks."""
    started = start(argv, log, ranks, program=program)
    for process in started:
        process.join(timeout=120)
        assert process.exitcode is not None, "it hangs"
    return [process.exitcode for process in started]


def run_watched(
    command: list[str], **options: Any
) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run a command to its end.

    Returns:
        Its exit code and stderr, and the addresses on which it or its children ever listened, in
        hexadecimal as Linux shows them.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stderr=said, stdout=subprocess.DEVNULL, **options)
        addresses = set()
        while process.poll() is None:
            addresses |= listening(process.pid)
            time.sleep(0.02)
        said.seek(0)
        return subprocess.CompletedProcess(
            command, process.returncode, None, said.read()
        ), addresses


def listening(process: int) -> set[str]:
    """Return the addresses on which a process and its children accept TCP connections."""
    open_now = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *rest = line.split()
            if state == "0A":
                open_now[f"socket:[{rest[5]}]"] = address.split(":")[0]
    found = set()
    for one in [behind(process), *children(process)]:
        with contextlib.suppress(OSError):  # It may end at this moment.
            for file in Path(f"/proc/{one}/fd").iterdir():
                with contextlib.suppress(OSError):
                    found.add(open_now.get(str(file.readlink())))
    return found - {None}


def children(process: int) -> list[int]:
    """Return the numbers of the children of a process, and of theirs."""
    found = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{behind(process)}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                found += [behind(child), *children(child)]
    return found


def behind(process: int) -> int:
    """Return the number of the fork for which `quick_python.py` stands, or that of the process."""
    with contextlib.suppress(OSError):
        name = Path(f"/proc/{process}/comm").read_text()
        if name.startswith("for "):
            return int(name.removeprefix("for "))
    return process


def quick_python(folder: Path) -> tuple[str, BaseProcess]:
    """Start the server of `quick_python.py`; return the path that stands for Python, and it."""
    server = CONTEXT.Process(target=quick_server.serve, args=(str(folder / "socket"),), daemon=True)
    server.start()
    stand_in = folder / "python"
    stand_in.write_text(
        f"#!{sys.executable} -IS\n{Path(__file__).with_name('quick_python.py').read_text()}"
    )
    stand_in.chmod(0o755)
    while not (folder / "socket").exists():
        assert server.is_alive(), "the server ended"
        time.sleep(0.01)
    return str(stand_in), server


def on_two_threads() -> None:
    """Use two threads, which add the same numbers in another order."""
    torch.set_num_threads(2)


def bound_by_permissions() -> None:
    """Make file permissions count for root too, which may otherwise read and write everything."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Version 3 of the Linux capabilities, for this process.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    # The effective, permitted and inheritable sets: capabilities 0 to 31, then 32 to 63.
    sets = (ctypes.c_uint32 * 6)()
    dac_override, dac_read_search = 1 << 1, 1 << 2
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~(dac_override | dac_read_search)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def killed_while_saving() -> None:
    """Kill this process when its state of step 4 is written but does not have its name yet."""
    fsync = os.fsync

    def fatal(descriptor: int) -> None:
        fsync(descriptor)
        if ".partial.step_0000004" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fatal


def slow_to_save_when_asked() -> None:
    """After a signal, make writing the state take longer than anybody waits."""
    fsync, note, asked = os.fsync, Interruption._note, []

    def noted(*args: object) -> None:
        asked.append(args)
        note(*args)

    def slow(descriptor: int) -> None:
        if asked:
            time.sleep(600)
        fsync(descriptor)

    Interruption._note, os.fsync = noted, slow


def _run(
    program: Callable[[list[str]], None],
    argv: list[str],
    log: str,
    variables: dict[str, str],
    before: Callable[[], None] | None,
) -> None:
    os.environ.update(variables)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    # Loader workers start as in a real run.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    if before is not None:
        before()
    with exit_on_bad_input():
        program(argv)
