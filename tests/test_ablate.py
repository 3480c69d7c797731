"""A table of ablations is run, killed, continued and shared; every run is what train.py makes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import processes
import pytest
from conftest import write_slices
from test_datasets import write_volume_h5
from test_resume import what_it_left

import ablate
from ablation import running
from ablation.plans import Place, Plan, plan_cells
from ablation.running import run_cells
from ablation.table import read_table
from common.errors import EXIT_SOME_FAILED, InputError
from config.settings import REPOSITORY
from distributed.signals import EXIT_INTERRUPTED

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_python")]

TABLE = """
title = "A test"
[base]
vit_name = "vit_tiny"
ckpt = "none"
img_size = 64
batch_size = 1
n_gpu = 1
clip_grad = 0.5
max_epochs = 2
stop_epoch = 2
save_steps = 1
log_every = 1
[axes]
"""
RATES = "base_lr = [1e-4, 1e-3]\n"
FIRST, SECOND = "base_lr-0.0001_s1234", "base_lr-0.001_s1234"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three training slices and one volume of 8 classes."""
    folder = write_slices(tmp_path_factory.mktemp("data"), count=3)
    write_volume_h5(folder, "case0001")
    (folder / "lists" / "test_vol.txt").write_text("case0001\n")
    return folder


def flags(data: Path, folder: Path, axes: str = RATES) -> list[str]:
    table = folder / "table.toml"
    table.write_text(TABLE + axes)
    places = ["--root_path", str(data), "--output", str(folder / "out")]
    return [str(table), *places, "--device", "cpu"]


def start(words: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "ablate.py"), *words]
    return subprocess.Popen(
        command, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )


def run(words: list[str]) -> tuple[int, str, str]:
    process = start(words)
    out, told = process.communicate(timeout=300)
    return process.returncode, out, told


def wait_for(path: Path, pattern: str, process: subprocess.Popen) -> None:
    started = time.monotonic()
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - started < 120, "no progress"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a table that was run without a disturbance."""
    folder = tmp_path_factory.mktemp("whole")
    code, out, told = run(flags(data, folder))
    assert code == 0, told
    assert f"{FIRST}: DSC %" in out and "written: " in out
    return folder / "out"


def times(output: Path) -> dict[Path, int]:
    runs = [path for name in (FIRST, SECOND) for path in (output / name).rglob("*")]
    return {path: path.stat().st_mtime_ns for path in runs if path.is_file()}


def test_finished_runs_are_left_alone(whole: Path, data: Path):
    before = times(whole)
    code, out, told = run(flags(data, whole.parent))
    assert code == 0 and out.count("done before") == 2, told
    assert times(whole) == before and (whole / FIRST / "test" / "results.json") in before


def test_a_run_of_the_table_is_the_run_that_train_makes(whole: Path, data: Path, tmp_path: Path):
    rates = flags(data, tmp_path)
    table, place = read_table(rates[0]), Place(str(data), str(data), tmp_path / "out", "cpu")
    one = plan_cells(table, place)[0]
    assert processes.run(one.train_words, tmp_path / "log") == [0]
    (tmp_path / "alone").mkdir()
    one.folder.rename(tmp_path / "alone" / FIRST)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FIRST).symlink_to(whole / FIRST)
    assert what_it_left(tmp_path / "alone") == what_it_left(tmp_path / "other")


def test_a_killed_table_goes_on_to_the_same_bits(whole: Path, data: Path, tmp_path: Path):
    """Also its training ends, and only then does the next command train on."""
    words = flags(data, tmp_path)
    killed = start(words)
    wait_for(tmp_path / "out", f"{FIRST}/states/step_0000003-*.pth", killed)
    (trainer,) = processes.children(killed.pid)
    killed.kill()
    killed.wait()
    code, _, told = run(words)  # at once, while the training may still save
    assert code == 0, told
    assert not Path(f"/proc/{trainer}").exists()
    for name in (FIRST, SECOND):
        for side, output in (("a", tmp_path / "out"), ("b", whole)):
            (tmp_path / f"{side}-{name}").mkdir()
            (tmp_path / f"{side}-{name}" / name).symlink_to(output / name)
        found, expected = (what_it_left(tmp_path / f"{side}-{name}") for side in "ab")
        assert found == expected
    assert sorted(path.name for path in (tmp_path / "out").glob("base*")) == [FIRST, SECOND]
    assert "going on after step" in (tmp_path / "out" / FIRST / "log.txt").read_text()


def test_a_signal_saves_and_the_same_command_goes_on(data: Path, tmp_path: Path):
    words = flags(data, tmp_path)
    asked = start(words)
    wait_for(tmp_path / "out", f"{FIRST}/states/step_0000001-*.pth", asked)
    asked.send_signal(signal.SIGINT)
    _, told = asked.communicate(timeout=60)
    assert asked.returncode == EXIT_INTERRUPTED and "the same command goes on" in told, told
    assert "stopped after step" in (tmp_path / "out" / FIRST / "log.txt").read_text()
    assert not (tmp_path / "out" / SECOND).exists()


def test_a_failing_run_stops_no_other_and_is_listed(data: Path, tmp_path: Path):
    words = flags(data, tmp_path, "base_lr = [10.0, 1e-4]")
    text = Path(words[0]).read_text().replace("clip_grad = 0.5\n", "")
    text = text.replace("epochs = 2", "epochs = 3").replace("epoch = 2", "epoch = 3")  # until NaN
    Path(words[0]).write_text(text)
    code, _, told = run(words)
    assert code == EXIT_SOME_FAILED, told
    assert "error: base_lr-10.0_s1234: " in told and "the others are done" in told
    assert (tmp_path / "out" / FIRST / "test" / "results.json").is_file()


def test_two_parts_make_all_runs(data: Path, tmp_path: Path, whole: Path):
    words = flags(data, tmp_path)
    both = [start([*words, "--part", f"{number}/2"]) for number in (1, 2)]
    for process in both:
        out, told = process.communicate(timeout=300)
        assert process.returncode == 0, told
        assert out.count("DSC %") >= 1
    for name in (FIRST, SECOND):
        adapter = f"{name}/epoch_1.pth"
        assert (tmp_path / "out" / adapter).read_bytes() == (whole / adapter).read_bytes()


def test_a_run_of_another_process_is_waited_for(
    whole: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(running, "AGAIN", 0.2)
    table = read_table(whole.parent / "table.toml")
    one = plan_cells(table, Place(str(data), str(data), whole, "cpu"))[0]
    ready = whole.parent / "ready"
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys, time, pathlib; from common.locks import only_user\n"
            "with only_user(pathlib.Path(sys.argv[1]), taken=''):\n"
            "    pathlib.Path(sys.argv[2]).touch(); time.sleep(3)",
            *(str(whole / "logs" / f"{FIRST}.lock"), str(ready)),
        ],
        cwd=REPOSITORY,
    )
    wait_for(whole.parent, "ready", holder)
    assert run_cells([one], device="cpu", jobs=None) == {}
    out = capsys.readouterr().out
    assert f"{FIRST}: another process runs it" in out and "done before" in out
    holder.wait()


class Echo(Plan):
    """A cell whose training writes down which GPU it sees."""

    def train_command(self) -> list[str]:
        code = "import os, sys, time; print(os.environ.get('CUDA_VISIBLE_DEVICES')); time.sleep(1)"
        return [sys.executable, "-c", code]

    test_command = train_command


def on_gpus(folder: Path, plans: list[Plan]) -> set[str]:
    found = [Echo(**vars(replace(one, folder=folder / one.cell.name))) for one in plans]
    assert run_cells(found, device="auto", jobs=None) == {}
    logs = sorted((folder / "logs").glob("*.log"))
    assert len(logs) == len(plans)
    return {"".join(log.read_text().splitlines()[1::2]) for log in logs}


def test_every_run_has_a_gpu_for_itself(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = flags(data, tmp_path)
    plans = plan_cells(read_table(words[0]), Place(str(data), str(data), tmp_path))
    monkeypatch.setattr(running, "processes_here", lambda device, wanted: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert on_gpus(tmp_path / "two", plans) == {"00", "11"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert on_gpus(tmp_path / "some", plans) == {"55", "77"}
    monkeypatch.setattr(running, "processes_here", lambda device, wanted: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert on_gpus(tmp_path / "one", plans) == {"NoneNone"}


def test_what_does_not_fit_the_network_is_found_before_any_training(data: Path, tmp_path: Path):
    (tmp_path / "base.pth").write_bytes(b"nothing of that kind")
    words = flags(data, tmp_path, f"ckpt = ['none', '{tmp_path}/base.pth']")
    text = Path(words[0]).read_text().replace('ckpt = "none"\n', "")
    Path(words[0]).write_text(text)
    with pytest.raises(InputError, match=r"row 'ckpt base'.*base\.pth"):
        ablate.main(words)
    assert not (tmp_path / "out").exists()


def test_only_the_result_is_made_again(whole: Path, capsys: pytest.CaptureFixture):
    before = times(whole)
    ablate.main([str(whole.parent / "table.toml"), "--output", str(whole), "--report"])
    assert "written: " in capsys.readouterr().out and times(whole) == before
