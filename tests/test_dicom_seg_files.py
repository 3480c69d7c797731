"""`--dicom_seg` as part of `predict.py`: which files a case has, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("highdicom", reason="pip install -r requirements-dicom.txt")

import pydicom
from test_dicom_seg import series_of
from test_predict import adapter, marked, run  # noqa: F401
from test_scans import placed

from datasets.scans.volumes import write_volume

pytestmark = pytest.mark.slow


def warnings_of(output: Path) -> list[str]:
    (case,) = json.loads((output / "predictions.json").read_text())["cases"]
    return case["warnings"]


def test_it_is_a_file_of_its_case(
    tmp_path: Path,
    adapter: Path,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
):
    source, output = series_of(tmp_path / "s", marked((6, 20, 23))[0]), tmp_path / "out"
    file, label = output / "s.seg.dcm", output / "s.mha"
    assert run(source, output, adapter) == 0 and not file.exists()
    assert run(source, output, adapter, "--dicom_seg") == 0  # a finished case lacks the file
    first = file.read_bytes()
    assert run(source, output, adapter, "--dicom_seg") == 0 and file.read_bytes() == first
    assert "Jane" not in "".join(
        path.read_text("utf-8", errors="replace") for path in output.rglob("*")
        if path.is_file() and path != file
    )  # fmt: skip

    file.write_bytes(first + b"corrected")
    capfd.readouterr()
    assert run(source, output, adapter, "--dicom_seg", "--largest_component") == 2
    assert "holds s.seg.dcm, which this program has not written" in capfd.readouterr().err
    assert file.read_bytes() == first + b"corrected"
    assert run(source, output, adapter, "--dicom_seg", "--largest_component", "--overwrite") == 0
    assert pydicom.dcmread(file).Modality == "SEG"
    assert not file.read_bytes().endswith(b"corrected")

    for path in source.iterdir():
        one = pydicom.dcmread(path)
        del one.FrameOfReferenceUID
        one.save_as(path)
    label.unlink()
    assert run(source, output, adapter, "--dicom_seg") == 0
    told = "no DICOM segmentation is written: the series has no FrameOfReferenceUID"
    assert f"warning: s: {told}" in capfd.readouterr().err
    assert label.exists() and not file.exists()  # that of the run before was another one
    assert [text for text in warnings_of(output) if told in text]
    assert run(source, output, adapter, "--dicom_seg") == 0  # done: it would fail in the same way
    assert [text for text in warnings_of(output) if told in text]


def test_other_scans_have_none(
    tmp_path: Path,
    adapter: Path,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
):
    array = marked((6, 20, 23))[0]
    series_of(tmp_path / "in" / "s", array)
    for name in ("a", "b"):
        write_volume(tmp_path / "in" / f"{name}.nii.gz", array, placed("LPS"))
    assert run(tmp_path / "in", tmp_path / "out", adapter, "--dicom_seg") == 0
    told = "warning: --dicom_seg has no effect on scans that are not DICOM: a, b\n"
    assert capfd.readouterr().err.count(told) == 1
    assert [path.name for path in (tmp_path / "out").glob("*.dcm")] == ["s.seg.dcm"]


def test_without_highdicom(
    tmp_path: Path,
    adapter: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    source = series_of(tmp_path / "s", marked((6, 20, 23))[0])
    monkeypatch.setitem(sys.modules, "highdicom", None)
    assert run(source, tmp_path / "out", adapter, "--dicom_seg") == 2
    told = "highdicom is not installed; run: pip install -r requirements-dicom.txt"
    assert f"error: {told}" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
