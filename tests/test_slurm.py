"""`docs/slurm.sh` with a stand-in for SLURM: preempted, it asks to be queued again and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_FLAGS, write_slices
from test_resume import folder_of, wait_for_step

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="SLURM runs on Linux")
def test_a_preempted_job_is_queued_again_and_goes_on(tmp_path: Path):
    data = write_slices(tmp_path / "data")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SAMED_PYTHON": sys.executable,
        "SAMED_DATA": str(data),
    }
    script = (REPOSITORY / "docs" / "slurm.sh").read_text()
    output = tmp_path / "out"
    flags = [*TINY_FLAGS, "--output", str(output), "--batch_size", "5", "--max_epochs", "40"]
    command = ["bash", "-c", script, "slurm.sh", *flags, "--base_lr", "1e-3", "--clip_grad", "0.5"]
    job = subprocess.Popen(
        [*command, "--stop_epoch", "40"], cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE
    )
    wait_for_step(output, 2, lambda: job.poll() is None)
    os.kill(job.pid, signal.SIGUSR1)
    _, said = job.communicate(timeout=60)
    assert job.returncode in (75, 128 + signal.SIGUSR1), said
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    again = [*command, "--stop_epoch", "4"]
    assert (
        subprocess.run(again, cwd=REPOSITORY, env=environment, timeout=60, check=False).returncode
        == 0
    )
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert "going on after step" in (folder_of(output) / "log.txt").read_text()
