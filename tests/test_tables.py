"""Numbers and pictures of a test run: order of means, undefined scores, files, pages."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metrics import ABSENT, BOTH, FALSE_ORGAN, MISSED, ClassScore
from report.figures import CASES_A_PAGE, SLICES_A_CASE, CasePanel, case_panel, write_pages
from report.tables import (
    DEFINITIONS,
    OUTCOMES,
    SCORES,
    CaseResult,
    case_means,
    class_means,
    format_table,
    outcome_counts,
    read_json,
    total_means,
    write_csv,
    write_json,
)

NAMES = ["liver", "gallbladder", "aorta"]


def found(dsc: float, hd95: float, spacing: float | None = 2.0) -> ClassScore:
    """An organ that prediction and label both have; `spacing` in mm, None: unknown."""
    millimetres = (None, None) if spacing is None else (spacing * hd95, spacing * hd95 / 4)
    return ClassScore(BOTH, dsc, hd95, dsc, hd95, *millimetres)


FALSE = ClassScore(FALSE_ORGAN, 1.0, 0.0, 0.0, None, None, None)
LOST = ClassScore(MISSED, 0.0, 0.0, 0.0, None, None, None)
NONE = ClassScore(ABSENT, 0.0, 0.0, None, None, None, None)
RESULTS = [
    CaseResult("case0001", [found(0.9, 2.0), found(0.4, 8.0), FALSE]),
    CaseResult("case0002", [found(0.7, 4.0), NONE, LOST]),
    CaseResult("case0003", [found(0.8, 6.0), NONE, NONE]),
]


def test_totals_average_cases_first_then_classes():
    by_hand = {  # per class: the mean over the cases that define it
        "dsc": (0.8, 0.4, 0.0),
        "hd95_voxels": (4.0, 8.0, None),
        "hd95_mm": (8.0, 16.0, None),
        "assd_mm": (2.0, 4.0, None),
        "samed_dsc": (0.8, 0.4 / 3, 1 / 3),
        "samed_hd95": (4.0, 8.0 / 3, 0.0),
    }
    total = total_means(RESULTS)
    for name, expected in by_hand.items():
        assert [row[name] for row in class_means(RESULTS)] == pytest.approx(list(expected))
        defined = [value for value in expected if value is not None]
        assert total[name] == pytest.approx(sum(defined) / len(defined))
    # The other order gives another number as soon as an organ is absent somewhere.
    other_order = np.mean([row["dsc"] for row in case_means(RESULTS)])
    assert total["dsc"] == pytest.approx(0.4) and other_order != pytest.approx(0.4)


def test_every_case_is_counted_once_per_class():
    counts = outcome_counts(RESULTS)
    assert counts[2] == {BOTH: 0, FALSE_ORGAN: 1, MISSED: 1, ABSENT: 1}
    assert all(tuple(row) == OUTCOMES and sum(row.values()) == len(RESULTS) for row in counts)


def test_table_is_aligned_and_shows_dashes_without_spacing():
    unknown = [CaseResult("a", [found(0.876543, 3.14159, None)])]
    header, rule, row, total = format_table(unknown, ["liver"]).split("\n\n")[0].splitlines()
    assert row.split() == ["liver", "87.65", "3.14", "-", "-", "-", "87.65", "3.14", *"1000"]
    assert total.split() == ["mean", *row.split()[1:8]]
    assert len(row) == len(rule) == len(header)
    per_class, per_case, notes = format_table(RESULTS, NAMES).split("\n\n")
    assert len(per_class.splitlines()) == 2 + len(NAMES) + 1
    assert len(per_case.splitlines()) == 2 + len(RESULTS)
    assert "pooled" in notes and "samed" in notes
    assert max(map(len, notes.splitlines())) <= len(header) + 10


def test_csv_has_one_line_per_case_and_class(tmp_path: Path):
    write_csv(tmp_path / "r.csv", RESULTS, NAMES)
    with (tmp_path / "r.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(RESULTS) * len(NAMES)
    assert set(rows[0]) == {"case", "class", "name", "outcome", *SCORES}
    flat = [(r.case, n, s) for r in RESULTS for n, s in zip(NAMES, r.scores, strict=True)]
    for row, (case, name, score) in zip(rows, flat, strict=True):
        assert (row["case"], row["name"], row["outcome"]) == (case, name, score.outcome)
        for key in SCORES:
            assert (float(row[key]) if row[key] else None) == getattr(score, key)


def test_json_is_strict_and_complete(tmp_path: Path):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    write_json(tmp_path / "r.json", RESULTS, NAMES, {"flags": {"path": Path("data")}})
    content = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert content["definitions"].keys() == DEFINITIONS.keys()
    assert "within 2 mm" in content["definitions"]["nsd"] and content["flags"]["path"] == "data"
    back = read_json(tmp_path / "r.json")
    assert (back.results, back.class_names) == (RESULTS, NAMES)
    assert content["total"] == total_means(RESULTS)
    assert content["classes"][2]["mean"]["hd95_voxels"] is None
    assert content["cases"][1]["scores"]["gallbladder"] == vars(NONE)
    assert [row["mean"] for row in content["cases"]] == case_means(RESULTS)


def test_failed_write_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "r.json"
    write_json(path, RESULTS, NAMES, {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, RESULTS, NAMES, {"loss": float("nan")})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def make_panel(depth: int, case: str = "case0001") -> CasePanel:
    """A panel of a noisy volume with a box of each class, moved by a voxel in the prediction."""
    image = np.random.default_rng(depth).random((depth, 40, 48), dtype=np.float32)
    label = np.zeros(image.shape, dtype=np.uint8)
    for index in range(1, 4):
        label[:, 10 * index : 10 * index + 8, 10:30] = index
    return case_panel(case, image, label, np.roll(label, 1, axis=2), 3)


@pytest.mark.parametrize("depth", [1, 2, 3, 50])
def test_panel_keeps_a_few_slices_of_its_own(depth: int):
    panel = make_panel(depth)
    assert len(panel.slices) == min(depth, SLICES_A_CASE)
    assert list(panel.slices) == sorted(set(panel.slices))
    for picture in (*panel.truth, *panel.prediction):
        assert picture.shape == (40, 48, 3) and picture.dtype == np.uint8
        assert picture.base is None or picture.base.size <= picture.size  # no volume kept alive


def test_unlabelled_case_shows_the_false_organ():
    label, prediction = np.zeros((2, 9, 16, 16), dtype=np.uint8)
    prediction[7, 4:9, 4:9] = 1
    panel = case_panel("a", np.full(label.shape, 0.5), label, prediction, 1)
    assert panel.slices == (7,)
    assert len(np.unique(panel.truth[0])) == 1 and len(np.unique(panel.prediction[0])) > 1


def test_pages_hold_pictures(tmp_path: Path):
    cases = CASES_A_PAGE + 1
    panels = [make_panel(1 + index, f"case{index:04d}") for index in range(cases)]
    results = [CaseResult(p.case, RESULTS[i % 3].scores) for i, p in enumerate(panels)]
    pages = write_pages(tmp_path, panels, results, NAMES)
    assert sorted(tmp_path.iterdir()) == sorted(pages) and len(pages) == 3
    for page in pages:
        picture = np.asarray(Image.open(page).convert("RGB"))
        assert picture.shape[0] > 150 and picture.shape[1] > 500
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
