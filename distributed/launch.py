"""Starting a program as several processes on this machine."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from common.errors import NOTES
from distributed.ranks import EXIT_LOST_RANK, SAVED, under_torchrun
from distributed.signals import EXIT_INTERRUPTED, heeded_signals


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
    if under_torchrun():
        return 1
    if wanted is not None:
        return wanted
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return 1
    return min(torch.cuda.device_count(), recipe or sys.maxsize)


def launch(script: str, argv: Sequence[str], processes: int) -> int:
    """Run `python script argv` as `processes` ranks on this machine, and return the exit code.

    A signal is passed on to every rank, which has `TORCH_ELASTIC_SHUTDOWN_TIMEOUT` seconds (120) to
    finish. When a rank dies, torchrun's agent ends the others.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in heeded_signals()),
    )
    # The ranks report an error in one sentence; the agent would report it again.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as notes:
        os.environ[NOTES] = notes
        try:
            elastic_launch(config, sys.executable)(script, *argv)
        except SignalException as stopped:
            return EXIT_INTERRUPTED if (Path(notes) / SAVED).exists() else 128 + stopped.sigval
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            return _exit_code(codes, processes)
        finally:
            del os.environ[NOTES]
    return 0


def _exit_code(codes: dict[int, int], processes: int) -> int:
    """Return one exit code for all ranks; some may have ended only because another rank did."""
    largest = max((code for code in codes.values() if code > 0), default=0)
    if largest > EXIT_LOST_RANK:  # That rank has reported why.
        return largest
    killed = [rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM]
    if killed:
        print(
            f"error: rank {killed[0]} of {processes} was killed by signal {-codes[killed[0]]}, so "
            "the others were ended; continue with --resume auto",
            file=sys.stderr,
        )
    return EXIT_LOST_RANK
