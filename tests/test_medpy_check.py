"""`test.py --check_with_medpy`: medpy agrees with the project's scores, and faults are found."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import tiny_model

import test as test_program
from benchmarks import scenes
from common.errors import exit_on_bad_input
from evaluation import medpy_check
from evaluation.medpy_check import (
    EXIT_MEDPY_DIFFERS,
    CheckedPair,
    MedpyCheck,
    class_boxes,
    medpy_scores,
    report_check,
)
from evaluation.metrics import ABSENT, FALSE_ORGAN, MISSED, ClassScore, score_volume

NAMES = ["liver", "spleen", "aorta", "stomach", "pancreas"]


def checked(
    prediction: np.ndarray, label: np.ndarray, scores: list[ClassScore]
) -> list[CheckedPair]:
    """Compare one case with medpy."""
    done: list[int] = []
    check = MedpyCheck(done.append)
    check.add_case("case0001", prediction, label, scores)
    assert sum(done) == len(scores) == len(check.pairs)
    return check.pairs


def random_blocks(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A prediction and a label of classes 0…5; 3 is false, 4 is missed, 5 is absent."""
    rng = np.random.default_rng(sum(shape))
    label = rng.integers(0, 3, [-(-length // 3) for length in shape]).astype(np.uint8)
    for axis, length in enumerate(shape):
        label = label.repeat(3, axis=axis).take(range(length), axis=axis)
    prediction = np.where(rng.random(shape) < 0.9, label, rng.integers(0, 3, shape, np.uint8))
    prediction[0, :2, :2], label[-1, -2:, -2:] = 3, 4
    return prediction, label


@pytest.mark.parametrize("shape", [(9, 21, 17), (1, 20, 24), (4, 1, 30)])
def test_random_volumes_agree_in_every_outcome(shape: tuple[int, int, int]):
    prediction, label = random_blocks(shape)
    scores = score_volume(prediction, label, 5)
    assert [score.outcome for score in scores[2:]] == [FALSE_ORGAN, MISSED, ABSENT]
    pairs = checked(prediction, label, scores)
    assert [pair.index for pair in pairs] == [1, 2, 3, 4, 5]
    assert all(pair.agrees for pair in pairs)
    assert [pair.reference for pair in pairs[2:]] == [(1, 0), (0, 0), (0, 0)]


def test_a_phantom_of_the_abdomen_agrees():
    _, label, prediction = scenes.scene(30, 96)
    scores = score_volume(prediction, label, scenes.NUM_CLASSES)
    pairs = checked(prediction, label, scores)
    assert all(pair.agrees for pair in pairs)
    assert sum(0 < pair.reference[0] < 1 and pair.reference[1] > 0 for pair in pairs) >= 6


@pytest.mark.parametrize("shape", [(9, 21, 17), (1, 20, 24)])
def test_the_box_of_a_class_changes_no_bit(shape: tuple[int, int, int]):
    prediction, label = random_blocks(shape)
    for index, box in enumerate(class_boxes(prediction, label, 5), start=1):
        whole = medpy_scores(prediction == index, label == index)
        assert medpy_scores(prediction[box] == index, label[box] == index) == whole


@pytest.mark.parametrize(
    ("field", "error"), [("samed_dsc", 1e-5), ("samed_hd95", 1e-5), ("samed_hd95", np.nan)]
)
def test_a_wrong_score_is_found(field: str, error: float, caplog: pytest.LogCaptureFixture):
    prediction, label = random_blocks((5, 12, 12))
    scores = score_volume(prediction, label, 5)
    scores[1] = replace(scores[1], **{field: getattr(scores[1], field) + error})
    pairs = checked(prediction, label, scores)
    assert [pair.agrees for pair in pairs] == [True, False, True, True, True]
    with caplog.at_level(logging.INFO):
        assert not report_check(pairs, NAMES)
    found = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(found) == 1 and found[0].startswith("case0001, spleen: DSC ")


def test_without_a_difference_there_is_one_line(caplog: pytest.LogCaptureFixture):
    prediction, label = random_blocks((5, 12, 12))
    pairs = checked(prediction, label, score_volume(prediction, label, 5))
    with caplog.at_level(logging.INFO):
        assert report_check(pairs * 2, NAMES)
    (line,) = (record.getMessage() for record in caplog.records)
    assert "10 pairs of case and class" in line


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An adapter, two volumes of which one is a slice, and the flags that test them."""
    monkeypatch.setattr(test_program, "write_pages", lambda *_: [])  # pictures take seconds
    model = tiny_model(num_classes=2)
    model.train_all_weights()
    settings = {"vit_name": "vit_tiny", "img_size": 64, "num_classes": 2}
    model.save_lora_parameters(
        tmp_path / "adapter.pth", settings | {"class_names": ["liver", "spleen"]}
    )
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "test_vol.txt").write_text("case0001\ncase0002\n")
    rng = np.random.default_rng(0)
    for case, shape in (("case0001", (3, 20, 20)), ("case0002", (1, 20, 20))):
        with h5py.File(tmp_path / f"{case}.npy.h5", "w") as file:
            file["image"] = rng.random(shape, dtype=np.float32)
            file["label"] = rng.integers(0, 3, shape).astype(np.uint8)
    return [
        "--volume_path",
        str(tmp_path),
        "--lora_ckpt",
        str(tmp_path / "adapter.pth"),
        "--output_dir",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--check_with_medpy",
    ]


def run(flags: list[str]) -> int:
    """Run test.py in this process and return its exit code."""
    try:
        with exit_on_bad_input():
            test_program.main(flags)
    except SystemExit as stop:
        return int(stop.code)
    return 0


@pytest.mark.slow
def test_a_test_run_reports_the_comparison(flags: list[str], tmp_path: Path):
    assert run(flags) == 0
    log = (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
    assert "medpy: compared DSC and HD95 of 4 pairs of case and class" in log
    assert "differ from medpy's" not in log


@pytest.mark.slow
def test_a_test_run_with_a_wrong_score_ends_with_its_own_exit_code(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def wrong(prediction: np.ndarray, label: np.ndarray) -> tuple[float, float]:
        dsc, hd95 = medpy_scores(prediction, label)
        return dsc, hd95 + 2e-6 * (len(label) == 3)  # in the first case alone

    monkeypatch.setattr(medpy_check, "medpy_scores", wrong)
    assert run(flags) == EXIT_MEDPY_DIFFERS == 4
    log = (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
    assert set(re.findall(r"(\w+), [\w ]+: DSC \S+ and HD95 \S+ differ from medpy's", log)) == {
        "case0001"
    }
    assert (tmp_path / "out" / "results.json").is_file()  # the results are kept


def test_without_medpy_one_sentence_comes_before_the_work(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setitem(sys.modules, "medpy.metric", None)
    monkeypatch.setattr(test_program, "build_model", None)  # it is refused before
    assert run(flags) == 2
    told = capsys.readouterr().err
    errors = [line for line in told.splitlines() if not line.startswith("warning: ")]
    assert errors == ["error: medpy is not installed; run: pip install -r requirements.txt"]
    assert not (tmp_path / "out").exists()
