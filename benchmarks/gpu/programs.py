"""Run this project's programs as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .running import ROOT

# Several programs run at once, each with this many threads.
THREADS = 4


@dataclass
class Program:
    """A program that was started; its output goes to a file."""

    process: subprocess.Popen
    log: Path

    def told(self) -> list[str]:
        """Return the lines that it printed, without empty ones; at least one."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()] or ["it said nothing"]


def start(command: Sequence[str], log: Path) -> Program:
    """Start Python with these arguments in the repository; it ends with the stage."""
    threads = str(min(THREADS, int(os.environ.get("OMP_NUM_THREADS", THREADS))))
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": threads},
        )
    return Program(process, log)
