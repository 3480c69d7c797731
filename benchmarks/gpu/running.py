"""Run each stage as a child process with a deadline, and keep what it found."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import Row

ROOT = Path(__file__).resolve().parents[2]
CHILD = ("-m", "benchmarks.gpu")  # how Python starts a child
KEPT_OF_STDERR = 4000  # characters
TO_THE_END = "the stage runs to its end"


@dataclass(frozen=True)
class Child:
    """A running stage."""

    process: subprocess.Popen
    lines: int  # file descriptor of its JSON lines
    log: Path  # what it printed


def run_stage(
    target: str, flags: Sequence[str], seconds: float, why: str
) -> Iterator[dict[str, Any]]:
    """Run a stage and yield the contents of its lines as they come; the last may be a failure.

    Args:
        target: `module:function`.
        flags: more flags for the child.
        seconds: after this time the child is killed with all processes it has started.
        why: what the seconds are, for the failed row.

    Yields:
        `{"where": facts}`, `{"row": fields}`, and, if the stage failed, `{"stderr": text}` after
        its failed row.
    """
    # The child's own temporary files lie there too, and go with it even if it is killed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        child = start(target, flags, Path(folder) / "log.txt")
        finished = False
        try:
            for line in lines_of(child, time.monotonic() + seconds):
                content = json.loads(line)
                finished = finished or "finished" in content
                if not finished:
                    yield content
            code = child.process.poll()
            late = code is None
            if late:
                ask_where(child)
        finally:
            kill(child)
        if finished and code == 0:
            return
        told = child.log.read_text(encoding="utf-8", errors="replace").strip()
        ending = f"killed after {seconds:.0f} s, {why}" if late else ended(child.process.returncode)
        failed = Row(TO_THE_END, ending, passed=False, note=last_line(told))
        yield {"row": vars(failed)}
        yield {"stderr": told[-KEPT_OF_STDERR:]}


def start(target: str, flags: Sequence[str], log: Path) -> Child:
    """Start a child in its own session, so that it can be killed with all it has started."""
    reading, writing = os.pipe()
    command = [sys.executable, *CHILD, "--child", target]
    try:
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, "--rows_fd", str(writing), *flags],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
                pass_fds=(writing,),
                env=os.environ | {"TMPDIR": str(log.parent)},
                start_new_session=True,
            )
    finally:
        os.close(writing)
    return Child(process, reading, log)


def lines_of(child: Child, deadline: float) -> Iterator[bytes]:
    """Yield the lines of a child until it ends or the time is over."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.lines, selectors.EVENT_READ)
        # Its own children may hold the descriptor open, so the end of the pipe is no criterion.
        while time.monotonic() < deadline:
            over = child.process.poll() is not None
            if not selector.select(timeout=0 if over else 0.2):
                if over:
                    return
                continue
            chunk = os.read(child.lines, 1 << 16)
            if not chunk:
                with suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.0, deadline - time.monotonic()))
                return
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines


def ask_where(child: Child) -> None:
    """Let a child that is late write its stack to its stderr."""
    with suppress(ProcessLookupError):
        child.process.send_signal(signal.SIGUSR1)
    with suppress(subprocess.TimeoutExpired):
        child.process.wait(0.5)


def kill(child: Child) -> None:
    """End a child and all processes it has started."""
    with suppress(ProcessLookupError):
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process.wait()
    os.close(child.lines)


def last_line(told: str) -> str:
    """Return the line of a stderr that says most.

    That is the innermost call of a stack that faulthandler wrote, the first line of an error (those
    of CUDA go on with general advice), or else the last line.
    """
    if stack := re.findall(r"^Current thread .*\n *(.+)", told, re.MULTILINE):
        return stack[-1]
    if errors := re.findall(r"^Traceback .*\n(?: .*\n|\n)*(\S.*)", told, re.MULTILINE):
        return errors[-1][:300]
    return told.splitlines()[-1][:300] if told else "it printed nothing on stderr"


def ended(code: int) -> str:
    """Say how a process ended."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"
