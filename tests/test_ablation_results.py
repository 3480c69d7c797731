"""The result of a table of ablations against numpy: means over seeds, paired differences, costs."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ablation.differences import TOO_FEW
from ablation.formats import as_rows, escaped
from ablation.published import read_published
from ablation.results import FILES, summarise, write
from ablation.table import Row, Table
from common.errors import InputError
from evaluation.metrics import compare_volume
from evaluation.tables import CaseResult, write_json

NAMES = ["spleen", "liver"]
SEEDS = (1, 2, 3)


def table_of(*names: str, seeds: tuple[int, ...] = SEEDS, published: dict | None = None) -> Table:
    """Return a table whose first row is the base."""
    rows = tuple(
        Row(name, {"rank": i}, (published or {}).get(name)) for i, name in enumerate(names)
    )
    return Table(Path("t.toml"), "Rank & more", names[0], rows, seeds)


def case(name: str, shift: int, seed: int) -> CaseResult:
    """Return a case with two boxes, predicted `shift` voxels beside their place."""
    rng = np.random.default_rng([seed, sum(map(ord, name))])
    label = np.zeros((6, 24, 40), np.uint8)
    label[1:5, 3:10, 4:12], label[2:4, 12:18, 12:22] = 1, 2
    prediction = np.roll(label, shift + int(rng.integers(0, 3)), axis=2)
    scores, counts = compare_volume(prediction, label, 2, (3.0, 1.0, 1.5))
    return CaseResult(name, scores, counts.tolist())


def make_run(
    folder: Path,
    *,
    shift: int = 0,
    seed: int = 1,
    cases: int = 6,
    results: list[CaseResult] | None = None,
) -> list[CaseResult]:
    """Write the folder of a tested run; return its results."""
    results = results or [case(f"case{index}", shift, seed) for index in range(cases)]
    (folder / "test").mkdir(parents=True)
    flags = {"lora_ckpt": f"elsewhere/{folder.name}/epoch_1.pth", "spec": {"name": "Boxes"}}
    settings = {"flags": flags, "environment": {"command": f"python test.py {folder.name}"}}
    write_json(folder / "test" / "results.json", results, NAMES, settings)
    (folder / "test" / "report.html").write_text("report")
    (folder / "epoch_1.pth").write_bytes(bytes(3 << 20))
    (folder / "check.json").write_text('{"parameters": {"all": 9000, "train": 1234}}')
    (folder / "config.json").write_text('{"rank": 4, "max_epochs": 9, "stop_epoch": 3}')
    (folder / "environment.json").write_text('[{"gpu": null, "machine": "a", "command": "python"}]')
    epochs = [(0, 10, 5.0, 100), (1, 20, 1.0, 300), (2, 30, 2.0, 200)]
    lines = [
        {"epoch": e, "steps": steps, "mean_loss": 1, "seconds": seconds, "peak_memory": peak << 20}
        for e, steps, seconds, peak in epochs
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return results


def of_case(result: CaseResult, score: str) -> float:
    return float(np.mean([getattr(organ, score) for organ in result.scores]))


def test_means_and_differences_are_those_of_numpy(tmp_path: Path):
    table = table_of("base", "shifted")
    found = {
        cell.name: make_run(
            tmp_path / cell.name, shift=3 * (cell.row.name != "base"), seed=cell.seed
        )
        for cell in table.cells
    }
    summary = summarise(table, tmp_path, {})
    for score in ("dsc", "hd95_mm", "hd95_voxels", "samed_dsc", "samed_hd95"):
        grid = np.array(  # (rows, seeds, cases)
            [
                [[of_case(r, score) for r in found[f"{row.name}_s{s}"]] for s in SEEDS]
                for row in table.rows
            ]
        )
        for row, values in zip(summary.rows, grid, strict=True):
            of_seeds = values.mean(axis=1)  # every class is in every case: the order is the same
            assert row.score(score).mean == pytest.approx(of_seeds.mean())
            assert row.score(score).sd == pytest.approx(of_seeds.std(ddof=1))
        one, per_case = summary.rows[1].differences[score], (grid[1] - grid[0]).mean(axis=0)
        assert one.found.each == pytest.approx(per_case.tolist())
        assert one.found.difference == pytest.approx(per_case.mean())
        low, high = one.found.interval
        assert min(per_case) <= low <= per_case.mean() <= high <= max(per_case)
        by_seed = (grid[1] - grid[0]).mean(axis=1)
        assert list(one.by_seed.values()) == pytest.approx(by_seed.tolist())
        assert one.verdict == "worse" and one.agreeing == 3  # a shift lowers DSC and raises HD95
    assert not summary.rows[0].differences
    organs = np.mean(
        [[[o.dsc for o in r.scores] for r in found[f"base_s{s}"]] for s in SEEDS], (0, 1)
    )
    assert summary.rows[0].organs("dsc") == pytest.approx(organs.tolist())


def test_costs_are_read_from_the_run(tmp_path: Path):
    table = table_of("base", seeds=(1,))
    make_run(tmp_path / table.cells[0].name)
    (row,) = summarise(table, tmp_path, {}).rows
    assert row.cost("trainable") == 1234 and row.cost("adapter_bytes") == 3 << 20
    assert row.cost("seconds_per_step") == pytest.approx(0.2)  # median of .5, .1, .2
    assert row.cost("peak_bytes") == 300 << 20
    for name in (
        "check.json",
        "metrics.jsonl",
        "environment.json",
    ):  # damaged
        (tmp_path / table.cells[0].name / name).write_text("[[")
    (row,) = summarise(table, tmp_path, {}).rows
    assert row.cost("trainable") is row.cost("seconds_per_step") is row.cost("peak_bytes") is None
    assert row.score("dsc").sd is None  # one seed


def test_cells_without_results_are_listed_and_paired_seeds_are_shared(tmp_path: Path):
    table = table_of("base", "half", "nothing")
    for name in ("base_s1", "base_s2", "half_s2", "half_s3"):
        make_run(tmp_path / name, shift=name.startswith("half"), seed=int(name[-1]))
    (tmp_path / "half_s1" / "test").mkdir(parents=True)
    (tmp_path / "half_s1" / "config.json").write_text(
        '{"rank": 4, "max_epochs": 9, "stop_epoch": 3}'
    )
    (tmp_path / "half_s1" / "metrics.jsonl").write_text('{"epoch": 0, "steps": 4, "seconds": 1}\n')
    (tmp_path / "nothing_s1" / "test").mkdir(parents=True)
    (tmp_path / "nothing_s1" / "test" / "results.json").write_text("{}")
    summary = summarise(table, tmp_path, {"base_s3": "train.py said no"})
    missing = {cell.cell.name: cell.missing for cell in summary.missing}
    assert missing["base_s3"] == "train.py said no"
    assert missing["half_s1"] == "trained for 1 of 3 epochs, not tested"
    assert "not a results.json" in missing["nothing_s1"]
    assert missing["nothing_s2"] == "not started"
    assert len(missing) == 5
    assert list(summary.rows[1].differences["dsc"].by_seed) == [2]
    assert any("different numbers of finished seeds" in note for note in summary.notes)
    assert summary.rows[2].score("dsc").mean is None and not summary.rows[2].differences
    line = next(line for line in summary.text().splitlines() if line.startswith("nothing "))
    assert "0 of 3" in line and "–" in line
    write(summary, tmp_path)
    assert "train.py said no" in (tmp_path / "index.html").read_text()


def test_a_failed_cell_does_not_count_although_older_results_are_there(tmp_path: Path):
    table = table_of("base", seeds=(1,))
    make_run(tmp_path / "base_s1")
    summary = summarise(table, tmp_path, {"base_s1": "test.py ended"})
    assert [cell.missing for cell in summary.missing] == ["test.py ended"]
    assert write(summary, tmp_path)


def test_other_test_data_are_told_and_never_mixed(tmp_path: Path):
    table = table_of("base", "row", seeds=(1, 2))
    whole = make_run(tmp_path / "base_s2")
    make_run(tmp_path / "row_s1", cases=4)
    other = [case("case0", 0, 1)]
    smaller = np.array(other[0].confusion)
    smaller[1, 1] -= 1
    other[0] = CaseResult("case0", other[0].scores, smaller.tolist())
    make_run(tmp_path / "row_s2", results=[*other, *whole[1:]])
    summary = summarise(table, tmp_path, {})
    missing = {cell.cell.name: cell.missing for cell in summary.missing}
    assert "other test data" in missing["row_s1"] and "case4, case5" in missing["row_s1"]
    assert "different labels of case0" in missing["row_s2"]
    assert summary.rows[1].score("dsc").mean is None


def test_the_order_of_cases_means_nothing(tmp_path: Path):
    table = table_of("base", "row", seeds=(1, 2))
    for cell in table.cells:
        results = [case(f"case{index}", cell.row.name == "row", cell.seed) for index in range(6)]
        order = results[::-1] if cell.name == "row_s2" else results
        make_run(tmp_path / cell.name, results=order)
    one = summarise(table, tmp_path, {}).rows[1].differences["dsc"]
    by_hand = [
        np.mean([of_case(case(f"case{i}", 1, s), "dsc") - of_case(case(f"case{i}", 0, s), "dsc")
                 for s in (1, 2)])
        for i in range(6)
    ]  # fmt: skip
    assert one.found.each == pytest.approx(by_hand)


def test_few_cases_have_no_verdict_and_equal_rows_do_not_differ(tmp_path: Path):
    table = table_of("base", "same", seeds=(1,))
    for name in ("few", "many"):
        for cell in table.cells:
            make_run(tmp_path / name / cell.name, cases=3 if name == "few" else 6)
    few, many = (summarise(table, tmp_path / name, {}) for name in ("few", "many"))
    assert few.rows[1].differences["dsc"].verdict == TOO_FEW
    assert many.rows[1].differences["dsc"].verdict == "no difference shown"


def test_published_numbers_stand_beside_the_samed_scores_with_their_source(tmp_path: Path):
    known = read_published()
    scores = {key: (entry.dsc, entry.hd95_voxels) for key, entry in known.items()}
    assert scores == {"SAMed": (81.88, 20.64), "SAMed_s": (77.78, 31.72), "SAMed_h": (84.3, 16.02)}
    for entry in known.values():
        assert "SAMed" in entry.source and entry.data == "Synapse"
        # The mean over the organs is the published mean, to the rounding of the organs.
        assert not entry.organs or np.mean(list(entry.organs.values())) == pytest.approx(
            entry.dsc, abs=0.006
        )
    table = table_of("mine", "theirs", seeds=(1,), published={"theirs": "SAMed"})
    for cell in table.cells:
        make_run(tmp_path / cell.name)
    summary = summarise(table, tmp_path, {})
    head, mine, theirs = as_rows(summary)
    at = head.index("published_dsc")
    assert (mine[at], theirs[at]) == ("not known", 81.88)
    assert mine[head.index("published_source")] == "not known"
    assert any("12 test cases of Synapse" in note for note in summary.notes)  # these are boxes
    assert "table 1" in summary.text()


class Page(HTMLParser):
    """The tags of a page and where they lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]


def test_names_are_shown_as_they_are_in_every_form(tmp_path: Path):
    names = ["=1+1|<script>x</script>", "a_b*c* `d` [e](f)"]
    table = table_of(*names, seeds=(1,))
    for cell in table.cells:
        make_run(tmp_path / cell.name)
    paths = write(summarise(table, tmp_path, {cell.name: "" for cell in []}), tmp_path)
    assert [path.name for path in paths] == list(FILES)
    page = Page((tmp_path / "index.html").read_text())
    assert "script" not in page.tags and "link" not in page.tags
    links = [link for link in page.links if not link.startswith("data:image/")]
    assert links and all((tmp_path / link).is_file() for link in links)
    rows = list(csv.reader((tmp_path / "table.csv").open(newline="")))
    assert rows[1][0] == f"'{names[0]}" and len({len(row) for row in rows}) == 1
    markdown = (tmp_path / "table.md").read_text()
    assert "&lt;script&gt;" in markdown and "<script>" not in markdown
    assert r"\|" in markdown and r"a\_b\*c\* \`d\` \[e\](f)" in markdown
    lines = [re.sub(r"\\.", "", line) for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert json.loads((tmp_path / "table.json").read_text())["rows"][0]["name"] == names[0]
    assert escaped("a\nb") == "a b"


def test_only_own_files_are_replaced(tmp_path: Path):
    table = table_of("base", seeds=(1,))
    make_run(tmp_path / "base_s1")
    summary = summarise(table, tmp_path, {})
    write(summary, tmp_path)
    write(summary, tmp_path)  # its own
    (tmp_path / "table.md").write_text("my notes")
    with pytest.raises(InputError, match=r"table\.md"):
        write(summary, tmp_path)
    assert (tmp_path / "table.md").read_text() == "my notes"


def test_a_table_without_any_result_is_written(tmp_path: Path):
    summary = summarise(table_of("a", "b"), tmp_path, {})
    assert len(summary.missing) == 6 and "not started" in summary.text()
    assert write(summary, tmp_path)
