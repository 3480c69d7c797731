"""The runs of a table: their command lines, what these mean, and how far each run is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch

from ablation.checks import check_folder, check_rows, settings_of
from ablation.table import SET_BY_RUNNER, Cell, Row, Table
from common.errors import InputError
from config.flags import test_parser, train_parser
from config.inference_flags import TEST
from config.network_settings import write_plainly
from config.parser import Parser, by_name, check_limits, that_change_numbers
from config.recipe_flags import slices_of_update, steps_of_run
from config.run_folder import CONFIG_FILE, read_config_file, read_run
from config.settings import REPOSITORY, known_values, parse_args, recorded_values
from datasets.dataset_synapse import Synapse_dataset
from evaluation.test_runs import TestRun, read_json
from training.batches import EpochBatches
from training.validation import hold_out
from utils import build_model


@dataclass(frozen=True)
class Place:
    """Where the runs of a table read and write, and what is the same for all of them."""

    root_path: str
    volume_path: str
    output: Path
    device: str = "auto"
    same_code: bool = False
    extra: tuple[str, ...] = ()  # words for train.py after all others

    def words(self) -> list[str]:
        """Return the flags that train.py and test.py both get."""
        words = ["--device", self.device, "--processes", "1"]
        return [*words, "--same_code"] if self.same_code else words


@dataclass(frozen=True)
class Plan:
    """A cell, its command lines and what they mean."""

    cell: Cell
    folder: Path
    train_words: list[str]  # without --resume
    test_words: list[str]
    args: argparse.Namespace  # what `train_words` mean
    steps: int  # updates of the whole run
    last_epoch: int  # number of the epoch in which it ends

    def train_command(self) -> list[str]:
        """Return the command that begins the run or continues it."""
        goes_on = ["--resume", str(self.folder)] if (self.folder / CONFIG_FILE).is_file() else []
        return [sys.executable, str(REPOSITORY / "train.py"), *self.train_words, *goes_on]

    def test_command(self) -> list[str]:
        """Return the command that tests the run."""
        return [sys.executable, str(REPOSITORY / "test.py"), *self.test_words]

    def trained(self) -> bool:
        """Return whether the run is at its end; False also if --patience ended it before."""
        return (self.folder / f"epoch_{self.last_epoch}.pth").is_file()

    def results(self) -> TestRun | None:
        """Return the results of the newest adapter with the settings of today; None: there are
        none, or another adapter or other settings made them.
        """
        file = self.folder / "test" / "results.json"
        try:
            found = read_json(file)
            now = parse_args(test_parser(), self.test_words)
        except InputError:  # also: there is no adapter yet
            return None
        before, wanted = _of_tests(found.settings["flags"]), _of_tests(recorded_values(now))
        newer = file.stat().st_mtime_ns >= Path(now.lora_ckpt).stat().st_mtime_ns
        return found if newer and before == wanted else None


def _of_tests(flags: Mapping[str, Any]) -> dict[str, Any]:
    kept = that_change_numbers(flags, by_name(TEST))
    kept.pop("output_dir", None)  # The folder of runs may have moved.
    return kept


def plan_cells(table: Table, place: Place) -> list[Plan]:
    """Return what every cell of a table will do, after checking all that is known before.

    Raises:
        InputError: flags that do not go together, an axis that changes nothing, two rows that are
            the same, data that are missing.
    """
    _check_extra(place.extra)
    tests = _words(table.test)
    _check_test_flags(table, tests)
    slices = _Slices(place.root_path)
    volumes: set[str | None] = set()
    plans = []
    for cell in table.cells:
        folder = place.output / cell.name
        words = [
            *("--root_path", place.root_path, "--output", str(place.output), "--name", cell.name),
            *("--seed", str(cell.seed), *place.words(), *_words(cell.row.flags), *place.extra),
        ]
        with _naming(table.path, cell.row):
            args = parse_args(_raising(train_parser()), words)
        per_epoch = slices.steps_per_epoch(args)
        if args.list_dir not in volumes:
            classes = args.num_classes
            Synapse_dataset(place.volume_path, args.list_dir, "test_vol", num_classes=classes)
            volumes.add(args.list_dir)
        steps = steps_of_run(args, per_epoch)
        test_words = ["--config", str(folder), "--volume_path", place.volume_path]
        plans.append(
            Plan(
                cell=cell,
                folder=folder,
                train_words=words,
                test_words=[*test_words, *place.words(), *tests],
                args=args,
                steps=steps,
                last_epoch=(steps - 1) // per_epoch,
            )
        )
    check_rows(table, {one.cell.row.name: settings_of(one.args, one.steps) for one in plans})
    return plans


def other_runs(table: Table, output: Path, extra: Sequence[str] = ()) -> dict[str, str]:
    """Return the cells whose folders hold runs of other flags than the table's, and why.

    Only the flags that the table and `extra` name are compared, so neither data nor base weights
    need be there.

    Args:
        extra: words for train.py after all others.
    """
    _check_extra(extra)
    found = {}
    for cell in table.cells:
        folder = output / cell.name
        if not (folder / CONFIG_FILE).is_file():
            continue
        try:
            with _naming(table.path, cell.row):
                named = _named_flags(cell, extra)
            defaults = vars(train_parser().parse_args([])) | {"code": None}
            check_folder(folder, argparse.Namespace(**(defaults | read_run(folder) | named)))
        except InputError as error:
            found[cell.name] = str(error)
    return found


def _named_flags(cell: Cell, extra: Sequence[str]) -> dict[str, Any]:
    """Return the flags that a table sets for a cell, as its config.json has them."""
    parser, flags = _raising(train_parser()), dict(cell.row.flags)
    if (config := flags.pop("config", None)) is not None:
        recipe = known_values(read_config_file(Path(config)), parser.flags, config)
        flags = {name: value for name, value in recipe.items() if value is not None} | flags
    args = parser.parse_args([*_words(flags), *extra, "--seed", str(cell.seed)])
    write_plainly(args)
    # A second name, as --AdamW, sets another flag.
    names = {(parser.flags[name].means or (name,))[0] for name in _flag_names(extra)}
    return {name: getattr(args, name) for name in (*flags, *names, "seed")}


def build_networks(table: Table, plans: Sequence[Plan]) -> None:
    """Build the network of every row once, on the CPU, so that what does not fit is found now.

    Raises:
        InputError: base weights are missing, or an adapter or a flag does not fit the network.
    """
    for one in {plan.cell.row.name: plan for plan in plans}.values():
        with _naming(table.path, one.cell.row):
            build_model(one.args, torch.device("cpu"), move_heads=True)


@contextmanager
def _naming(path: Path, row: Row) -> Iterator[None]:
    """Say in an error which row of which table it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}, row {row.name!r}: {error}") from None


def _words(flags: Mapping[str, Any]) -> list[str]:
    """Return flags as the words of a command line."""
    words: list[str] = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not False:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return words


def _raising(parser: Parser) -> Parser:
    """Let a parser raise an `InputError` instead of printing its error."""

    def error(message: str) -> NoReturn:
        raise InputError(message)

    parser.error = error
    return parser


def _check_extra(words: Sequence[str]) -> None:
    taken = [name for name in _flag_names(words) if name in (*SET_BY_RUNNER["train.py"], "config")]
    if taken:
        raise InputError(
            f"--{taken[0]} stands after --, but ablate.py sets it for every run; leave it out, or "
            "pass it before --"
        )
    parser = train_parser()
    check_limits(parser.flags.values(), parser.parse_args(words))


def _flag_names(words: Sequence[str]) -> list[str]:
    return [word.split("=")[0].removeprefix("--") for word in words if word.startswith("--")]


def _check_test_flags(table: Table, words: Sequence[str]) -> None:
    """Check the flags of test.py as far as that is possible without a run."""
    parser = _raising(test_parser())
    try:
        check_limits(parser.flags.values(), parser.parse_args(words))
    except InputError as error:
        raise InputError(f"{table.path}, [test]: {error}") from None


class _Slices:
    """The training slices of the runs, looked up once for all runs of the same lists."""

    def __init__(self, root_path: str) -> None:
        self.dataset = cache(
            lambda lists, classes: Synapse_dataset(root_path, lists, "train", num_classes=classes)
        )
        self.left = cache(
            lambda lists, classes, cases, seed: hold_out(self.dataset(lists, classes), cases, seed)
        )

    def steps_per_epoch(self, args: argparse.Namespace) -> int:
        """Return the number of updates of an epoch."""
        dataset = self.dataset(args.list_dir, args.num_classes)
        if args.val_every:
            dataset, _ = self.left(args.list_dir, args.num_classes, args.val_cases, args.seed)
        return len(EpochBatches(len(dataset), slices_of_update(vars(args)), args.seed))
