"""Running the cells of a table: training and testing each in processes of its own."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ablation.checks import foreign_names
from ablation.plans import Plan
from common.files import make_folder
from common.locks import TakenError, only_user
from config.run_folder import CONFIG_FILE, LOCK_FILE
from distributed.launch import AFTER_SIGNAL, GRACE, processes_here
from distributed.signals import EXIT_INTERRUPTED, Interruption, end_with_parent
from evaluation.tables import COLUMNS, SAMED, total_means

LOGS = "logs"  # folder below --output of what the programs print
AGAIN = 5.0  # seconds until a cell that another process runs is looked at again
TICK = 0.1
BUSY = "another process runs this cell"


class Job:
    """A cell that this process has claimed: its training, then its test.

    Args:
        gpu: value of CUDA_VISIBLE_DEVICES; None: as it is.
        jobs: cells that run at the same time, which share the CPU cores.

    Raises:
        TakenError: another process runs the cell, or a killed one still saves its state.
    """

    def __init__(self, plan: Plan, gpu: str | None, jobs: int) -> None:
        self.plan, self.started = plan, time.monotonic()
        threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))}
        self.environment = threads | os.environ
        if gpu is not None:
            self.environment["CUDA_VISIBLE_DEVICES"] = gpu
        logs = make_folder(plan.folder.parent / LOGS, flag="--output")
        self.log = logs / f"{plan.cell.name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.waiting: deque[list[str]] = deque()
        with contextlib.ExitStack() as claimed:
            claimed.enter_context(only_user(logs / f"{plan.cell.name}.lock", taken=BUSY))
            _make_way(plan.folder)
            if not plan.trained():
                self.waiting.append(plan.train_command())
            if self.waiting or plan.results() is None:
                self.waiting.append(plan.test_command())
            self.claim = claimed.pop_all()
        self.skipped = not self.waiting

    def outcome(self) -> str | None:
        """Start what comes next; return "" at the end, a sentence after a failure, else None."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return None
            if code:
                return self._failure(code)
        # A training that --patience had ended before leaves nothing new to test.
        as_before = self.process is not None and self.plan.results() is not None
        if not self.waiting or as_before:
            return ""
        self._start(self.waiting.popleft())
        return None

    def _start(self, command: list[str]) -> None:
        self.program = Path(command[1]).name
        with self.log.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            self.begin = log.tell()
            self.process = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C reaches it once, through this process.
                start_new_session=True,
                # It saves its state and ends if this process is killed.
                preexec_fn=partial(end_with_parent, os.getpid()),
            )

    def _failure(self, code: int) -> str:
        with self.log.open("rb") as log:
            log.seek(self.begin)
            lines = log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        told = [line for line in lines if line.startswith("error: ")] or lines
        how = f"killed by signal {-code}: " if code < 0 else ""
        if code == EXIT_INTERRUPTED:
            how = "stopped by a signal, and the same command goes on: "
        last = told[-1].strip().removeprefix("error: ")
        return f"{self.program} {how}{last} ({self.log})" if how else f"{last} ({self.log})"

    def ask_to_end(self) -> None:
        """Ask the process to save its state and end."""
        if self.process is not None:
            self.process.terminate()

    def end(self, deadline: float) -> None:
        """Wait until the process has ended, and kill it at the deadline."""
        if self.process is not None:
            try:
                self.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.claim.close()


def _make_way(folder: Path) -> None:
    """Remove the folder of a training that was killed before it noted its settings.

    Raises:
        TakenError: a process still trains there.
    """
    if not folder.is_dir():
        return
    if (folder / LOCK_FILE).is_file():
        with only_user(folder / LOCK_FILE, taken=BUSY):
            pass
    if not (folder / CONFIG_FILE).is_file() and not foreign_names(folder):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def gpus_here(device: str) -> list[str | None]:
    """Return the values of CUDA_VISIBLE_DEVICES that give a cell one GPU of this machine each.

    Returns:
        [None] if there is nothing to share out.
    """
    count = processes_here(device, None)
    if count == 1:
        return [None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]


class Runner:
    """The cells that wait, those that run, each on a slot of its own, and those that failed.

    Args:
        gpus: from `gpus_here`.
        jobs: number of slots.
    """

    def __init__(self, plans: Sequence[Plan], gpus: Sequence[str | None], jobs: int) -> None:
        self.gpus, self.jobs = gpus, jobs
        # Each with the time from which on it may be looked at.
        self.waiting = deque((plan, 0.0) for plan in plans)
        self.free = list(range(jobs))
        self.running: dict[int, Job] = {}
        self.failed: dict[str, str] = {}
        self.told_to_wait: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether a cell waits or runs."""
        return bool(self.waiting or self.running)

    def start_what_fits(self) -> None:
        """Claim cells for the free slots; one that another process runs is put back."""
        for _ in range(len(self.waiting)):
            plan, due = self.waiting.popleft()
            if not self.free or time.monotonic() < due:
                self.waiting.append((plan, due))
                continue
            try:
                job = Job(plan, self.gpus[self.free[0] % len(self.gpus)], self.jobs)
            except TakenError:
                self.waiting.append((plan, time.monotonic() + AGAIN))
                if plan.cell.name not in self.told_to_wait:
                    self.told_to_wait.add(plan.cell.name)
                    tqdm.write(f"{plan.cell.name}: another process runs it; waiting for its end")
                continue
            self.running[self.free.pop(0)] = job
            if not job.skipped:
                tqdm.write(f"{plan.cell.name}: started, see {job.log}")

    def collect(self) -> int:
        """Move every running cell on; return how many have ended."""
        ended = 0
        for slot, job in list(self.running.items()):
            outcome = job.outcome()
            if outcome is None:
                continue
            ended += 1
            del self.running[slot]
            self.free.append(slot)
            job.claim.close()
            name = job.plan.cell.name
            if outcome:
                self.failed[name] = outcome
                tqdm.write(f"{name}: failed: {outcome}")
            else:
                tqdm.write(f"{name}: {_score(job)}")
        return ended

    def end(self) -> None:
        """End what runs: training saves its state before."""
        jobs = list(self.running.values())
        for job in jobs:
            job.ask_to_end()
        deadline = time.monotonic() + float(os.environ.get(GRACE, AFTER_SIGNAL))
        for job in jobs:
            job.end(deadline)


def run_cells(plans: Sequence[Plan], *, device: str, jobs: int | None) -> dict[str, str]:
    """Train and test cells, several at a time; finished ones are left alone.

    A cell that fails stops no other. A cell that another process runs is waited for.

    Args:
        jobs: cells at a time; None: one for each GPU.

    Returns:
        The names of the cells that failed, with a sentence each.

    Raises:
        SystemExit: a signal asked to stop (`EXIT_INTERRUPTED`); the same command goes on.
    """
    gpus = gpus_here(device)
    runner = Runner(plans, gpus, jobs or len(gpus))
    with (
        Interruption() as interruption,
        tqdm(total=len(plans), desc="ablation", unit="run", disable=None) as bar,
    ):
        try:
            while runner.busy and not interruption.asked:
                runner.start_what_fits()
                bar.update(runner.collect())
                time.sleep(TICK)
        finally:
            runner.end()
    if runner.busy:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED)
    return runner.failed


def _score(job: Job) -> str:
    found = job.plan.results()
    if found is None:  # Somebody has edited or removed them since.
        return "done, but its results are gone"
    means = total_means(found.results)
    scores = [
        f"{heading} {means[name] * factor:.2f}"
        for name, (heading, factor, _) in COLUMNS.items()
        if name in SAMED and means[name] is not None
    ]
    minutes = (time.monotonic() - job.started) / 60
    took = "done before" if job.skipped else f"{minutes:.1f} min"
    return f"{', '.join(scores)} as published, {took}"
