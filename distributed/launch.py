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

# Seconds that ranks have to finish after a signal or the end of another rank. torchrun's variable,
# because a script that starts either sets only one.
GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


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


def launch(script: str, argv: Sequence[str], processes: int) -> int:
    """Run `python script argv` as `processes` ranks on this machine, and return the exit code.

    The ranks meet in a file of a folder that only this user can enter, and talk over the loopback
    interface, so that no other machine can reach them. A signal is passed on to every rank. When a
    rank fails, the others are ended. They have `TORCH_ELASTIC_SHUTDOWN_TIMEOUT` seconds (120) to
    finish.
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
            _wait(ranks, asked)
    finally:
        for rank in ranks:
            rank.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    return _exit_code([rank.returncode for rank in ranks], asked)


def _start(words: Sequence[str], rank: int, processes: int, folder: str) -> subprocess.Popen[bytes]:
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        NOTES: folder,
        LAUNCHER: str(os.getpid()),
    }
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    # A session of its own: Ctrl-C reaches a rank once, through this process.
    return subprocess.Popen(
        [sys.executable, *words], env=threads | os.environ | variables, start_new_session=True
    )


def _wait(ranks: Sequence[subprocess.Popen[bytes]], asked: Sequence[int]) -> None:
    """Wait until all ranks have ended; if one fails, end the others, and kill them in the end."""
    deadline = None
    while None in [rank.poll() for rank in ranks]:
        failed = any(rank.returncode for rank in ranks)
        if deadline is None and (asked or failed):
            deadline = time.monotonic() + float(os.environ.get(GRACE, 120))
            if not asked:
                for rank in ranks:
                    rank.terminate()
        if deadline is not None and time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(0.1)


def _exit_code(codes: Sequence[int], asked: Sequence[int]) -> int:
    """Return one exit code for all ranks; some may have ended only because another rank did."""
    largest = max(codes)
    if largest > EXIT_LOST_RANK or not any(codes):  # That rank has reported why.
        return largest
    if asked:
        return 128 + asked[0]
    killed = [i for i, code in enumerate(codes) if code < 0 and code != -signal.SIGTERM]
    if killed:
        print(
            f"error: rank {killed[0]} of {len(codes)} was killed by signal {-codes[killed[0]]}, so "
            "the others were ended; continue with --resume auto",
            file=sys.stderr,
        )
    return EXIT_LOST_RANK
