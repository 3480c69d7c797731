"""Flags are written in full, mistakes get one line; which run `--config` means."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from common.arguments import ArgumentParser
from common.errors import InputError
from config.flags import predict_parser, train_parser
from config.flags import test_parser as parser_of_test
from config.run_folder import run_name
from config.settings import config_path, parse_args


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--lr", "1e-4"], "--lr is no flag of train.py, did you mean --base_lr or --lr_exp?"),
        (["--batch", "4"], "did you mean --batch_size"),
        (["--epochs=3"], "did you mean --max_epochs or --stop_epoch?"),
        (["--Adamw"], "did you mean --AdamW?"),
        (["--xyzzy"], "--xyzzy is no flag of train.py (see"),
        (
            ["one", "two"],
            "one, two belongs to no flag, or a flag got several values; --config takes one folder",
        ),
        (["--rank", "four"], "argument --rank: invalid int value: 'four'"),
    ],
)
def test_a_mistaken_flag_gets_one_line_with_the_nearest_name(argv, told: str, capsys):
    with pytest.raises(SystemExit) as ended:
        train_parser().parse_args(argv)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and told in lines[0]


def test_no_program_guesses_at_abbreviations():
    parsers = [train_parser(), parser_of_test(), predict_parser()]
    assert all(isinstance(parser, ArgumentParser) and not parser.allow_abbrev for parser in parsers)


def test_a_folder_of_runs_means_its_newest(tmp_path: Path, capsys):
    for age, name in enumerate(("b", "a", "c")):
        (tmp_path / name).mkdir()
        config = tmp_path / name / "config.json"
        config.write_text(json.dumps({"program": "SAMed", "rank": age}))
        os.utime(config, (1000 - age, 1000 - age))
    assert config_path(str(tmp_path)) == tmp_path / "b/config.json"
    assert "the newest of 3 runs" in capsys.readouterr().out
    assert config_path(str(tmp_path / "a")) == tmp_path / "a/config.json"
    assert config_path(str(tmp_path / "c/config.json")) == tmp_path / "c/config.json"
    with pytest.raises(InputError, match="pass a run folder"):
        config_path(str(tmp_path / "none"))


def test_a_run_can_be_named(tmp_path: Path):
    given = ["--root_path", str(tmp_path), "--vit_name", "vit_tiny", "--ckpt", "none"]
    assert run_name(parse_args(train_parser(), [*given, "--name", "first.try"])) == "first.try"
    assert "vit_tiny" in run_name(parse_args(train_parser(), given))
    for wrong in ("../up", "..", "a/b", "", "a b", "x" * 61):
        with pytest.raises(InputError, match="--name is"):
            parse_args(train_parser(), [*given, "--name", wrong])
