"""The HTML page about test runs: complete, in a single file, with correct differences."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce
from html.parser import HTMLParser
from operator import getitem
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation import __main__ as report
from evaluation import page as page_module
from evaluation.compare import FEWEST_GROUPS, compare, overview, paired
from evaluation.metrics import compare_volume
from evaluation.page import short_names
from evaluation.tables import (
    COLUMNS,
    CaseResult,
    WorstSlice,
    class_means,
    total_means,
    write_json,
)
from evaluation.test_runs import read_json

NAMES = ["liver", "<b>spleen</b>", "never there"]
SPACING = (3.0, 1.0, 1.5)


def case(name: str, seed: int, spacing: tuple[float, ...] | None = SPACING) -> CaseResult:
    """Return a case with two boxes, predicted a little beside their place."""
    rng = np.random.default_rng(seed)
    label = np.zeros((6, 20, 24), np.uint8)
    label[1:5, 3:10, 3:10], label[2:4, 12:18, 12:20] = 1, 2
    prediction = np.roll(label, rng.integers(-2, 3), axis=2)
    scores, counts = compare_volume(prediction, label, 3, spacing)
    return CaseResult(name, scores, counts.tolist(), [WorstSlice(2, 5, 90, "slices/a_002.png")])


def save_run(folder: Path, results: list[CaseResult], names: list[str] = NAMES) -> Path:
    """Write the files that test.py leaves for a run; return `folder`."""
    (folder / "slices").mkdir(parents=True)
    Image.new("RGB", (40, 20)).save(folder / "slices" / "a_002.png")
    flags = {"flags": {"lora_ckpt": "best.pth"}, "environment": {"torch": "2"}}
    write_json(folder / "results.json", results, names, flags)
    return folder


def make_page(*runs: Path, output: Path) -> int:
    """Run the program in this process and return its exit code."""
    try:
        report.main([*map(str, runs), "--output", str(output)])
    except SystemExit as stop:
        return int(stop.code)
    return 0


class Page(HTMLParser):
    """The content of a page: cells of its tables, sources of its pictures, its tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag in ("td", "th"):
            self.inside = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data.strip()


def test_the_page_holds_every_number_and_needs_nothing(tmp_path: Path):
    results = [case(f"case{index}", index) for index in range(6)]
    run = save_run(tmp_path / "run" / "test", results)
    assert make_page(run.parent, output=tmp_path / "page.html") == 0
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    assert (
        not re.search(r"https?://", text) and "script" not in page.tags and "link" not in page.tags
    )
    assert "b" in page.tags and "<b>spleen</b>" not in text  # names are escaped
    assert NAMES[1] in page.cells
    for means in (*class_means(results)[:2], total_means(results)):
        for name, (_, factor, _) in COLUMNS.items():
            assert f"{factor * means[name]:.2f}" in page.cells
    assert all(result.case in page.cells for result in results)
    sums = np.sum([result.confusion for result in results], axis=0).T
    assert f"{100 * sums[1, 1] / sums[1].sum():.1f}" in page.cells
    assert "within 2 mm" in text and "pooled" in text  # the page defines its terms


@pytest.mark.slow
@pytest.mark.parametrize(("cases", "classes", "spacing"), [(1, 1, None), (3, 40, SPACING)])
def test_few_and_many(tmp_path: Path, cases: int, classes: int, spacing: tuple[float, ...] | None):
    rng = np.random.default_rng(0)
    label = rng.integers(0, classes + 1, (3, 16, 16)).astype(np.uint8)
    results = [
        CaseResult(f"c{index}", *_parts(compare_volume(label, label, classes, spacing)))
        for index in range(cases)
    ]
    run = save_run(tmp_path / "run", results, [f"organ {index}" for index in range(classes)])
    assert make_page(run, output=tmp_path / "page.html") == 0
    assert f"organ {classes - 1}" in (tmp_path / "page.html").read_text()


def _parts(found: tuple[list, np.ndarray]) -> tuple[list, list]:
    return found[0], found[1].tolist()


@pytest.mark.slow
def test_differences_are_paired_by_case_and_class(tmp_path: Path):
    first = [case(f"case{index}", index) for index in range(7)]
    second = [case(f"case{index}", 50 + index) for index in range(1, 8)]
    runs = [
        read_json(save_run(tmp_path / name, results) / "results.json")
        for name, results in (("a", first), ("b", second))
    ]
    found = compare(*runs)
    assert found["pairs"] == 6 and found["alone"] == ["case0", "case7"]
    expected = [b.scores[0].dsc - a.scores[0].dsc for a, b in zip(first[1:], second, strict=False)]
    liver = found["rows"][0]["scores"]["dsc"]
    assert liver.difference == pytest.approx(np.mean(expected))
    low, high = liver.interval
    assert min(expected) <= low <= liver.difference <= high <= max(expected) and low < high
    assert found["rows"][2]["scores"]["dsc"].pairs == 0  # no case has this class
    assert make_page(*(tmp_path / n for n in "ab"), output=tmp_path / "page.html") == 0
    assert "2 test runs side by side" in (tmp_path / "page.html").read_text()
    # A run does not differ from itself.
    same = compare(runs[0], runs[0])["overall"]["dsc"]
    assert same.difference == 0 and same.interval == (0, 0)


def test_surface_dice_at_other_tolerances_is_not_compared(tmp_path: Path):
    results = [case(f"case{index}", index) for index in range(2)]
    for name, tolerance in (("a", 2.0), ("b", 0.5)):
        run = save_run(tmp_path / name, results)
        settings = {"flags": {}, "environment": {}}
        write_json(run / "results.json", results, NAMES, settings, tolerance)
    assert make_page(tmp_path / "a", tmp_path / "b", output=tmp_path / "page.html") == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "NSD is left out" in text
    runs = [read_json(tmp_path / name / "results.json") for name in "ab"]
    assert "nsd" not in compare(*runs)["scores"] and "nsd" in compare(runs[0], runs[0])["scores"]


def test_too_few_pairs_give_no_interval():
    values = [(0.5, 0.6), (None, 0.7), (0.4, None)]
    found = paired(values)
    assert (found.pairs, found.interval) == (1, None) and found.difference == pytest.approx(0.1)
    known = [(index / 10, index / 9) for index in range(FEWEST_GROUPS)]
    assert paired(known).interval is not None and paired(known[:-1]).interval is None
    assert paired([(None, 1.0)]).difference is None


def test_slices_of_one_scan_count_as_a_single_observation():
    values = [(0.5, 0.5 + 0.1 * (index // 2)) for index in range(2 * FEWEST_GROUPS)]
    assert paired(values, ["p1"] * len(values)).interval is None
    scans = [f"p{index // 2}" for index in range(len(values))]
    assert paired(values[:-2], scans[:-2]).interval is None
    low, high = paired(values, scans).interval
    alone = paired(values).interval
    # Half as many observations: the interval grows by about the root of 2.
    assert high - low > 1.2 * (alone[1] - alone[0])
    # With scans of unequal size the mean is still the mean over the cases.
    uneven = paired(values, ["p0"] * 5 + [f"p{index}" for index in range(5)])
    assert uneven.difference == pytest.approx(np.mean([b - a for a, b in values]))


def boxes(name: str, organs: dict[int, int], *, truth: dict[int, int], group: str) -> CaseResult:
    """Return a case of boxes: class -> columns, in the prediction (`organs`) and in the truth."""
    label, prediction = np.zeros((2, 3, 12, 40), np.uint8)
    for array, found in ((label, truth), (prediction, organs)):
        for index, columns in found.items():
            array[:, 4 * index : 4 * index + 3, :columns] = index
    scores, counts = compare_volume(prediction, label, 2, (1.0, 1.0, 1.0))
    return CaseResult(name, scores, counts.tolist(), [], 3, (1.0, 1.0, 1.0), "RL", group)


def test_a_run_does_not_win_by_missing_the_hard_organ(tmp_path: Path):
    truth = {1: 10, 2: 10}
    good = [boxes(f"c{i}", {1: 12, 2: 30}, truth=truth, group=f"c{i}") for i in range(6)]
    poor = [boxes(f"c{i}", {1: 12}, truth=truth, group=f"c{i}") for i in range(6)]
    for name, results in (("good", good), ("poor", poor)):
        save_run(tmp_path / name, results, ["liver", "tumour"])
    runs = [read_json(tmp_path / name / "results.json") for name in ("good", "poor")]
    found = compare(*runs)
    assert found["rows"][1]["scores"]["hd95_mm"].pairs == 0
    assert found["overall"]["hd95_mm"].difference == 0  # both have only the liver in common
    assert found["overall"]["dsc"].better == -1
    rows = overview(runs)["rows"]
    assert [row["name"] for row in rows] == ["liver", "tumour", "mean"]
    assert [best for _, best in rows[0]["scores"]["dsc"]] == [False, False]  # the scores are equal
    assert [best for _, best in rows[1]["scores"]["dsc"]] == [True, False]
    assert rows[1]["counts"] == [[0, 6], [0, 0]]


def test_a_removed_false_organ_is_reported(tmp_path: Path):
    first = [boxes("a", {1: 9, 2: 5}, truth={1: 10}, group="a")]
    second = [boxes("a", {1: 9}, truth={1: 10}, group="a")]
    for name, results in (("x", first), ("y", second)):
        save_run(tmp_path / name, results, ["liver", "tumour"])
    found = compare(*(read_json(tmp_path / name / "results.json") for name in "xy"))
    assert found["rows"][1]["scores"]["dsc"].pairs == 0
    assert (found["removed"], found["added"]) == (1, 0)
    assert make_page(tmp_path / "x", tmp_path / "y", output=tmp_path / "page.html") == 0
    assert "1 in x, 0 in y" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_runs_stand_side_by_side(tmp_path: Path):
    for name, shift in (("run_lr1_x", 0), ("run_lr2_x", 9), ("run_lr3_x", 5)):
        results = [
            boxes(f"s{i}", {1: 10 + shift}, truth={1: 10}, group=f"p{i // 2}") for i in range(6)
        ]
        save_run(tmp_path / name, results, ["liver", "tumour"])
    runs = sorted(tmp_path.iterdir())
    assert make_page(*runs, output=tmp_path / "page.html") == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    cells = Page(text).cells
    assert cells[1] == "DSC %" and cells[6:9] == ["lr1", "lr2", "lr3"] and "first" not in cells
    assert cells.index("liver") < cells.index("95 % interval")  # the overview comes first
    assert "the 3 scans that" in text
    assert not re.search(
        r"\w\s+[.,]|[.,](?=[A-Z])", re.sub(r"<[^>]*>", "", text.split("</style>")[1])
    )
    assert short_names(["a_b", "a"]) == ["a_b", "a"] and short_names(["a"]) == ["a"]


def test_the_page_shows_what_was_tested(tmp_path: Path):
    results = [boxes(f"s{i}", {1: 9}, truth={1: 10}, group="p") for i in range(3)]
    results = [replace(case, spacing=(2.0 + i, 0.8, 0.8)) for i, case in enumerate(results)]
    picture = replace(case("p", 1, None), slices=1)
    settings = {"flags": {"spec": {"name": "My <data>"}}, "environment": {"tested": "2026-11-25"}}
    texts = []
    for name, cases in (("scans", results), ("pictures", [picture])):
        run = save_run(tmp_path / name, cases, NAMES[: len(cases[0].scores)])
        write_json(run / "results.json", cases, NAMES[: len(cases[0].scores)], settings, 2.5)
        assert make_page(run, output=tmp_path / "page.html") == 0
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        texts.append(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", text)))
    scans, pictures = texts
    assert "My &lt;data&gt;" in scans and "tested 2026-11-25" in scans
    assert "3 cases, slices of 1 scan" in scans and "0.8 × 0.8 × 2…4 mm" in scans
    assert "tolerance of 2.5 mm is below" in scans and "2 of 3 cases" in scans
    assert "in mm" in scans and "mm" not in pictures.split("What the numbers mean")[1]
    assert "slice 2" not in pictures and "R right" not in pictures and "feet" not in pictures


def spoil(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Return a function that changes the content of a results.json."""

    def apply(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def make_pipe(path: Path) -> None:
    """Put a pipe, which nobody writes to, in the place of a file."""
    path.unlink()
    os.mkfifo(path)


BAD = {
    "missing": (lambda path: path.unlink(), "does not exist"),
    "not JSON": (lambda path: path.write_text("{"), "is not JSON"),
    "other program": (lambda path: path.write_text('{"a": 1}'), "is not a results.json"),
    "a list": (lambda path: path.write_text("[]"), "is not a results.json"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:900]), "is not JSON"),
    "no cases": (spoil(lambda content: content.update(cases=[])), "holds no case"),
    "text for numbers": (
        spoil(lambda content: content["cases"][0]["scores"]["liver"].update(dsc="x")),
        "'x' is no number from 0 to 1",
    ),
    "a picture elsewhere": (
        spoil(lambda content: content["cases"][0]["worst"][0].update(picture="../../x.png")),
        "another folder",
    ),
    "a picture lost": (
        spoil(lambda content: content["cases"][0]["worst"][0].update(picture="slices/b.png")),
        "cannot be read",
    ),
    "a spacing that is none": (
        spoil(lambda content: content["cases"][0].update(spacing=[1, 1, 0])),
        "a: spacing: [1, 1, 0] holds a size of 0 mm",
    ),
    "a picture that is none": (
        lambda path: (path.parent / "slices" / "a_002.png").write_bytes(b"GIF89a"),
        "no PNG",
    ),
    "a picture of the device's": (
        lambda path: make_pipe(path.parent / "slices" / "a_002.png"),
        "cannot be read",
    ),
    "a number beyond 64 bits": (
        spoil(lambda content: content["cases"][0]["confusion"][0].__setitem__(0, 10**30)),
        "more than 64 bits",
    ),
    "a negative count": (
        spoil(lambda content: content["cases"][0]["confusion"][0].__setitem__(0, -1)),
        "no whole number",
    ),
    "a case twice": (
        spoil(lambda content: content["cases"].append(content["cases"][0])),
        "repeat a name",
    ),
    "wrong confusion": (
        spoil(lambda content: content["cases"][0].update(confusion=[[1]])),
        "is not 4 x 4",
    ),
}


MARK = "here"
ODD = (None, True, -1, 0.5, 10**18, 2**63 - 1, 1e308, 5e-324, "", "x", "a\0b", "../../x", "/x")
ODD += ("javascript:alert(1)", "\u2028\n", "x" * 5000, [], [[]], {}, [1] * 9, ["x"] * 3)
# Texts in place of a value: beyond float, no number, half a character, nested without end.
ODD_TEXTS = ("1" + "0" * 400, "NaN", "-1e999", r'"\ud800"', "[" * 2000 + "]" * 2000)


def places(content: object, path: tuple = ()) -> Iterator[tuple]:
    """The place of every value in a JSON content."""
    if path:
        yield path
    rows = content.items() if isinstance(content, dict) else ()
    for key, value in enumerate(content) if isinstance(content, list) else rows:
        yield from places(value, (*path, key))


@pytest.mark.slow
def test_odd_values_anywhere_give_a_page_or_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Every value of a results.json becomes every odd value or is absent, one at a time."""
    monkeypatch.setattr(page_module, "as_data", lambda figure: "data:,")  # drawing takes seconds
    run = save_run(tmp_path / "run", [case("a", 1)])
    path, page = run / "results.json", tmp_path / "page.html"
    good = json.loads(path.read_text())
    refused = 0
    for *above, last in places(good):
        content = json.loads(json.dumps(good))
        inner = reduce(getitem, above, content)
        texts = []
        for value in (*ODD, MARK):
            inner[last] = value
            texts.append(json.dumps(content))
        texts += [texts.pop().replace(f'"{MARK}"', odd) for odd in ODD_TEXTS]
        del inner[last]
        for text in random.Random(str((above, last))).sample([*texts, json.dumps(content)], 4):
            path.write_text(text)
            code = make_page(run, output=page)
            told = capsys.readouterr().err
            assert (code, told.count("\n"), told[:7]) in ((0, 0, ""), (2, 1, "error: "))
            refused += code == 2
    assert refused > 200


@pytest.mark.parametrize("name", BAD)
def test_bad_results_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    change, told = BAD[name]
    run = save_run(tmp_path / "run", [case("a", 1)])
    change(run / "results.json")
    assert make_page(run, output=tmp_path / "page.html") == 2
    shown = capsys.readouterr().err
    assert told in shown and shown.startswith("error: ") and "Traceback" not in shown
    assert not (tmp_path / "page.html").exists()


def test_only_own_pages_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, page = save_run(tmp_path / "run", [case("a", 1)]), tmp_path / "page.html"
    page.write_text("of the user")
    assert make_page(run, output=page) == 2 and page.read_text() == "of the user"
    assert "which this program has not written" in capsys.readouterr().err
    results = (run / "results.json").read_bytes()
    assert make_page(run, output=run / "results.json") == 2
    assert (run / "results.json").read_bytes() == results
    assert make_page(run, output=tmp_path / "other.html") == 0
    assert make_page(run, output=tmp_path / "other.html") == 0


def test_runs_without_a_common_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = save_run(tmp_path / "a", [case("a", 1)])
    second = save_run(tmp_path / "b", [case("b", 1)])
    assert make_page(first, second, output=tmp_path / "page.html") == 2
    assert "no case in common" in capsys.readouterr().err


def test_other_labels_under_the_same_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = save_run(tmp_path / "a", [case("a", 1)])
    other = case("a", 1)
    other.confusion[0][0] += 7  # a larger scan
    other.confusion[1][1] += 7  # with a larger organ
    second = save_run(tmp_path / "b", [other])
    assert make_page(first, second, output=tmp_path / "page.html") == 2
    assert "different labels of a" in capsys.readouterr().err
