"""`docs/slurm*.sh` with stand-ins for SLURM: a job out of time is queued again and resumes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY_FLAGS, write_slices
from test_datasets import write_volume_h5
from test_predict import SPEC, make_adapter, marked
from test_resume import folder_of, step_of, wait_for_step
from test_scans import placed

from datasets.scans.volumes import write_volume
from distributed.signals import EXIT_INTERRUPTED

REPOSITORY = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("quick_python"),
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


def test_the_jobs_of_an_array_share_a_table_of_ablations(tmp_path: Path):
    """The first job runs out of time, is queued again, and goes on; the second does the rest."""
    job, table = Job(tmp_path), tmp_path / "table.toml"
    write_volume_h5(tmp_path / "data", "case0001")
    (tmp_path / "data" / "lists" / "test_vol.txt").write_text("case0001\n")
    table.write_text(
        "title = 'Rates'\n[base]\nvit_name = 'vit_tiny'\nckpt = 'none'\nimg_size = 64\n"
        "n_gpu = 1\nbatch_size = 1\nmax_epochs = 3\nstop_epoch = 3\nsave_steps = 1\n"
        "clip_grad = 0.5\n[axes]\nbase_lr = [1e-4, 1e-3]\n"
    )

    def start(task: int) -> subprocess.Popen:
        script = (REPOSITORY / "docs" / "slurm_ablate.sh").read_text()
        flags = [str(table), "--output", str(job.output), "--device", "cpu"]
        array = {"ID": str(task), "MIN": "1", "COUNT": "2"}
        return subprocess.Popen(
            ["bash", "-c", script, "slurm_ablate.sh", *flags],
            cwd=REPOSITORY,
            env=job.environment | {f"SLURM_ARRAY_TASK_{name}": v for name, v in array.items()},
            stderr=subprocess.PIPE,
        )

    first = start(1)
    wait_for_step(job.output, 3, lambda: first.poll() is None)
    os.kill(first.pid, signal.SIGUSR1)
    _, said = first.communicate(timeout=120)
    assert first.returncode == EXIT_INTERRUPTED, said
    assert job.asked == [f"requeue {job.environment['SLURM_JOB_ID']}"]
    assert [path.parent.name for path in job.output.glob("*/config.json")] == [
        "base_lr-0.0001_s1234"
    ]
    for task in (1, 2):
        again = start(task)
        _, said = again.communicate(timeout=300)
        assert again.returncode == 0, said
    assert len(list(job.output.glob("*/test/results.json"))) == 2 and len(job.asked) == 1


def test_the_jobs_of_an_array_share_the_scans(tmp_path: Path):
    """The first job runs out of time, is queued again, and goes on; the second does the rest."""
    job, scans = Job(tmp_path), tmp_path / "scans"
    adapter = make_adapter(tmp_path, SPEC)
    for index in range(16):
        write_volume(scans / f"{index:02}.nii.gz", marked((40, 20, 20))[0], placed("LPS"))

    def start(task: int) -> subprocess.Popen:
        script = (REPOSITORY / "docs" / "slurm_predict.sh").read_text()
        flags = ["--input", str(scans), "--output", str(job.output), "--device", "cpu"]
        flags += ["--lora_ckpt", str(adapter)]
        array = {"ID": str(task), "MIN": "1", "COUNT": "2"}
        return subprocess.Popen(
            ["bash", "-c", script, "slurm_predict.sh", *flags],
            cwd=REPOSITORY,
            env=job.environment | {f"SLURM_ARRAY_TASK_{name}": v for name, v in array.items()},
            stderr=subprocess.PIPE,
        )

    first = start(1)
    while not list(job.output.glob("*.nii.gz")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGUSR1)
    _, said = first.communicate(timeout=120)
    assert first.returncode == EXIT_INTERRUPTED, said
    assert job.asked == [f"requeue {job.environment['SLURM_JOB_ID']}"]
    assert not list(job.output.glob(".done/*.attempts"))
    assert len(list(job.output.glob("*.nii.gz"))) < 8
    for jobs in [start(1), start(2)], [start(1)]:
        for again in jobs:
            _, said = again.communicate(timeout=300)
            assert again.returncode == 0, said
    assert len(list(job.output.glob("*.nii.gz"))) == 16 and len(job.asked) == 1
    listed = json.loads((job.output / "predictions.json").read_text())["cases"]
    assert [case["case"] for case in listed] == [f"{index:02}" for index in range(16)]


@pytest.mark.parametrize("script", ["slurm_ablate.sh", "slurm_predict.sh"])
@pytest.mark.parametrize(
    ("array", "part"),
    [
        ({"ID": "3", "MIN": "1", "COUNT": "4", "STEP": "1"}, "3/4"),
        ({"ID": "0", "MIN": "0", "COUNT": "4"}, "1/4"),
        ({"ID": "8", "MIN": "0", "COUNT": "3", "STEP": "4"}, "3/3"),
        ({"ID": "9", "MIN": "1", "COUNT": "3", "STEP": "1"}, None),
    ],
)
def test_a_job_of_an_array_takes_its_share(script: str, array: dict[str, str], part: str | None):
    given = {f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()}
    done = subprocess.run(
        ["bash", f"docs/{script}", "--flag", "a b"],
        cwd=REPOSITORY,
        env=os.environ | given | {"SAMED_PYTHON": "echo"},
        capture_output=True,
        text=True,
    )
    if part is None:
        assert done.returncode == 2 and "the array has gaps" in done.stderr
    else:
        assert done.returncode == 0 and f"--part {part}" in done.stdout
        assert done.stdout.endswith("--flag a b\n")
