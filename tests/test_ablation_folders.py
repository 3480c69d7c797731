"""What a table counts: results of runs with its flags, of their newest adapter, and no others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import write_slices
from test_ablation_results import make_run
from test_datasets import write_volume_h5

import ablate
from ablation.plans import Place, Plan, other_runs, plan_cells
from ablation.running import Job
from ablation.table import read_table
from common.errors import InputError
from config.run_folder import save_config

TABLE = """
title = "A test"
seeds = [1, 2]
[base]
config = "recipes/samed.json"
vit_name = "vit_tiny"
ckpt = "none"
[[rows]]
name = "a"
[[rows]]
name = "b"
rank = 8
[[rows]]
name = "c"
lora_targets = ["v", "q", "k"]
lora_alpha = 2.0
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five training slices and one volume."""
    folder = write_slices(tmp_path_factory.mktemp("data"))
    write_volume_h5(folder, "case0001")
    (folder / "lists" / "test_vol.txt").write_text("case0001\n")
    return folder


def table_file(folder: Path, text: str = TABLE) -> Path:
    (folder / "t.toml").write_text(text)
    return folder / "t.toml"


def finished(data: Path, folder: Path, extra: tuple[str, ...] = ()) -> list[Plan]:
    """Make the folders that the cells of the table leave, without training."""
    place = Place(str(data), str(data), folder / "out", "cpu", extra=extra)
    plans = plan_cells(read_table(table_file(folder)), place)
    for plan in plans:
        make_run(plan.folder, seed=plan.cell.seed)
        save_config(plan.args, plan.folder)
    return plans


def missing(folder: Path, *words: str) -> dict[str, str]:
    """Return the cells that the report leaves out."""
    output = folder / "out"
    ablate.main([str(folder / "t.toml"), "--output", str(output), "--report", *words])
    rows = json.loads((output / "table.json").read_text())["rows"]
    cells = [cell for row in rows for cell in row["cells"]]
    return {cell["name"]: cell["missing"] for cell in cells if cell["missing"]}


def test_a_row_that_was_edited_does_not_show_the_results_of_before(data: Path, tmp_path: Path):
    finished(data, tmp_path)
    assert not missing(tmp_path)
    table_file(tmp_path, TABLE.replace("rank = 8", "rank = 16").replace("[1, 2]", "[1, 2, 3]"))
    found = missing(tmp_path)
    assert found.keys() == {"a_s3", "b_s1", "b_s2", "b_s3", "c_s3"}
    assert "--rank 8 → 16" in found["b_s1"] and found["b_s3"] == "not started"
    # Also where other runs of the table go on.
    table = read_table(tmp_path / "t.toml")
    assert other_runs(table, tmp_path / "out").keys() == {"b_s1", "b_s2"}


def test_the_flags_after_the_dashes_are_compared_too(data: Path, tmp_path: Path):
    extra = ("--base_lr", "0.1", "--AdamW", "--vit_name=vit_b", "--ckpt", "gone.pth")
    finished(data, tmp_path, extra)
    assert not missing(tmp_path, "--", *extra)
    found = missing(tmp_path)
    assert len(found) == 6 and "--base_lr 0.1 → 0.005" in found["a_s1"]
    assert "--optimizer" in missing(tmp_path, "--", *extra, "--optimizer", "sgd")["a_s1"]


def test_a_copied_run_is_no_other_seed_or_row(data: Path, tmp_path: Path):
    plans = finished(data, tmp_path)
    folders = {plan.cell.name: plan.folder for plan in plans}
    for source, copy in (("a_s1", "a_s2"), ("a_s1", "b_s1")):
        shutil.rmtree(folders[copy])
        shutil.copytree(folders[source], folders[copy])
    results = folders["b_s2"] / "test" / "results.json"
    shutil.copyfile(folders["a_s2"] / "test" / "results.json", results)
    (folders["c_s1"] / "epoch_2.pth").write_bytes(b"newer")  # trained on after its test
    (folders["c_s2"] / "config.json").write_text('{"program": "SAMed", "rank": "4"}')
    found = missing(tmp_path)
    assert "--seed 1 → 2" in found["a_s2"] and "--rank 4 → 8" in found["b_s1"]
    assert "a_s1" in found["b_s2"] and "run ablate.py again" in found["b_s2"]
    assert "expected epoch_2.pth" in found["c_s1"]
    assert "rank = '4'" in found["c_s2"]
    assert len(found) == 5


def test_a_table_moved_as_a_whole_still_counts(data: Path, tmp_path: Path):
    finished(data, tmp_path)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "out").rename(moved / "out")
    table_file(moved)
    assert not missing(moved)


def test_a_file_of_the_user_is_found_before_anything_trains(data: Path, tmp_path: Path):
    words = [str(table_file(tmp_path)), "--root_path", str(data), "--device", "cpu"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.md").write_text("my notes")
    with pytest.raises(InputError, match=r"table\.md") as told:
        ablate.main([*words, "--output", str(tmp_path / "out")])
    assert "--overwrite" not in str(told.value)  # which ablate.py does not have
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["table.md"]


@pytest.mark.parametrize("words", [("--only", "a"), ("--part", "1/2"), ("--dry_run",)])
def test_a_report_takes_no_flags_without_effect(tmp_path: Path, words: tuple[str, ...]):
    (tmp_path / "out").mkdir()
    table_file(tmp_path)
    with pytest.raises(InputError, match=f"{words[0]} has no effect with --report"):
        missing(tmp_path, *words)


class Ended(Plan):
    """A cell whose training --patience has ended, so that it is continued and does nothing."""

    tested = True

    def train_command(self) -> list[str]:
        return ["true", "train.py"]

    def test_command(self) -> list[str]:
        return ["false", "test.py"]

    def results(self) -> object:
        return object() if self.tested else None


def outcome_of(job: Job) -> str:
    try:
        while (outcome := job.outcome()) is None:
            pass
        return outcome
    finally:
        job.claim.close()


def test_a_run_that_patience_ended_is_not_tested_again(data: Path, tmp_path: Path):
    place = Place(str(data), str(data), tmp_path / "out", "cpu")
    plan = plan_cells(read_table(table_file(tmp_path)), place)[0]
    one = Ended(**vars(plan))
    assert outcome_of(Job(one, None, 1)) == ""
    Ended.tested = False
    assert "it said nothing" in outcome_of(Job(one, None, 1))
