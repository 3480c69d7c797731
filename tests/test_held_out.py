"""A score on training cases is marked in results.json, report.html and the terminal."""

from __future__ import annotations

import argparse
import json
import logging
import re
from pathlib import Path

import pytest
from test_report import boxes, case, save_run

import test
from common.writing import write_json as write_json_file
from datasets.registry import SYNAPSE
from evaluation import __main__ as program
from evaluation.held_out import held_out_warning, trained_cases
from evaluation.test_runs import read_json

TRAINED = ["case0001", "case0002", "p7"]


@pytest.mark.parametrize(
    ("tested", "trained", "seen"),
    [
        (["case0001", "case0003"], TRAINED, ["case0001"]),
        (["p7_slice003", "p8_slice003"], TRAINED, ["p7_slice003"]),  # pictures of a trained scan
        (["case0003"], TRAINED, []),
        (["case00011", "case000", "CASE0001"], TRAINED, []),  # other names
        (["case0001"], None, None),
        (["case0001"], [], []),
    ],
)
def test_trained_cases_are_found(tested: list[str], trained: list[str] | None, seen):
    assert trained_cases({name: name for name in tested}, trained) == seen


def test_another_scan_of_a_trained_patient_is_found():
    tested = {"P12_R": "P12", "P13_R": "P13"}
    assert trained_cases(tested, ["P12", "P12_L"]) == ["P12_R"]


def test_the_warning_counts_and_names():
    assert held_out_warning(None, 3) is None and held_out_warning([], 3) is None
    assert held_out_warning(["a"], 3) == (
        "1 of 3 test cases was trained on: a; this is no held-out score"
    )
    assert held_out_warning(["a", "b"], 2).startswith("2 of 2 test cases were trained on: a, b;")
    assert "and 8 more" in held_out_warning([f"c{i}" for i in range(20)], 20)


@pytest.mark.parametrize(
    ("spec", "recorded", "data", "expected"),
    [
        ("Synapse", {"cases": ["x"], "size": [224]}, None, ["x"]),
        ("Synapse", None, None, list(SYNAPSE.train_cases)),  # a published adapter
        ("Synapse", None, "Phantom", None),  # the same names are other cases
        ("Mine", {"cases": ["x"]}, "Mine", ["x"]),
        ("Mine", None, "Mine", None),  # an adapter of an older version
    ],
)
def test_the_training_cases_come_from_the_adapter_or_the_published_list(
    tmp_path: Path, spec: str, recorded, data: str | None, expected
):
    def described(name: str) -> dict:
        values = SYNAPSE.to_json() | {"name": name}
        return values if name == "Synapse" else values | {"train_cases": [], "test_cases": []}

    if data is not None:
        write_json_file(tmp_path / "dataset_spec.json", described(data))
    args = argparse.Namespace(spec=described(spec), volume_path=str(tmp_path))
    if recorded is not None:
        args.trained_on = recorded
    found = test.training_cases(args)
    assert (None if found is None else list(found)) == expected


def test_the_banner_is_in_the_results_the_page_and_the_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(test, "write_pages", lambda *_: [])  # no pictures were drawn
    args = argparse.Namespace(spec=SYNAPSE.to_json(), volume_path=str(tmp_path), code=None)
    args.no_viewer = True
    args.nsd_tolerance, args.trained_on = 2.0, {"cases": ["case1", "case9"]}
    label = [boxes(f"case{i}", {1: 9}, truth={1: 10}, group=f"case{i}") for i in (1, 2)]
    results = [result.__class__(result.case, (result.scores * 4)[:8]) for result in label]
    with caplog.at_level(logging.INFO):
        test.report(args, tmp_path, results)
    told = "1 of 2 test cases was trained on: case1; this is no held-out score"
    assert json.loads((tmp_path / "results.json").read_text())["trained_on_cases"] == ["case1"]
    assert told in (tmp_path / "report.html").read_text(encoding="utf-8") and told in caplog.text
    args.trained_on = {"cases": ["case9"]}
    test.report(args, tmp_path, results)
    assert "held-out" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert read_json(tmp_path / "results.json").trained_on == []


def text_of(page: Path) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page.read_text(encoding="utf-8")))


def test_the_page_lies_beside_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a", "b"):
        save_run(tmp_path / "runs" / name / "test", [case("x", 1)])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    runs = [str(tmp_path / "runs" / name) for name in "ab"]
    program.main(runs[:1])
    assert (tmp_path / "runs" / "a" / "test" / "report.html").is_file()
    program.main(runs)
    page = tmp_path / "runs" / "comparison.html"
    assert "2 test runs side by side" in page.read_text(encoding="utf-8")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_page_says_what_a_single_slice_means(tmp_path: Path):
    single = case("x", 1)
    for name, slices in (("pictures", 1), ("scans", 6)):
        run = save_run(tmp_path / name, [single.__class__(**vars(single) | {"slices": slices})])
        program.main([str(run)])
    pictures = text_of(tmp_path / "pictures" / "report.html")
    assert "1 case has a single slice" in pictures and "samed HD95 is too small" in pictures
    assert "single slice" not in text_of(tmp_path / "scans" / "report.html")
