"""Wrong input: every row of the table in wrong_input.py, and randomly damaged files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import wrong_input
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_scans import placed, volume, write_dicom
from wrong_input import PROGRAMS, REPOSITORY, ROWS, Wrong, arguments, make_good, page_row, run

import config.settings
import predict
import test as test_program
from common.errors import InputError
from datasets.scans.files import read_scan, scan_file, suffix_of
from datasets.scans.pictures import read_picture
from datasets.scans.volumes import read_volume, write_volume
from lora.adapter_file import read_adapter
from tools import adapter, export
from tools.onnx_check import Difference

pytestmark = pytest.mark.slow

T = TypeVar("T")

FUZZED = 40  # damaged examples for each kind of file


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make_good(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the good folder as the current folder."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outputs(folder: Path) -> set[str]:
    """Return the results that a program has written; logs, tables and records do not count."""
    places = [folder / "out", folder / "new" / "lists"]
    found = {str(p) for place in places if place.is_dir() for p in place.rglob("*") if p.is_file()}
    found = {name for name in found if "/.done/" not in name or name.endswith(".view")}
    return {
        name for name in found if not name.endswith((".txt", ".json", ".jsonl", ".csv", ".ctbl"))
    } | {name for name in found if name.endswith(("train.txt", "test_vol.txt"))}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.program}: {row.what}")
def test_wrong_input_gives_one_error_line(folder: Path, row: Wrong):
    if row.needs_onnx:
        pytest.importorskip("onnxruntime", reason="see requirements-onnx.txt")
    row.spoil(folder)
    before = outputs(folder)
    code, told = run(row.program, arguments(row, folder))
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and row.told in lines[0], told
    assert "Traceback" not in told
    assert outputs(folder) == before and not list(folder.rglob("*.partial.*"))
    assert not (folder / "pwned").exists()
    page = (REPOSITORY / "docs" / "errors.md").read_text("utf-8")
    assert without_brackets(page_row(row, told, folder)) in without_brackets(page)


def converted(*_: object) -> Any:
    """Return a small network in place of the converted one."""
    import onnx

    wrong_input.onnx()(Path())
    return onnx.load("model.onnx")


def without_brackets(text: str) -> str:
    """Remove texts in brackets: they come from libraries and change with their versions."""
    return re.sub(r" \(.*\)", "", text)


def test_the_good_folder_is_good(folder: Path, monkeypatch: pytest.MonkeyPatch):
    # Converting and comparing networks takes longer than all else; test_onnx.py does it.
    monkeypatch.setattr(export, "to_onnx", converted)
    same = Difference(0, 1, 0, pixels=1, other_labels=0, wrong_labels=0)
    monkeypatch.setattr(export, "difference", lambda *_: same)
    for program in PROGRAMS:
        row = Wrong(program, "nothing", wrong_input.nothing, "")
        code, told = run(program, arguments(row, folder))
        assert code == 0, f"{program}: {told}"


def test_the_table_covers_every_program():
    assert len(ROWS) >= 40 and {row.program for row in ROWS} == set(PROGRAMS)
    assert len({(row.program, row.what) for row in ROWS}) == len(ROWS)


def keep_first_result(function: Callable[..., T]) -> Callable[..., T]:
    """Return a function that calls `function` once and always returns that result."""
    results: list[T] = []

    def kept(*args: Any) -> T:
        if not results:
            results.append(function(*args))
        return results[0]

    return kept


def spoilt(content: bytes, keep: float, flips: list[tuple[float, int]]) -> bytes:
    """Return a part of a file's content, with some bytes changed."""
    changed = bytearray(content[: max(1, int(keep * len(content)))])
    for place, mask in flips:
        changed[int(place * (len(changed) - 1))] ^= mask
    return bytes(changed)


damage = {
    "keep": st.one_of(st.just(1.0), st.floats(0, 1)),
    "flips": st.lists(
        # Parsers trust most of all what they read at the beginning.
        st.tuples(st.one_of(st.floats(0, 1), st.floats(0, 0.02)), st.integers(1, 255)),
        max_size=6,
    ),
}
# Damaged file -> the program that reads it.
FILES = {
    "scan.nii.gz": "predict.py",
    "scan.nii": "predict.py",
    "scan.nrrd": "predict.py",
    "scan.mha": "predict.py",
    "series": "predict.py",
    "pictures/images/p0.png": "preprocess.prepare",
    "pictures/labels/p0.png": "preprocess.prepare",
    "raw/dataset.json": "preprocess.prepare",
    "raw/labelsTr/s0.nii.gz": "preprocess.prepare",
    "data/dataset_spec.json": "train.py",
    "npz": "train.py",
    "h5": "test.py",
    "adapter.pth": "test.py",
    "adapter.safetensors": "tools.adapter",
    "tested/results.json": "evaluation",
    "table.toml": "ablate.py",
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_give_an_error_line_or_a_result(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    """There is never a traceback, a hang, a half-written file, or code of the file that runs."""
    program, flags, target = FILES[name], (), folder / name
    if not name.startswith("adapter"):  # All examples share the network, which is not damaged.
        monkeypatch.setattr(config.settings, "read_adapter", keep_first_result(read_adapter))
        for module in (predict, test_program):
            monkeypatch.setattr(module, "build_model", keep_first_result(module.build_model))
            monkeypatch.setattr(module, "environment", keep_first_result(module.environment))
        monkeypatch.setattr(predict, "pack_encoder", lambda model: None)
    if name == "series":
        target = sorted(write_dicom(folder / "series", volume(), placed("LPS")).iterdir())[2]
        flags = ("--input", "series")
    elif name.startswith("scan."):
        # Few voxels: a damaged header finds more faults than damaged voxels.
        voxels, geometry = read_volume(folder / "scan.nii.gz")
        write_volume(target, voxels[:2, :6, :7], geometry)
        flags = ("--input", name)
    elif name.startswith("pictures"):
        flags = ("--input", "pictures")
    elif name == "npz":
        target = min((folder / "data" / "train_npz").iterdir())
        flags = ("--check",)
    elif name.endswith(".safetensors"):
        adapter.main(["convert", "adapter.pth", name])
        flags = ("convert", name, "out.pth", "--overwrite")
    elif name == "h5":
        target = next((folder / "data" / "test_vol_h5").iterdir())
    elif program == "train.py":
        flags = ("--check",)
    content = target.read_bytes()

    @settings(
        max_examples=FUZZED,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(**damage)
    def check(keep: float, flips: list[tuple[float, int]]) -> None:
        target.write_bytes(spoilt(content, keep, flips))
        for made in ("out", "new"):
            shutil.rmtree(folder / made, ignore_errors=True)
        code, told = run(
            program, arguments(Wrong(program, "", wrong_input.nothing, "", flags), folder)
        )
        assert code in (0, 2), told
        assert ("error: " in told) == (code == 2) and "Traceback" not in told
        assert not list(folder.rglob("*.partial.*"))
        # predict.py writes unexpected errors to its log and continues.
        log = folder / "out" / "log.txt"
        assert not log.is_file() or "a fault of" not in log.read_text("utf-8")
        if code == 2:
            assert not outputs(folder)

    check()
    assert not (folder / "pwned").exists()


@given(**damage)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@pytest.mark.parametrize("name", ["scan.nii.gz", "pictures/images/p0.png"])
def test_damaged_bytes_never_escape_the_readers(
    good: Path, tmp_path_factory: pytest.TempPathFactory, name: str, keep: float, flips: list
):
    path = tmp_path_factory.getbasetemp() / f"fuzz-{Path(name).name}"
    path.write_bytes(spoilt((good / name).read_bytes(), keep, flips))
    try:
        if path.suffix == ".png":
            assert read_picture(path).ndim in (3, 4)
        else:
            assert read_scan(scan_file(path, suffix_of(path)))[0].ndim == 3
    except InputError as error:
        assert "\n" not in str(error)


def test_the_page_is_up_to_date():
    page = (REPOSITORY / "docs" / "errors.md").read_text("utf-8")
    assert f"{len(ROWS)} cases" in page and page.count("\n| ") == len(ROWS) + 2 * len(PROGRAMS)
    assert json.dumps(page).find("Traceback") < 0
