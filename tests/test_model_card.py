"""The model card of a run: true numbers, no name of a patient, and names that stay plain text."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_FLAGS, write_slices
from test_datasets import write_volume_h5

import test as testing
import train
from common.written import JOURNAL
from config.flags import train_parser
from config.parser import without_second_names
from config.run_folder import read_run
from training.model_card import CARD, card, differences, plain, write_card

REPOSITORY = Path(__file__).resolve().parent.parent
FLAGS = "--max_epochs 2 --batch_size 4 --val_every 1 --base_lr 0.001 --name run".split()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a training with validations."""
    folder = tmp_path_factory.mktemp("hospital")
    write_slices(folder, cases=3)
    train.main(["--root_path", str(folder), "--output", str(folder), *FLAGS, *TINY_FLAGS])
    write_volume_h5(folder, "mueller")
    (folder / "lists" / "test_vol.txt").write_text("mueller\n")
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run", copy_function=shutil.copy2)


def test_run(run: Path, data: Path) -> str:
    """Test the newest adapter of a run, and return the card."""
    testing.main(["--config", str(run), "--volume_path", str(data), "--device", "cpu"])
    return (run / CARD).read_text("utf-8")


test_run.__test__ = False


def rows(text: str) -> dict[str, list[str]]:
    """The rows of the table of scores, by the name of the class."""
    _, _, table = text.partition("| class |")
    lines = [line for line in table.splitlines()[2:] if line.startswith("| ")]
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name: values for name, *values in cells}


def test_training_writes_what_is_true(trained: Path):
    text = (trained / CARD).read_text("utf-8")
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    best = max((m for m in metrics if "score" in m), key=lambda m: m["score"])
    names = json.loads((trained / "config.json").read_text())["spec"]["class_names"]
    dsc = ["–" if value is None else f"{100 * value:.2f}" for value in best["dsc"]]
    assert rows(text) == {name: [value] for name, value in zip(names, dsc, strict=True)}
    digest = hashlib.sha256((trained / "epoch_1.pth").read_bytes()).hexdigest()
    assert f"epoch\\_1\\.pth, SHA-256 {digest}" in text
    assert "15 slices of 3 case(s), of which 1 case(s) were held out" in text
    assert "| --base\\_lr | 0.001 | 0.005 |" in text and "Not a medical device" in text
    front = text.split("---\n")[1].splitlines()
    assert text.startswith("---\nlicense: apache-2.0\n") and "datasets:\n- Synapse" in text
    assert all(line.startswith("- ") or ": " in line or line.endswith(":") for line in front)


def test_no_name_of_a_case_or_a_folder_is_in_it(run: Path, trained: Path):
    text = test_run(run, trained.parent)
    assert not any(word in text for word in ("case000", "mueller", "hospital", str(run.parent)))


def test_a_test_adds_its_scores(run: Path, trained: Path):
    text = test_run(run, trained.parent)
    results = json.loads((run / "test" / "results.json").read_text())
    assert "test: epoch\\_1\\.pth on 1 volume(s) of Synapse" in text
    for name, cells in rows(text).items():
        found = [case["scores"][name]["dsc"] for case in results["cases"]]
        known = [value for value in found if value is not None]
        assert cells[1] == (f"{100 * statistics.mean(known):.2f}" if known else "–")
    # The scores stay when training writes the card again.
    write_card(run, read_run(run))
    assert (run / CARD).read_text("utf-8") == text


def test_scores_of_another_adapter_are_not_shown(run: Path, trained: Path):
    test_run(run, trained.parent)
    stamp = (run / "test" / "results.json").stat().st_mtime + 1
    os.utime(run / "epoch_1.pth", (stamp, stamp))  # trained again since
    assert "test: " not in card(run, read_run(run))
    moved = run.rename(run.with_name("moved"))
    other = shutil.copytree(trained, run)  # the tested adapter is that of another run now
    assert other != moved and "test: " not in card(moved, read_run(moved))


def test_a_damaged_result_does_not_stop_training(run: Path):
    (run / "test").mkdir()
    for name in ("test/results.json", "check.json", "environment.json"):
        (run / name).write_text("[{")
    write_card(run, read_run(run))
    assert "unknown" in (run / CARD).read_text("utf-8")


def test_an_edited_card_stays(run: Path, trained: Path):
    path = run / CARD
    path.write_text(path.read_text("utf-8").replace("apache-2.0", "cc-by-nc-4.0"), "utf-8")
    edited = path.read_text("utf-8")
    assert test_run(run, trained.parent) == edited
    path.unlink()
    (path / "mine").mkdir(parents=True)  # Even a folder of this name does no harm.
    write_card(run, read_run(run))
    assert (path / "mine").is_dir()


def test_a_deleted_card_comes_back_only_with_training(run: Path, trained: Path):
    (run / CARD).unlink()
    testing.main(["--config", str(run), "--volume_path", str(trained.parent), "--device", "cpu"])
    assert not (run / CARD).exists()
    write_card(run, read_run(run))
    assert (run / CARD).is_file()


def test_a_run_that_just_began_has_a_card(run: Path, tmp_path: Path):
    new = tmp_path / "new"
    new.mkdir()
    write_card(new, read_run(run))
    text = (new / CARD).read_text("utf-8")
    assert "none yet" in text and "Nothing was measured yet" in text
    assert {path.name for path in new.iterdir()} == {CARD, JOURNAL}


@pytest.mark.parametrize(
    "name",
    (
        "[click](http://evil.example)",
        "<script>alert(1)</script>",
        "a|b",
        "![x](y)",
        "`rm -rf`",
        "**bold** _it_ ~~no~~",
        "www.evil.example",
        "$x$ &amp; \\\\",
        "@all #1",
    ),
)
def test_names_of_the_data_mean_nothing_to_markdown_and_yaml(run: Path, name: str):
    config = read_run(run)
    names = [name, *config["spec"]["class_names"][1:]]
    whole = name.replace("/", "").replace("\\", "").strip()  # others are refused
    text = card(run, config | {"spec": config["spec"] | {"name": whole, "class_names": names}})
    assert "datasets:" not in text and text.count("\n---\n") == 1
    assert f"# SAMed, trained on {plain(whole)}\n" in text
    row = next(line for line in text.splitlines() if line.startswith(f"| {plain(name)} |"))
    assert undone(row.split(" | ")[0].removeprefix("| ")) == name
    bare = re.sub(r"\\.|&(lt|gt|amp|#64);", "", plain(name))
    assert not set("[]<>`*_|~$@#\\") & set(bare)
    assert "://" not in bare and "www." not in bare


def undone(text: str) -> str:
    """What a reader of the Markdown sees."""
    for entity, letter in (("&lt;", "<"), ("&gt;", ">"), ("&#64;", "@")):
        text = text.replace(entity, letter)
    parts, index = [], 0
    while index < len(text):
        index += text[index] == "\\"
        parts.append(text[index])
        index += 1
    return "".join(parts).replace("&amp;", "&")


def given(*words: str) -> dict[str, Any]:
    flags = train_parser().flags
    return without_second_names(vars(train_parser().parse_args(words)), flags, "test")


def test_the_published_recipe_has_no_differences():
    recipe = json.loads((REPOSITORY / "recipes" / "samed.json").read_text())
    plain_recipe = without_second_names(recipe, train_parser().flags, "recipe")
    assert differences(given() | plain_recipe) == []
    assert differences({}) == [("--optimizer", "sgd", "adamw"), ("--warmup", "no", "yes")]
    changed = differences(given("--warmup", "--AdamW", "--lora_targets", "q", "k", "--rank", "8"))
    assert changed == [("--rank", "8", "4"), ("--lora_targets", "q k", "q v")]
