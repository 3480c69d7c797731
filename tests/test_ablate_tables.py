"""Tables of ablations: what a table file may say, and what is refused before anything trains."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from conftest import write_slices
from test_datasets import write_volume_h5

import ablate
from ablation import checks
from ablation.checks import check_folder
from ablation.plans import Place, plan_cells
from ablation.table import folder_name, read_table
from common.errors import InputError
from config.flags import train_parser
from config.run_folder import save_config
from config.settings import REPOSITORY, parse_args

SHIPPED = sorted((REPOSITORY / "ablations").glob("*.toml"))
TINY = {"vit_name": "vit_tiny", "ckpt": "none", "img_size": 64, "batch_size": 2, "n_gpu": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five training slices and one volume of 8 classes."""
    folder = write_slices(tmp_path_factory.mktemp("data"))
    write_volume_h5(folder, "case0001")
    (folder / "lists" / "test_vol.txt").write_text("case0001\n")
    return folder


def write(folder: Path, text: str, base: dict = TINY) -> Path:
    path = folder / "table.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in base.items()]
    title = "" if text.startswith("title") else "title = 'A test'\n"
    path.write_text(title + text + "\n[base]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def place(data: Path, output: Path, *extra: str) -> Place:
    return Place(str(data), str(data), output, device="cpu", extra=extra)


def test_a_grid_is_the_product_of_its_axes(tmp_path: Path, data: Path):
    path = write(
        tmp_path, "seeds = [1, 2]\n[axes]\nrank = [1, 4]\nlora_targets = ['q', ['q', 'v']]"
    )
    table = read_table(path)
    assert [row.name for row in table.rows] == [
        f"rank {rank}, lora_targets {targets}" for rank in (1, 4) for targets in ("q", "q v")
    ]
    assert table.base == "rank 1, lora_targets q" and table.seeds == (1, 2)
    plans = plan_cells(table, place(data, tmp_path / "out"))
    found = {(one.args.rank, tuple(one.args.lora_targets), one.args.seed) for one in plans}
    assert len(plans) == len(found) == 8
    assert plans[3].cell.name == "rank-1-lora_targets-q-v_s2"
    assert plans[3].folder == tmp_path / "out" / plans[3].cell.name


def test_steps_are_those_of_training(tmp_path: Path, data: Path):
    rows = [
        "batch_size = 2\nmax_epochs = 4\nstop_epoch = 3",  # 5 slices: 3 steps an epoch
        "batch_size = 5\nmax_epochs = 4\nstop_epoch = 9",
        "batch_size = 1\nmax_iterations = 7",
    ]
    text = "".join(f"[[rows]]\nname = 'r{i}'\n{row}\n" for i, row in enumerate(rows))
    plans = plan_cells(read_table(write(tmp_path, text)), place(data, tmp_path))
    assert [(one.steps, one.last_epoch) for one in plans] == [(9, 2), (4, 3), (7, 1)]


def test_a_recipe_wins_over_the_base_and_a_row_over_its_recipe(tmp_path: Path, data: Path):
    text = "[[rows]]\nname = 'a'\nrank = 7\n"
    text += "[[rows]]\nname = 's'\nconfig = 'recipes/samed_s.json'\nlr_exp = 0.5"
    base = {"rank": 9, "clip_grad": 0.5}
    own, recipe = (
        one.args
        for one in plan_cells(read_table(write(tmp_path, text, base)), place(data, tmp_path))
    )
    assert (own.rank, own.optimizer, own.clip_grad) == (7, "sgd", 0.5)
    assert (recipe.rank, recipe.optimizer, recipe.clip_grad) == (4, "adamw", 0.5)
    assert (recipe.lr_exp, recipe.module) == (0.5, "sam_lora_image_encoder_mask_decoder")


def test_flags_after_the_table_win(tmp_path: Path, data: Path):
    table = read_table(write(tmp_path, "[axes]\nrank = [1, 2]"))
    for one in plan_cells(table, place(data, tmp_path, "--img_size", "32", "--AdamW")):
        assert one.args.img_size == 32 and one.args.optimizer == "adamw"
    for words, told in [
        (("--rank", "3"), "the axis rank changes nothing"),
        (("--seed", "3"), "--seed stands after --"),
        (("--config", "x"), "--config stands after --"),
    ]:
        with pytest.raises(InputError, match=told):
            plan_cells(table, place(data, tmp_path, *words))


def test_names_of_folders_are_plain_short_and_different():
    names = ["a b", "SAMed_s (ours)", "α", "x" * 80, "x" * 81, "..", "ce+dice, half each"]
    found = [folder_name(name, 4294967295) for name in names]
    assert found[0] == "a-b_s4294967295" and len(set(found)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", name) and name[0] != "." for name in found)


WRONG = {
    "title": ("[axes", "is not TOML"),
    "unknown key": ("speed = 3\n[axes]\nrank = [1, 2]", "has the key 'speed'"),
    "both": ("[axes]\nrank = [1, 2]\n[[rows]]\nname = 'a'", "both"),
    "neither": ("seeds = [1]", "neither"),
    "unknown flag": ("[axes]\nrnak = [1, 2]", "did you mean --rank"),
    "type": ("[axes]\nrank = [1, 'four']", "has rank = 'four', expected a value of type int"),
    "limit": ("[axes]\nrank = [0, 4]", "rank = 0, expected 1…4,096"),
    "choice": ("[axes]\nloss = ['ce', 'mse']", "loss = 'mse', expected"),
    "set by the runner": ("[axes]\nseed = [1, 2]", "list it in seeds"),
    "output": ("[[rows]]\nname = 'a'\noutput = 'x'", "which ablate.py sets for every run"),
    "empty axis": ("[axes]\nrank = []", "expected a list of values"),
    "no axis": ("[axes]", "is empty"),
    "dead axis": ("[axes]\nrank = [1, 2]\nwarmup_period = [5, 6]", "warmup_period changes nothing"),
    "one value": ("[axes]\nrank = [4]", "the axis rank changes nothing"),
    "a value twice": ("[axes]\nrank = [4, 4]", "[axes] has rank = 4 twice"),
    "order": ("[axes]\nlora_targets = [['q', 'v'], ['v', 'q']]", "lora_targets changes nothing"),
    "same rows": (
        "[[rows]]\nname = 'a'\n[[rows]]\nname = 'b'\nlora_targets = ['v', 'q']\nrank = 4",
        "'a' and 'b' have the same settings",
    ),
    "same steps": (
        "[[rows]]\nname = 'a'\nmax_epochs = 9\nstop_epoch = 9\n[[rows]]\nname = 'b'\n"
        "max_epochs = 9\nstop_epoch = 12",
        "the same settings",
    ),
    "same names": ("[[rows]]\nname = 'a b'\n[[rows]]\nname = 'A-b'\nrank = 3", "same folder"),
    "no name": ("[[rows]]\nrank = 3", "has the name None"),
    "control character": ('[[rows]]\nname = "a\\u0007"', "expected a text of one line"),
    "seeds": ("seeds = [1, 1]\n[axes]\nrank = [1, 2]", "names a seed twice"),
    "no seed": ("seeds = []\n[axes]\nrank = [1, 2]", "is empty"),
    "seed": ("seeds = [-1]\n[axes]\nrank = [1, 2]", "seed = -1, expected"),
    "base row": ("base_row = 'x'\n[axes]\nrank = [1, 2]", "expected the name of a row"),
    "published": ("[[rows]]\nname = 'a'\npublished = 'nnU-Net'", "expected a key of published"),
    "second name": ("[axes]\nAdamW = [true, false]", "another name of --optimizer"),
    "contradiction": (
        "[[rows]]\nname = 'a'\nAdamW = true\noptimizer = 'sgd'",
        "contradict each other",
    ),
    "combination": ("[[rows]]\nname = 'a'\nval_cases = 2", "row 'a': --val_cases and --patience"),
    "module": ("[[rows]]\nname = 'a'\nmodule = 'nothing'", "row 'a': "),
    "recipe": ("[[rows]]\nname = 'a'\nconfig = 'recipes/x.json'", "does not exist"),
    "switch": (
        "[[rows]]\nname = 'a'\nconfig = 'recipes/samed.json'\nwarmup = false",
        "cannot be unset",
    ),
    "test flag": ("[axes]\nrank = [1, 2]\n[test]\nnsd = 2.0", "is no flag of test.py"),
    "test runner": ("[axes]\nrank = [1, 2]\n[test]\nlora_ckpt = 'x'", "ablate.py sets"),
    "test network": ("[axes]\nrank = [1, 2]\n[test]\nrank = 3", "the run records"),
    "test limit": ("[axes]\nrank = [1, 2]\n[test]\nnsd_tolerance = -1", "nsd_tolerance = -1"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_table_is_refused_in_a_sentence(what: str, data: Path, tmp_path: Path):
    text, told = WRONG[what]
    path = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        plan_cells(read_table(path), place(data, tmp_path / "out"))
    assert told in str(error.value) and (str(path) in str(error.value) or what == "recipe")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"\xff", b"a = " + b"[" * 5000, b"x = 1" + b"0" * 5000])
def test_a_file_that_is_no_table_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "t.toml").write_bytes(content)
    with pytest.raises(InputError, match=r"is not TOML|has the key"):
        read_table(tmp_path / "t.toml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_table_of_the_repository_is_right(
    path: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    flags = ["--root_path", str(data), "--output", str(tmp_path / "out"), "--device", "cpu"]
    ablate.main([str(path), *flags, "--dry_run"])
    shown = capsys.readouterr().out.splitlines()
    trainings = [shlex.split(line) for line in shown if "train.py" in line]
    assert len(trainings) == len(read_table(path).cells) and "steps in all" in shown[-1]
    assert path.read_text().startswith("# ") and not (tmp_path / "out").exists()


def test_the_rows_of_the_paper_are_the_recipes(data: Path, tmp_path: Path):
    table = read_table(REPOSITORY / "ablations" / "paper_main.toml")
    settings = {}
    for one in plan_cells(table, place(data, tmp_path)):
        settings[one.cell.row.published] = checks.settings_of(one.args, one.steps)
    for key, recipe in [("SAMed", "samed"), ("SAMed_s", "samed_s"), ("SAMed_h", "samed_h")]:
        file = str(REPOSITORY / "recipes" / f"{recipe}.json")
        args = parse_args(train_parser(), ["--root_path", str(data), "--config", file])
        assert settings[key] == checks.settings_of(args, args.stop_epoch)  # one step an epoch


def test_every_knob_of_the_issue_stands_in_a_table():
    named: set[str] = set()
    for path in SHIPPED:
        content = tomllib.loads(path.read_text())
        for part in [content.get("axes", {}), *content.get("rows", [])]:
            named |= part.keys()
    assert named >= {
        *("rank", "lora_targets", "lora_blocks", "lora_alpha", "lora_dropout", "lora_kind"),
        *("train", "loss", "class_weights", "schedule", "optimizer", "augment", "input_slices"),
        *("decoder_depth", "logits", "ema"),
    }


def test_the_folder_of_another_run_is_refused(data: Path, tmp_path: Path):
    (one, _) = plan_cells(
        read_table(write(tmp_path, "[axes]\nrank = [1, 2]")), place(data, tmp_path)
    )
    one.folder.mkdir(parents=True)
    check_folder(one.folder, one.args)  # a training was killed there before it noted its settings
    save_config(one.args, one.folder)
    check_folder(one.folder, one.args)
    for text, told in [
        ("[axes]\nrank = [1, 2]\nbase_lr = [1e-3, 2e-3]", "--base_lr 0.005 → 0.001"),
        ("[axes]\nrank = [1, 2]\nstop_epoch = [3, 4]", "--stop_epoch 160 → 3"),
        ("[axes]\nrank = [1, 2]\nlist_dir = ['a', 'b']", "does not exist"),
    ]:
        with pytest.raises(InputError, match=told):
            other = plan_cells(read_table(write(tmp_path, text)), place(data, tmp_path))[0]
            check_folder(one.folder, other.args)
    (one.folder / "config.json").unlink()
    (one.folder / "thesis.txt").touch()
    with pytest.raises(InputError, match=r"holds thesis.txt but no config.json"):
        check_folder(one.folder, one.args)


def test_parts_share_all_runs(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = write(tmp_path, "seeds = [1, 2, 3]\n[axes]\nrank = [1, 2, 4]")
    flags = [str(path), "--root_path", str(data), "--output", str(tmp_path / "o"), "--dry_run"]

    def names(*more: str) -> list[str]:
        ablate.main([*flags, *more])
        return re.findall(r"^# (\S+):", capsys.readouterr().out, re.MULTILINE)

    parts = [names("--part", f"{number}/4") for number in (1, 2, 3, 4)]
    shared = [name for part in parts for name in part]
    assert sorted(shared) == sorted(names()) and len(shared) == 9
    assert len(names("--only", "rank 2", "rank 4")) == 6
    for wrong in ("0/4", "5/4", "1", "a/b", "1/0", "٣/٤"):
        with pytest.raises(InputError, match="expected K/N"):
            names("--part", wrong)
    with pytest.raises(InputError, match="which is no row of"):
        names("--only", "rank 3")
