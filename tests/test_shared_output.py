"""Calls and parts that write into one folder, of other inputs and of other kinds of scans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_many_cases import listed
from test_predict import SPEC, make_adapter, marked, run
from test_predict_again import write_scans
from test_scans import placed, write_dicom

from common.written import Written
from datasets.scans.files import search
from prediction.claims import Claims


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_adapter(tmp_path, SPEC, monkeypatch)


def test_a_result_of_another_scan_of_the_same_name_is_not_taken(tmp_path: Path, adapter: Path):
    """Two calls at once into one folder, with a scan `a` in each input."""
    first, second = (write_scans(tmp_path / place, "a") for place in ("x", "y"))
    assert run(first, tmp_path / "out", adapter) == 0
    (path,) = (tmp_path / "out" / ".done").glob("*.json")
    key, written = json.loads(path.read_text())["key"], Written(tmp_path / "out")
    before = {"a": [None, None, 0]}  # as the second call saw it, before the first had ended
    for folder, taken in ((second, True), (first, False)):
        scans, _ = search(folder)
        with Claims(scans, written, key, SPEC.num_classes, before, lambda _: None) as claims:
            assert (claims.take() is not None) == taken
            assert ("a" in claims.outcomes) != taken


def test_a_part_without_dicom_may_ask_for_dicom_segmentations(tmp_path: Path, adapter: Path):
    """Other parts have some; the flag is refused only if the whole input has none."""
    pytest.importorskip("highdicom", reason="requirements-dicom.txt is not installed")
    scans, out = write_scans(tmp_path / "in", "a"), tmp_path / "out"
    write_dicom(scans / "s", marked((4, 20, 20))[0], placed("LPS"))
    for part in ("1/3", "3/3"):  # the second is empty
        assert run(scans, out, adapter, "--dicom_seg", "--part", part) == 0
    assert listed(out)[0] == ["a"]
