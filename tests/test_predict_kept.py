"""`predict.py` replaces and deletes only what it wrote; a corrected label file is kept."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from test_predict import SPEC, Bands, make_adapter, run
from test_predict_again import write_scans

import predict
from common.errors import InputError
from common.writing import partial_name, write_json
from common.written import JOURNAL
from datasets.scans.files import scan_file
from datasets.scans.labels import write_labels
from evaluation.predict_volume import predict_volume
from prediction import cases, segmenting
from prediction.cases import read_case
from prediction.summary import SUMMARY

pytestmark = pytest.mark.slow
Capture = pytest.CaptureFixture[str]
FOREIGN = ("a.nii.gz", "overlays/a.png", "log.txt", *SUMMARY)


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_adapter(tmp_path, SPEC, monkeypatch)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the log and the journal, which hold times and grow."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("log.txt", JOURNAL)
    }


def test_a_corrected_label_file_is_kept_and_the_rest_is_finished(
    tmp_path: Path, adapter: Path, capfd: Capture
):
    scans, out = write_scans(tmp_path / "in", "ab"), tmp_path / "out"
    assert run(scans, out, adapter) == 0
    (out / "a.nii.gz").write_bytes(b"corrected for hours")
    (out / "b.nii.gz").unlink()
    write_scans(scans, "c")
    capfd.readouterr()
    assert run(scans, out, adapter) == 0
    told = capfd.readouterr().err
    assert "warning: " in told and "they are kept: a.nii.gz;" in told
    assert {path.name for path in out.glob("*.nii.gz")} == {f"{name}.nii.gz" for name in "abc"}
    listed = json.loads((out / "predictions.json").read_text())["cases"]
    assert ["changed after" in str(case["warnings"]) for case in listed] == [True, False, False]
    # A table that was changed is refused; the message names all that --overwrite would replace.
    table = (out / "volumes.csv").read_bytes()
    (out / "volumes.csv").write_bytes(table + b"a note")
    assert run(scans, out, adapter) == 2
    assert "a.nii.gz" in capfd.readouterr().err
    (out / "volumes.csv").write_bytes(table)
    # Other settings ask for other labels: refused before any work.
    before = files_of(out)
    assert run(scans, out, adapter, "--largest_component") == 2
    assert "holds a.nii.gz, which this program has not written" in capfd.readouterr().err
    assert files_of(out) == before
    # In another format, it is not in the way and stays.
    assert run(scans, out, adapter, "--format", ".mha") == 0
    assert (out / "a.nii.gz").read_bytes() == b"corrected for hours"
    assert not (out / "b.nii.gz").exists() and (out / "b.mha").exists()
    assert run(scans, out, adapter, "--overwrite") == 0
    assert (out / "a.nii.gz").read_bytes() == (out / "c.nii.gz").read_bytes()


def test_a_copied_folder_is_known(tmp_path: Path, adapter: Path, capfd: Capture):
    scans = write_scans(tmp_path / "in", "a")
    assert run(scans, tmp_path / "out", adapter) == 0
    shutil.copytree(tmp_path / "out", tmp_path / "copy", copy_function=shutil.copyfile)
    before = (tmp_path / "copy" / "a.nii.gz").stat().st_mtime_ns
    assert run(scans, tmp_path / "copy", adapter) == 0
    assert (tmp_path / "copy" / "a.nii.gz").stat().st_mtime_ns == before
    assert run(scans, tmp_path / "copy", adapter, "--largest_component") == 0
    assert "kept" not in capfd.readouterr().err


@pytest.mark.parametrize("name", FOREIGN)
def test_each_file_of_another_program_is_kept(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture, name: str
):
    scans, out = write_scans(tmp_path / "in", "a"), tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    with monkeypatch.context() as patched:
        patched.setattr(predict, "build_model", None)  # the refusal comes earlier
        assert run(scans, out, adapter) == 2
    assert f"holds {name}, which this program has not written" in capfd.readouterr().err
    assert files_of(tmp_path / "out").get(name, b"mine") == b"mine"
    assert run(scans, out, adapter, "--overwrite") == 0
    assert name == "log.txt" or (out / name).read_bytes() != b"mine"
    assert run(scans, out, adapter, "--flips", "rows") == 0  # now the files are its own


def test_a_log_is_only_added_to(tmp_path: Path, adapter: Path):
    scans, out = write_scans(tmp_path / "in", "a"), tmp_path / "out"
    out.mkdir()
    (out / "log.txt").write_text("mine\n")
    for _ in range(2):
        assert run(scans, out, adapter, "--overwrite") == 0
        assert (out / "log.txt").read_text().startswith("mine\n[")


@pytest.mark.parametrize("name", ["a.nii.gz", "volumes.csv", "overlays/a.png"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_any_work(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture, name: str
):
    scans = write_scans(tmp_path / "in", "a")
    (tmp_path / "out" / name).mkdir(parents=True)
    monkeypatch.setattr(predict, "build_model", None)
    assert run(scans, tmp_path / "out", adapter, "--overwrite") == 2
    assert f"holds folders where files would be written: {name}" in capfd.readouterr().err


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no dict": lambda r: [r],
    "no result": lambda r: r | {"result": None},
    "no key": lambda r: {name: r[name] for name in ("source", "result", "label")},
    "another case": lambda r: r | {"result": r["result"] | {"case": "b"}},
    "another folder": lambda r: r | {"result": r["result"] | {"file": "../mine.nii.gz"}},
    "too few voxels": lambda r: r | {"result": r["result"] | {"voxels": [1]}},
    "voxels as text": lambda r: r | {"result": r["result"] | {"voxels": ["1", "2", "3"]}},
    "millilitres": lambda r: r | {"result": r["result"] | {"ml": [None, {}, 1.0]}},
    "warnings": lambda r: r | {"result": r["result"] | {"warnings": [1]}},
    "not used": lambda r: r | {"result": r["result"] | {"not_used": [{"path": "x", "odd": 1}]}},
    "label": lambda r: r | {"label": []},
}


@pytest.mark.parametrize("text", [b"", b"\0" * 50, b"\xff{", b"[" * 9999, b'{"key": 1e999}'])
def test_a_record_that_is_not_json(tmp_path: Path, adapter: Path, capfd: Capture, text: bytes):
    check_damaged(tmp_path, adapter, capfd, lambda path: path.write_bytes(text))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_record(tmp_path: Path, adapter: Path, capfd: Capture, name: str):
    def damage(path: Path) -> None:
        write_json(path, DAMAGE[name](json.loads(path.read_text())))

    check_damaged(tmp_path, adapter, capfd, damage)


def check_damaged(
    folder: Path, adapter: Path, capfd: Capture, damage: Callable[[Path], object]
) -> None:
    """The case is segmented again, with a warning; no file outside of the folder is touched."""
    scans, out = write_scans(folder / "in", "a"), folder / "out"
    assert run(scans, out, adapter) == 0
    before = files_of(out)
    (folder / "mine.nii.gz").write_bytes(b"mine")
    damage(out / ".done" / "a.json")
    capfd.readouterr()
    assert run(scans, out, adapter) == 0
    told = capfd.readouterr().err
    assert "its case counts as not segmented" in told and "Traceback" not in told
    assert files_of(out).keys() == before.keys()
    assert files_of(out)["a.nii.gz"] == before["a.nii.gz"]
    assert (folder / "mine.nii.gz").read_bytes() == b"mine"
    assert run(scans, out, adapter) == 0
    assert "not segmented" not in capfd.readouterr().err


def test_what_a_link_leads_to_is_never_deleted(tmp_path: Path, adapter: Path):
    scans, out = write_scans(tmp_path / "in", "a"), tmp_path / "out"
    assert run(scans, out, adapter, "--probabilities") == 0
    shutil.move(out / "probabilities" / "a", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "notes.txt").write_text("mine")
    (out / "probabilities" / "a").symlink_to(tmp_path / "elsewhere")
    shutil.copy(out / "a.nii.gz", tmp_path / "labels.nii.gz")
    (out / "a.nii.gz").unlink()
    (out / "a.nii.gz").symlink_to(tmp_path / "labels.nii.gz")
    assert run(scans, out, adapter) == 0
    assert (tmp_path / "elsewhere" / "notes.txt").exists()
    assert (tmp_path / "labels.nii.gz").exists()
    assert not (out / "a.nii.gz").is_symlink()


def test_unfinished_files_of_dead_processes_are_removed(tmp_path: Path, adapter: Path):
    scans, out = write_scans(tmp_path / "in", "a"), tmp_path / "out"
    assert run(scans, out, adapter, "--probabilities") == 0
    child = processes.CONTEXT.Process(target=abs, args=(1,))
    child.start()
    child.join()
    dead = partial_name(Path("x")).name.replace(str(os.getpid()), str(child.pid))
    left = [out / part / dead for part in ("", ".done", "overlays", "probabilities/a")]
    alive = partial_name(out / "y")
    for path in (*left, alive):
        path.write_bytes(b"half")
    assert run(scans, out, adapter, "--probabilities") == 0
    assert [path for path in left if path.exists()] == [] and alive.exists()


def test_a_scan_that_is_replaced_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_scans(tmp_path, "a") / "a.nii.gz"
    read = cases.read_scan

    def replaced(scan: Any) -> Any:
        found = read(scan)
        path.write_bytes(path.read_bytes() + b"\0")
        return found

    monkeypatch.setattr(cases, "read_scan", replaced)
    with pytest.raises(InputError, match=r"a\.nii\.gz was changed while it was read"):
        read_case(SPEC, scan_file(path, ".nii.gz"))


@pytest.mark.parametrize("everything", [True, False])
def test_an_output_folder_that_is_removed_meanwhile(
    tmp_path: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Capture,
    everything: bool,
):
    scans, out = write_scans(tmp_path / "in", "abcd"), tmp_path / "out"
    calls = []

    def removing(*args: Any, **kwargs: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3 and everything:
            while not (out / ".done" / "b.json").exists():  # it is being written
                time.sleep(0.01)
            shutil.rmtree(out)
        elif len(calls) == 3:
            (out / "a.nii.gz").unlink()
        return predict_volume(*args, **kwargs)

    monkeypatch.setattr(segmenting, "predict_volume", removing)
    code = run(scans, out, adapter)
    told = capfd.readouterr().err
    assert "Traceback" not in told
    if everything:
        assert code == 2 and "was removed or cannot be reached" in told and not out.exists()
    else:
        assert code == predict.EXIT_SOME_FAILED and "error: a: its files were removed" in told
        listed = json.loads((out / "predictions.json").read_text())
        assert [case["case"] for case in listed["cases"]] == ["b", "c", "d"]
    monkeypatch.setattr(segmenting, "predict_volume", predict_volume)
    assert run(scans, out, adapter) == 0
    assert len(list(out.glob("*.nii.gz"))) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("flags", [(), ("--flips", "rows")])
def test_labels_of_logits_that_are_not_finite_are_not_written(
    tmp_path: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Capture,
    value: float,
    flags: tuple[str, ...],
):
    class Overflows(Bands):
        def forward(self, images: torch.Tensor, *_: Any) -> dict[str, torch.Tensor]:
            masks = super().forward(images)["masks"]
            masks[1:, 2, 3, 4] = value  # of every second slice
            return {"masks": masks}

    monkeypatch.setattr(predict, "build_model", lambda args, device: (Overflows(), 16))
    scans, out = write_scans(tmp_path / "in", "a"), tmp_path / "out"
    assert run(scans, out, adapter, "--batch_size", "2", *flags) == 2
    told = capfd.readouterr().err
    assert "is NaN or infinite in 2 of 4 slices (counted from 0: 1, 3)" in told
    assert not (out / "a.nii.gz").exists() and not (out / "overlays" / "a.png").exists()


def test_a_scan_that_cannot_be_written_leaves_no_file(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
):
    """Earlier results of the same case stay."""
    scans, out = write_scans(tmp_path / "in", "ab"), tmp_path / "out"

    def full(path: Path, *more: Any) -> None:
        if path.name.startswith("a."):
            raise OSError(28, "No space left on device", str(path))
        write_labels(path, *more)

    with monkeypatch.context() as patched:
        patched.setattr("prediction.results.write_labels", full)
        assert run(scans, out, adapter, "--probabilities") == 3
    assert "No space left" in capfd.readouterr().err
    left = [path for path in out.rglob("*") if path.is_file() and "a" in path.parts[-2:]]
    assert left == [] and not (out / "a.nii.gz").exists()
    assert not (out / "overlays" / "a.png").exists()
    assert run(scans, out, adapter) == 0
    before = (out / "a.nii.gz").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("prediction.results.write_labels", full)
        assert run(scans, out, adapter, "--flips", "rows") == 3
    assert (out / "a.nii.gz").read_bytes() == before
