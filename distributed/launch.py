"""Starting a program as several processes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType

import torch

from common.errors import NOTES
from distributed.ranks import EXIT_LOST_RANK, LAUNCHER, is_rank
from distributed.signals import heeded_signals

# Environment variable: seconds that ranks have to end. It is torchrun's, because a script that
# starts either sets only one.
GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
# The seconds without that variable. After a signal, ranks finish their step and save.
AFTER_SIGNAL = 120.0
# After the end of another rank there is little to finish, and a rank whose GPU waits for that rank
# hears no signal. torchrun waits as long.
AFTER_FAULT = 30.0
# Seconds after which a killed rank is given up: the driver of a broken GPU may hold it for ever.
KILLED = 30.0


def was_restarted() -> bool:
    """Return whether torchrun's agent on this machine started its ranks again after a fault."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def processes_here(device: str, wanted: int | None, recipe: int | None = None) -> int:
    """Return the number of processes that a program starts on this machine.

    Args:
        device: value of `--device`; only `auto` and `cuda` mean all GPUs.
        wanted: value of `--processes`; None: one for each GPU that the recipe and the machine have.
        recipe: number of GPUs in the recipe; None: all of the machine.
    """
    if is_rank():
        return 1
    if wanted is not None:
        return wanted
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return 1
    return min(torch.cuda.device_count(), recipe or sys.maxsize)


def launch(script: str, argv: Sequence[str], processes: int, *, go_on: bool = False) -> int:
    """Run `python script argv` as `processes` ranks on this machine, and return the exit code.

    The ranks meet in a file of a folder that only this user can enter, and talk over the loopback
    interface, so that no other machine can reach them. A signal is passed on to every rank; they
    have 120 seconds to end. When a rank fails, the others are asked to end within 30 seconds. Then
    they are killed. `TORCH_ELASTIC_SHUTDOWN_TIMEOUT` sets other seconds for both.

    Args:
        go_on: a rank that a signal killed does not end the others, which do its work. The first
            rank tells in the end whether all of it is done.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for rank in ranks:
            rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in heeded_signals()}
    try:
        with tempfile.TemporaryDirectory(prefix="samed-") as folder:
            for index in range(processes):
                ranks.append(_start([script, *argv], index, processes, folder))
            failed = _wait(ranks, asked, go_on)
    finally:
        for rank in ranks:
            rank.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    codes = [rank.returncode for rank in ranks]
    return _exit_code_of_rest(codes, asked, failed) if go_on else _exit_code(codes, asked, failed)


def _start(words: Sequence[str], rank: int, processes: int, folder: str) -> subprocess.Popen[bytes]:
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        NOTES: folder,
        LAUNCHER: str(os.getpid()),
    }
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes))}
    # A session of its own: Ctrl-C reaches a rank once, through this process.
    return subprocess.Popen(
        [sys.executable, *words], env=threads | os.environ | variables, start_new_session=True
    )


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]], asked: Sequence[int], go_on: bool = False
) -> list[int]:
    """Wait until all ranks have ended; if one fails, end the others, and kill them in the end.

    Args:
        go_on: a rank that was killed is no reason to end the others.

    Returns:
        The numbers of the ranks that failed first, before this process asked any to end.
    """
    failed: list[int] = []
    deadline = None
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = failed or [
            index for index, code in enumerate(codes) if code and not (go_on and code < 0)
        ]
        now = time.monotonic()
        if None not in codes or (deadline is not None and now > deadline + KILLED):
            return failed
        if deadline is None and (asked or failed):
            deadline = now + float(os.environ.get(GRACE, AFTER_SIGNAL if asked else AFTER_FAULT))
            if not asked:
                for rank in ranks:
                    rank.terminate()
        if deadline is not None and now > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(0.1)


def _exit_code_of_rest(
    codes: Sequence[int | None], asked: Sequence[int], failed: Sequence[int]
) -> int:
    """Return one exit code for ranks that go on without those that were killed."""
    killed = [index for index, code in enumerate(codes) if code is not None and code < 0]
    if asked or None in codes or not (failed or killed):
        return _exit_code(codes, asked, failed)
    for index in killed:
        rest = "so start the command again" if 0 in killed else "and the others did its work"
        print(
            f"warning: rank {index} of {len(codes)} was killed by signal {-codes[index]}, {rest}",
            file=sys.stderr,
        )
    if failed:  # Ranks that were asked to end then say less.
        return codes[failed[0]]
    return EXIT_LOST_RANK if 0 in killed else 0


def _exit_code(codes: Sequence[int | None], asked: Sequence[int], failed: Sequence[int]) -> int:
    """Return one exit code for all ranks; some may have ended only because another rank did.

    Args:
        codes: None: the rank did not end even when it was killed.
        asked: the signals that were passed on.
        failed: the ranks that failed first.
    """
    for index, code in enumerate(codes):
        if code is None:
            print(
                f"error: rank {index} does not end although it was killed, because the system does "
                "not let go of it; its GPU or disk may need a restart of the machine",
                file=sys.stderr,
            )
    largest = max(code or 0 for code in codes)
    if largest > EXIT_LOST_RANK or not any(code is None or code for code in codes):
        return largest  # That rank has reported why.
    if asked:
        return 128 + asked[0]
    killed = [index for index in failed if codes[index] < 0]
    if killed:
        print(
            f"error: rank {killed[0]} of {len(codes)} was killed by signal {-codes[killed[0]]}, so "
            "the others were ended; continue with --resume auto",
            file=sys.stderr,
        )
    return EXIT_LOST_RANK
