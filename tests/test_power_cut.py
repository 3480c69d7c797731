"""After a power cut at any call, the same command ends with the same files."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import power_cut
import processes
import pytest
from power_cut import KILLED, LOST, MODES, TORN
from test_full_disk import WRITERS
from test_resume import MEASURED, small_flags_of, write_data

import predict
import preprocess.prepare
from common.written import JOURNAL
from datasets.scans.volumes import Geometry, write_volume

# Calls of each program at which the tests cut; all of them if the variable is set.
FEW = 3
EVERY_CALL = "SAMED_EVERY_CALL"


def in_a_fork(work: Callable[[], object]) -> int:
    """Run a function in a fork of this process; return its exit code, or minus its signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["a.json", "a.nii.gz", "a.pth"])
def test_a_file_is_the_old_or_the_new_one_after_a_cut_at_any_call(
    name: str, mode: str, tmp_path: Path
):
    root, write = tmp_path / "root", WRITERS[name]
    root.mkdir()
    write(root / name, 2)
    new = (root / name).read_bytes()
    write(root / name, 1)
    old, found = (root / name).read_bytes(), []
    files = set(root.iterdir())

    def work(number: int) -> None:
        power_cut.cut_at(number, mode, str(root), str(tmp_path / "calls"))
        write(root / name, 2)

    for number in range(1, 30):
        died = in_a_fork(partial(work, number))
        found.append((root / name).read_bytes())
        assert found[-1] in (old, new), (number, died)
        if died == 0:
            break
        shutil.rmtree(f"{root}.kept")
        for left in set(root.iterdir()) - files:
            left.unlink()
        write(root / name, 1)
    assert died == 0 and found[0] == old and found[-1] == new and number > 3


@pytest.mark.parametrize("mode", MODES)
def test_the_harness_sees_what_is_not_flushed(mode: str, tmp_path: Path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "old").write_text("old")

    def work() -> None:
        power_cut.cut_at(4, mode, str(root), str(tmp_path / "calls"))
        (root / "new").write_text("new")  # the first call
        (root / "new").replace(root / "old")
        (root / "more").write_text("more")
        (root / "more").unlink()

    assert in_a_fork(work) == -signal.SIGKILL
    content = {path.name: path.read_text() for path in root.iterdir()}
    assert (
        content
        == {
            KILLED: {"old": "new", "more": "more"},
            LOST: {"old": "old"},
            TORN: {"old": "", "more": ""},
        }[mode]
    )


def cuts(
    program: Callable[[list[str]], None], argv: list[str], output: Path, *, seed: int
) -> Iterator[tuple[int, str]]:
    """Run a program with a cut at some of its calls, then again without, and yield each cut.

    The first run, without a cut, is yielded too, as call 0.
    """
    calls, log = output.with_suffix(".calls"), output.with_suffix(".log")
    rng, number, chosen = random.Random(seed), 0, [0]
    while chosen:
        number, mode = chosen.pop(0), MODES[number % 3]
        for left in (output, Path(f"{output}.kept")):
            shutil.rmtree(left, ignore_errors=True)
        output.mkdir()
        cut = partial(power_cut.cut_at, number, mode, str(output), str(calls))
        (process,) = processes.start(argv, log, before=cut, program=program)
        process.join(timeout=120)
        assert process.exitcode == (-signal.SIGKILL if number else 0), log.read_text()
        if number:
            last = calls.read_text().splitlines()[-1]
            log.write_text(f"call {number}: {last}, {mode}\n")
            (again,) = processes.start(argv, log, program=program)
            again.join(timeout=120)
            assert again.exitcode == 0, log.read_text()
            assert "Traceback" not in log.read_text()
        else:
            count = len(calls.read_text().splitlines())
            every = list(range(1, count + 1))
            chosen = every if os.environ.get(EVERY_CALL) else sorted(rng.sample(every, FEW))
        yield number, log.read_text()


@pytest.mark.slow
def test_training_ends_with_the_same_bits(tmp_path: Path):
    data, output, whole = write_data(tmp_path), tmp_path / "out", tmp_path / "whole"
    flags = ("--max_iterations", "3", "--val_every", "1", "--log_every", "1", "--resume", "auto")
    for number, told in cuts(
        processes.train.main, small_flags_of(data, output, *flags), output, seed=1
    ):
        if number == 0:
            output.rename(whole)
            continue
        newest = max(output.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        assert_same_run(newest, next(whole.iterdir()), told)


def assert_same_run(found: Path, whole: Path, told: str) -> None:
    """Compare hashes of adapters, and the lines of the log without seconds."""
    sides = []
    for run in (found, whole):
        lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
        sides.append(
            (
                [{k: v for k, v in line.items() if k not in MEASURED} for line in lines],
                {path.name: path.read_bytes() for path in run.glob("*.pth")},
                sorted(path.name for path in run.iterdir()),
                # The hash in the name of a state covers times.
                sorted(path.name.split("-")[0] for path in run.glob("states/*")),
            )
        )
    assert sides[0] == sides[1], told


@pytest.mark.slow
def test_preparing_ends_with_the_same_files(tmp_path: Path):
    raw, output = tmp_path / "raw", tmp_path / "out"
    rng = np.random.default_rng(0)
    for index in range(2):
        image = rng.integers(-200, 200, (3, 12, 12)).astype(np.int16)
        for kind, array in (("images", image), ("labels", (image > 99).astype(np.uint8))):
            write_volume(raw / kind / f"p{index}.nii.gz", array, Geometry.unknown())
    argv = ["--input", str(raw), "--output", str(output), "--workers", "1"]
    expected = None
    for number, told in cuts(preprocess.prepare.main, argv, output, seed=2):
        found = content_of(output)
        expected = found if number == 0 else expected
        assert found == expected, told


@pytest.mark.slow
def test_segmenting_ends_with_the_same_files(tmp_path: Path):
    data, trained = write_data(tmp_path), tmp_path / "run"
    flags = small_flags_of(data, trained, "--max_iterations", "1")
    assert processes.run(flags, tmp_path / "log") == [0]
    adapter = next(trained.rglob("epoch_0.pth"))
    scans, output = tmp_path / "scans", tmp_path / "out"
    for name in "ab":
        array = np.random.default_rng(0).integers(-200, 300, (3, 20, 20)).astype(np.int16)
        write_volume(scans / f"{name}.nii.gz", array, Geometry.unknown())
    argv = ["--input", str(scans), "--output", str(output), "--lora_ckpt", str(adapter)]
    argv += ["--ckpt", str(data / "base.pth"), "--device", "cpu", "--probabilities"]
    expected = None
    for number, told in cuts(predict.main, argv, output, seed=3):
        found = content_of(output)
        expected = found if number == 0 else expected
        assert found == expected, told


def content_of(folder: Path) -> dict[str, Any]:
    """Return what all files of a folder hold, without times."""
    return {
        path.relative_to(folder).as_posix(): _content(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("log.txt", "log")
    }


def _content(path: Path) -> Any:
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return {k: v[()].tobytes() for k, v in file.items()}, str(dict(file.attrs))
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name].tobytes() for name in arrays.files}
    if path.name == JOURNAL:  # A file may be noted twice.
        return {line for line in path.read_text().splitlines() if '".done' not in line}
    if path.match(".done/*.json"):
        record = json.loads(path.read_text())
        if "label" in record:  # of predict
            return record | {"label": record["label"][:2]}  # without the time
        # Files that changed a moment ago get no stamps.
        return record | {"sources": record["sources"]["digests"], "sha256": None}
    return path.read_bytes()
