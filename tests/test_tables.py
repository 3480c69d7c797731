"""Numbers and pictures of a test run: means, undefined scores, files, pages."""

from __future__ import annotations

import csv
import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_erosion

from datasets.scans.volumes import Geometry
from evaluation.charts import as_data, draw_boxes
from evaluation.figures import CASES_A_PAGE, draw_overlays, remove_rows, save_case, write_pages
from evaluation.groups import with_groups
from evaluation.metrics import ABSENT, BOTH, FALSE_ORGAN, MISSED, ClassScore, compare_volume
from evaluation.overlays import SLICES_A_CASE, CasePanel, case_panel, overlay
from evaluation.tables import (
    DEFINITIONS,
    OUTCOMES,
    SCORES,
    CaseResult,
    case_means,
    class_means,
    format_table,
    nsd_caveat,
    outcome_counts,
    total_means,
    write_csv,
    write_json,
)
from evaluation.test_runs import read_json
from evaluation.views import save_picture, save_row

NAMES = ["liver", "gallbladder", "aorta"]


def found(dsc: float, hd95: float, spacing: float | None = 2.0) -> ClassScore:
    """Return the score of an organ in both masks; `spacing` in mm, None if unknown."""
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
    # The mean of each class over the cases that define it.
    by_hand = {
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
    # Averaging the classes first gives another number if a case lacks an organ.
    other_order = np.mean([row["dsc"] for row in case_means(RESULTS)])
    assert total["dsc"] == pytest.approx(0.4) and other_order != pytest.approx(0.4)


def test_every_case_is_counted_once_per_class():
    counts = outcome_counts(RESULTS)
    assert counts[2] == {BOTH: 0, FALSE_ORGAN: 1, MISSED: 1, ABSENT: 1}
    assert all(tuple(row) == OUTCOMES and sum(row.values()) == len(RESULTS) for row in counts)


def test_table_is_aligned_and_shows_dashes_without_spacing():
    unknown = [CaseResult("a", [found(0.876543, 3.14159, None)])]
    header, rule, row, total = format_table(unknown, ["liver"]).split("\n\n")[0].splitlines()
    scores = ["87.65", "3.14", "-", "-", "-", "87.65", "3.14"]
    assert row.split() == ["liver", *scores, "1", "0", "0", "0"]
    assert total.split() == ["mean", *scores]
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
    """Return a panel of a noisy volume with a box of each class, shifted in the prediction."""
    image = np.random.default_rng(depth).random((depth, 40, 48), dtype=np.float32)
    label = np.zeros(image.shape, dtype=np.uint8)
    for index in range(1, 4):
        label[:, 10 * index : 10 * index + 8, 10:30] = index
    return case_panel(case, image, label, np.roll(label, 1, axis=2), NAMES)


@pytest.mark.parametrize("depth", [1, 2, 3, 50])
def test_a_panel_copies_a_few_slices(depth: int):
    panel = make_panel(depth)
    assert len(panel.slices) == min(depth, SLICES_A_CASE)
    assert list(panel.slices) == sorted(set(panel.slices))
    for picture in (*panel.truth, *panel.prediction):
        assert picture.shape == (40, 48, 3) and picture.dtype == np.uint8
        assert picture.base is None or picture.base.size <= picture.size  # holds no volume


def test_unlabelled_case_shows_the_false_organ():
    label, prediction = np.zeros((2, 9, 16, 16), dtype=np.uint8)
    prediction[7, 4:9, 4:9] = 1
    panel = case_panel("a", np.full(label.shape, 0.5), label, prediction, ["liver"])
    assert panel.slices == (7,)
    assert len(np.unique(panel.truth[0])) == 1 and len(np.unique(panel.prediction[0])) > 1


@pytest.mark.slow
def test_pages_hold_pictures(tmp_path: Path):
    cases = CASES_A_PAGE + 1
    panels = [make_panel(1 + index, f"case{index:04d}") for index in range(cases)]
    results = [CaseResult(p.case, RESULTS[i % 3].scores) for i, p in enumerate(panels)]
    for panel, result in zip(panels, results, strict=True):
        save_case(tmp_path, panel, result)
    pages = write_pages(tmp_path, results, NAMES)
    remove_rows(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(pages) and len(pages) == 3
    for page in pages:
        picture = np.asarray(Image.open(page).convert("RGB"))
        assert picture.shape[0] > 150 and picture.shape[1] > 500
        assert len(np.unique(picture)) > 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((3, 20, 24), (1, 100, 0.01)),
        ((3, 20, 24), (1, 0.01, 100)),
        ((3, 512, 1), None),
        ((3, 1, 512), None),
    ],
)
def test_unusual_voxels_give_pictures_of_bounded_shape(
    tmp_path: Path, shape: tuple[int, ...], spacing: tuple[float, ...] | None
):
    label = np.ones(shape, np.uint8)
    geometry = spacing and replace(Geometry.unknown(), spacing=spacing[::-1])
    image = np.full(shape, 0.5)
    panel = case_panel("a", image, label, label, ["liver"], geometry=geometry)
    save_picture(draw_overlays([panel], ["x"], ["liver"]), tmp_path / "page.png")
    save_row([panel.truth[0]] * 3, panel.view, tmp_path / "row.png")
    for path, pictures in (("page.png", 6), ("row.png", 3)):
        width, height = Image.open(tmp_path / path).size
        assert 1 / 5 < height / (width / pictures) < 5 and max(width, height) < 4000


ODD_NAMES = [r"cost $\frac$ x", "_hidden", "<script>", "肝臓"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 16])
def test_names_are_shown_as_they_are(tmp_path: Path, count: int):
    names = (ODD_NAMES * 4)[:count]
    label = np.arange(1, 1 + count, dtype=np.uint8).reshape(1, 1, count).repeat(8, axis=1)
    panel = case_panel("case $x^", np.full(label.shape, 0.5), label, label, names)
    results = [CaseResult("case $x^", [found(0.5, 1.0)] * count)]
    with warnings.catch_warnings():
        # Matplotlib warns of glyphs that the font lacks and of labels it leaves out.
        warnings.simplefilter("error")
        save_case(tmp_path, panel, results[0])
        write_pages(tmp_path, results, names)
        as_data(draw_boxes(results * 2, names, "dsc", "DSC %", 100))


@pytest.mark.parametrize(("side", "width"), [(224, 1), (512, 2), (1024, 4)])
def test_outlines_stay_visible_in_large_pictures(side: int, width: int):
    label = np.zeros((side, side), np.uint8)
    label[50:150, 50:150] = 1
    colours = np.array([[0, 0, 0], [200, 0, 0]], np.uint8)
    row = overlay(np.full(label.shape, 0.5), label, colours)[100]
    assert (row[50:150] == colours[1]).all(axis=1).sum() == 2 * width


def test_facts_of_cases_are_kept_and_may_be_missing(tmp_path: Path):
    known = CaseResult("a", RESULTS[0].scores, None, [], 5, (3.0, 1.0, 1.5), "RL", "scan")
    write_json(tmp_path / "r.json", [known, RESULTS[1]], NAMES, {}, 1.5)
    run = read_json(tmp_path / "r.json")
    assert run.results == [known, RESULTS[1]] and run.tolerance == 1.5
    assert [result.independent for result in run.results] == ["scan", "case0002"]
    content = json.loads((tmp_path / "r.json").read_text())
    del content["nsd_tolerance"]
    for row in content["cases"]:  # older versions did not write these
        for name in ("slices", "spacing", "sides", "group"):
            del row[name]
    (tmp_path / "r.json").write_text(json.dumps(content))
    run = read_json(tmp_path / "r.json")
    assert run.results[0] == CaseResult("a", RESULTS[0].scores) and run.tolerance is None


@pytest.mark.parametrize(
    ("cases", "slices", "groups"),
    [
        (["10004_slice16", "10004_slice19"], 1, ["10004"] * 2),  # one patient
        (["p1_1", "p1_2", "p2_1"], 1, ["p1", "p1", "p2"]),
        (["image_1", "image_2"], 1, ["image_1", "image_2"]),  # a single stem: no groups
        (["p1_1", "p1_2", "other"], 1, ["p1_1", "p1_2", "other"]),
        (["p1_1", "p1_2", "p2_1"], 9, ["p1_1", "p1_2", "p2_1"]),  # volumes
    ],
)
def test_slices_of_a_scan_are_grouped(
    tmp_path: Path, cases: list[str], slices: int, groups: list[str]
):
    results = [CaseResult(case, RESULTS[0].scores, slices=slices) for case in cases]
    assert [result.group for result in with_groups(results, tmp_path / "data")] == groups
    told = {"cases": [{"case": case, "group": "told"} for case in cases]}
    (tmp_path / "preprocess.json").write_text(json.dumps(told))
    assert {result.group for result in with_groups(results, tmp_path / "data")} == {"told"}
    for text in ('{"cases": 3}', "[" * 100_000, '{"cases": '):  # of another program, damaged
        (tmp_path / "preprocess.json").write_text(text)
        assert [result.group for result in with_groups(results, tmp_path / "data")] == groups


def test_a_tolerance_below_the_spacing_is_reported():
    results = [CaseResult(str(s), RESULTS[0].scores, spacing=(s, 1.0, 1.0)) for s in (1.5, 3.0)]
    assert "of 2 mm" in nsd_caveat(results, 2.0) and "1 of 2 cases" in nsd_caveat(results, 2.0)
    assert nsd_caveat(results, 3.0) is None and nsd_caveat(RESULTS, 2.0) is None


def test_directed_distances_and_surface_dice():
    label = np.zeros((1, 9, 30), np.uint8)
    prediction = label.copy()
    label[0, 2:7, 2:7] = 1
    prediction[0, 2:7, 2:27] = 1  # 20 columns too many
    (score,), counts = compare_volume(prediction, label, 1, (1.0, 1.0, 1.0), tolerance=2.0)
    # A single slice is scored in its plane, so its surface is the outline.
    border, real = (np.argwhere(m & ~binary_erosion(m)) for m in (prediction[0], label[0]))
    out = [min(np.hypot(r - a, c - b) for a, b in real) for r, c in border]
    back = [min(np.hypot(r - a, c - b) for a, b in border) for r, c in real]
    assert score.hd95_to_label_mm == pytest.approx(np.percentile(out, 95))
    assert score.hd95_to_prediction_mm == pytest.approx(np.percentile(back, 95))
    near = sum(distance <= 2 for distance in out + back)
    assert score.nsd == pytest.approx(near / (len(border) + len(real)))
    assert counts.tolist() == [[270 - 125, 0], [100, 25]]
    (missed,), _ = compare_volume(np.zeros_like(label), label, 1, (1.0, 1.0, 1.0))
    assert missed.nsd == 0 and missed.hd95_to_label_mm is None
    (unknown,), _ = compare_volume(prediction, label, 1)
    assert unknown.nsd is None
