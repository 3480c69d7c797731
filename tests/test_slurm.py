"""`docs/slurm.sh` with stand-ins for SLURM: a job out of time is queued again and resumes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY_FLAGS, write_slices
from test_resume import folder_of, step_of, wait_for_step

from distributed.signals import EXIT_INTERRUPTED

REPOSITORY = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="SLURM runs on Linux"),
]

SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$STANDIN/asked"; fi
"""
# Two machines: the command runs twice, and both get the signals that srun gets.
SRUN = """#!/usr/bin/env bash
echo "$@" > "$STANDIN/ran"
shift 2
"$@" & FIRST=$!
"$@" & SECOND=$!
trap 'AGAIN=1; kill -USR1 $FIRST $SECOND' USR1
AGAIN=1
while [ $AGAIN = 1 ]; do AGAIN=0; wait $SECOND; wait $FIRST; CODE=$?; done
exit $CODE
"""


class Job:
    """The script, run with a stand-in for SLURM."""

    def __init__(self, folder: Path, machines: int = 1) -> None:
        self.folder, self.output = folder, folder / "out"
        data = write_slices(folder / "data")
        for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "STANDIN": str(folder),
            "SLURM_JOB_ID": str(free_port() - 20000),
            "SLURM_JOB_NUM_NODES": str(machines),
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_CPUS_PER_TASK": "3",
            "SAMED_PYTHON": sys.executable,
            "SAMED_DATA": str(data),
            "OMP_NUM_THREADS": "1",
        }

    def start(self, stop_epoch: int) -> subprocess.Popen:
        script = (REPOSITORY / "docs" / "slurm.sh").read_text()
        flags = [*TINY_FLAGS, "--output", str(self.output), "--batch_size", "1", "--base_lr"]
        flags += ["1e-3", "--clip_grad", "0.5", "--global_batch", "2"]
        flags += ["--max_epochs", "400", "--stop_epoch", str(stop_epoch)]
        return subprocess.Popen(
            ["bash", "-c", script, "slurm.sh", *flags],
            cwd=REPOSITORY,
            env=self.environment,
            stderr=subprocess.PIPE,
        )

    def interrupted(self, number: signal.Signals, *, at: int = 5) -> tuple[int, bytes]:
        """Send a signal once step `at` is saved; return exit code and stderr of the job."""
        job = self.start(400)
        wait_for_step(self.output, at, lambda: job.poll() is None)
        os.kill(job.pid, number)
        _, said = job.communicate(timeout=60)
        return job.returncode, said

    @property
    def asked(self) -> list[str]:
        asked = self.folder / "asked"
        return asked.read_text().splitlines() if asked.is_file() else []


def free_port() -> int:
    """Return a free port from 20000 to 29999, the range of the script."""
    for port in range(20000 + os.getpid() % 9000, 30000):
        with socket.socket() as tried:
            if tried.connect_ex(("localhost", port)):
                return port
    raise AssertionError("no port is free")


@pytest.mark.parametrize("machines", [1, 2])
def test_a_job_out_of_time_is_queued_again_and_goes_on(machines: int, tmp_path: Path):
    job = Job(tmp_path, machines)
    code, said = job.interrupted(signal.SIGUSR1)
    assert code == EXIT_INTERRUPTED, said
    assert job.asked == [f"requeue {job.environment['SLURM_JOB_ID']}"]
    saved = step_of(job.output)
    assert saved >= 5 and b"SIGUSR1: finishing the step and saving" in said
    log = (folder_of(job.output) / "log.txt").read_text()
    assert f"stopped after step {saved};" in log, log
    assert (tmp_path / "ran").is_file() == (machines == 2)
    if machines == 2:
        command = (tmp_path / "ran").read_text()
        assert command.startswith(f"--cpus-per-task 3 {sys.executable} -m torch.distributed.run")
        assert "2 process(es)" in log
        return  # the saved state is resumed like any other
    again = job.start(saved // 3 + 2)  # an epoch has three steps
    _, said = again.communicate(timeout=60)
    assert again.returncode == 0, said
    assert len(job.asked) == 1
    assert f"going on after step {saved}" in (folder_of(job.output) / "log.txt").read_text()


def test_a_cancelled_job_saves_and_is_not_queued_again(tmp_path: Path):
    job = Job(tmp_path)
    code, said = job.interrupted(signal.SIGTERM)
    assert code == EXIT_INTERRUPTED and b"SIGTERM: finishing the step and saving" in said
    assert not job.asked and step_of(job.output) >= 5


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("exec sleep 60", EXIT_INTERRUPTED),  # Python before its first line of code
        ("trap 'exit 1' USR1", EXIT_INTERRUPTED),  # torchrun, whose code hides that of its ranks
        ("trap 'exit 2' USR1", 2),  # wrong input, which a new start cannot repair
        ("trap 'exit 0' USR1", 0),
    ],
)
def test_a_job_that_got_the_signal_is_queued_again_unless_it_is_done_or_wrong(
    answer: str, code: int, tmp_path: Path
):
    job, python, started = Job(tmp_path), tmp_path / "python", tmp_path / "started"
    python.write_text(f"#!/bin/bash\ntouch {started}\n{answer}\nwhile :; do sleep 0.05; done\n")
    python.chmod(0o755)
    job.environment["SAMED_PYTHON"] = str(python)
    process = job.start(1)
    while not started.is_file():
        time.sleep(0.01)
    time.sleep(0.3)  # both processes must be ready for the signal
    os.kill(process.pid, signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert len(job.asked) == (code == EXIT_INTERRUPTED)
