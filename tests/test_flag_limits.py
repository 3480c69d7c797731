"""Every value of every flag is taken or refused in one sentence, before anything is built."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.errors import exit_on_bad_input
from config.flags import predict_parser, train_parser
from config.flags import test_parser as parser_of_test
from config.parser import LONGEST_TEXT, Flag, Parser
from config.settings import parse_args
from lora.adapter_file import SETTINGS_KEY
from preprocess import flags as prepare_flags
from tools.adapter import build_parsers
from utils import choose_device

PARSERS: dict[str, Callable[[], Parser]] = {
    "train": train_parser,
    "test": parser_of_test,
    "predict": predict_parser,
    "merge": lambda: build_parsers()[1],
}
NUMBERS = ["-1", "0", "1000000", "1" + 12 * "0", "1" + 30 * "0", "9" * 5000, "-1e308", "1e400"]
NUMBERS += ["nan", "inf", "-inf", "", " ", "0x10", "１２", "1_0"]
FLAGS = [(program, flag) for program, make in PARSERS.items() for flag in make().flags.values()]
NUMERIC = [(p, f) for p, f in FLAGS if f.type in (int, float)]
IN_RUNS = [(p, f) for p, f in NUMERIC if "config" in PARSERS[p]().flags]
TEXTS = [(p, f) for p, f in FLAGS if f.type is str]


def ids(rows: list[tuple[str, Flag]]) -> list[str]:
    return [f"{program}-{flag.name}" for program, flag in rows]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest adapter."""
    path = tmp_path_factory.mktemp("adapter") / "a.pth"
    known = {"vit_name": "vit_tiny", "img_size": 64, "num_classes": 2, "class_names": ["a", "b"]}
    torch.save({"w_a_000": torch.zeros(2, 192), SETTINGS_KEY: known}, path)
    return path


def required(program: str, adapter: Path) -> list[str]:
    given = {
        "train": ["--root_path", "data", "--vit_name", "vit_tiny", "--ckpt", "none"],
        "test": ["--volume_path", "data"],
        "predict": ["--input", "scan", "--output", "out"],
        "merge": ["out.pth"],
    }[program]
    return given if program == "train" else [*given, "--lora_ckpt", str(adapter)]


def outcome(parser: Parser, argv: list[str], capsys) -> tuple[argparse.Namespace | None, str]:
    """Parse as a program does; return the values, or None and the sentence."""
    try:
        with exit_on_bad_input():
            return parse_args(parser, argv), ""
    except SystemExit as ended:
        told = capsys.readouterr().err
        told = [line for line in told.splitlines() if not line.startswith("warning: ")]
        assert ended.code == 2 and len(told) == 1 and told[0].startswith("error: ")
        return None, told[0]


@pytest.mark.parametrize(("program", "flag"), NUMERIC, ids=ids(NUMERIC))
def test_every_number_has_limits(program: str, flag: Flag):
    assert flag.choices or (flag.high is not None and (flag.low, flag.above) != (None, None))
    assert flag.choices or flag.high <= (2**63 - 1 if flag.type is int else 1e30)


@pytest.mark.parametrize(("program", "flag"), NUMERIC, ids=ids(NUMERIC))
def test_a_number_is_taken_or_refused(program: str, flag: Flag, adapter: Path, capsys):
    given = required(program, adapter)
    for value in NUMBERS:
        words = [value, value] if flag.takes_list else [value]
        args, told = outcome(PARSERS[program](), [*given, f"--{flag.name}", *words], capsys)
        if args is None:
            assert f"--{flag.name}" in told or "--window" in told, (value, told)
        elif not flag.choices:
            low = flag.low if flag.above is None else flag.above
            assert low <= getattr(args, flag.name) <= flag.high


@pytest.mark.parametrize(("program", "flag"), IN_RUNS, ids=ids(IN_RUNS))
def test_a_number_in_a_file_is_taken_or_refused(
    program, flag: Flag, adapter: Path, tmp_path, capsys
):
    for value in (-1, 10**12, 10**18, 1e300, "1", "", True, [1], {}, None):
        (tmp_path / "config.json").write_text(
            json.dumps({"program": "SAMed", "seed": 1} | {flag.name: value})
        )
        given = [*required(program, adapter), "--config", str(tmp_path)]
        args, told = outcome(PARSERS[program](), given, capsys)
        taken = flag.from_config and value is not None
        if args is None:
            assert flag.name in told
        elif taken and not flag.choices:
            low = flag.low if flag.above is None else flag.above
            assert low <= getattr(args, flag.name) <= flag.high


@pytest.mark.parametrize(("program", "flag"), TEXTS, ids=ids(TEXTS))
def test_a_text_is_not_empty_and_can_be_a_path(program: str, flag: Flag, adapter: Path, capsys):
    given = required(program, adapter)
    for value in ("", "a\0b", "x" * (LONGEST_TEXT + 1), "x" * 1000, "ä"):
        if flag.name in ("resume", "config") and value == "x" * 1000:
            continue  # The operating system refuses it; see below.
        args, told = outcome(PARSERS[program](), [*given, f"--{flag.name}", value], capsys)
        bad = value == "" or "\0" in value or len(value) > LONGEST_TEXT
        assert not (bad and args)
        assert args or told


@pytest.mark.parametrize("program", PARSERS)
def test_a_path_that_no_system_can_hold_is_refused(program: str, adapter: Path, capsys):
    given = [*required(program, adapter), "--lora_ckpt", "x" * 1000]
    args, told = outcome(PARSERS[program](), given, capsys)
    assert args is None and "cannot be used" in told


@pytest.mark.parametrize(
    "name",
    "foo cuda:99 cuda:-1 cuda:999999999999999 cuda: mps meta xpu cpu:0 CPU cuda:１ \x1b[2J".split(),
)
def test_an_unknown_device_is_refused(name: str, capsys):
    with pytest.raises(SystemExit) as ended, exit_on_bad_input():
        choose_device(name)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: --device") and "\x1b" not in told


def test_the_devices_of_this_machine_are_taken():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("flag", prepare_flags.LIMITS)
def test_numbers_of_prepare_have_limits(flag: str, tmp_path: Path, capsys):
    low, high = prepare_flags.LIMITS[flag]
    more = {"fold": ["--folds", "5"]}.get(flag, [])
    for value in NUMBERS:
        words = [value, value] if flag == "window" else [value]
        argv = ["--input", str(tmp_path / "i"), "--output", str(tmp_path / "o"), *more]
        try:
            with exit_on_bad_input():
                args = prepare_flags.build_parser().parse_args([*argv, f"--{flag}", *words])
                prepare_flags.check_flags(args)
        except SystemExit as ended:
            told = capsys.readouterr().err
            assert ended.code == 2 and told.startswith("error: ") and f"--{flag}" in told
            continue
        found = getattr(args, flag)
        assert all(low <= v <= high for v in (found if isinstance(found, list) else [found]))


def test_every_number_of_prepare_is_in_the_table():
    actions = prepare_flags.build_parser()._actions
    numeric = {action.dest for action in actions if action.type in (int, float)}
    # These two have checks of their own: both limits are excluded.
    assert numeric == {*prepare_flags.LIMITS, "test_share", "label_threshold"}


@pytest.mark.parametrize("value", [10**11, -1, 10**18, 1.5, "4", [4], {"a": 1}, True])
def test_numbers_in_an_adapter_have_limits(value: object, adapter: Path, tmp_path: Path, capsys):
    state = torch.load(adapter, weights_only=True)
    for name in ("rank", "img_size", "num_classes"):
        torch.save({**state, SETTINGS_KEY: state[SETTINGS_KEY] | {name: value}}, tmp_path / "x.pth")
        given = required("predict", tmp_path / "x.pth")
        args, told = outcome(predict_parser(), given, capsys)
        assert args is None and f"x.pth has {name} = " in told
