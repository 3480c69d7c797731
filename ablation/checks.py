"""When two runs of a table are the same, and when a run folder is not that of the table's run."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ablation.table import Table
from common.errors import InputError, first_few
from config.flags import train_parser
from config.run_folder import (
    CONFIG_FILE,
    LOCK_FILE,
    differences,
    fingerprint_data,
    read_run,
    settings_to_keep,
)
from config.settings import known_values
from config.shared_flags import SCRATCH
from datasets.dataset_synapse import Synapse_dataset
from training.validation import hold_out

# Flags that decide the result of a whole run, although a run may go on with other values of them.
OF_WHOLE_RUNS = (
    *("stop_epoch", "max_iterations", "patience", "skip_nan"),
    *("ckpt", "lora_ckpt", "list_dir"),
)
# What train.py writes before config.json, which makes its folder that of a run.
BEFORE_CONFIG = {LOCK_FILE, "log.txt", "check.json", "check.txt", "environment.json"}


def settings_of(args: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Return the settings that decide the result of a run, besides its seed and its data.

    Two runs of equal settings are the same run, however their flags were written.

    Args:
        args: all flags of train.py, from `parse_args`, which brings targets, blocks and alpha into
            one form, and refuses most flags that have no effect.
        steps: updates of the whole run.
    """
    values = settings_to_keep(vars(args)) | {name: getattr(args, name) for name in OF_WHOLE_RUNS}
    values["steps"] = steps
    without_effect = {"seed", "stop_epoch", "max_iterations"}
    if not args.warmup:
        without_effect.add("warmup_period")
    if args.ckpt == SCRATCH:  # All heads start at random.
        without_effect.add("fresh_heads")
    return {name: value for name, value in values.items() if name not in without_effect}


def check_rows(table: Table, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse an axis that changes nothing, and rows that are the same.

    Args:
        settings: of each row, by its name.
    """
    keys = {name: json.dumps(values, sort_keys=True) for name, values in settings.items()}
    for axis in table.axes:
        found = defaultdict(set)  # the settings of the rows that differ in this axis alone
        for row in table.rows:
            others = [row.flags[other] for other in table.axes if other != axis]
            found[json.dumps(others)].add(keys[row.name])
        if all(len(same) == 1 for same in found.values()):
            raise InputError(
                f"{table.path}: the axis {axis} changes nothing, because all its values give the "
                "same settings; give it other values, or move it to [base]"
            )
    seen: dict[str, str] = {}
    for row in table.rows:
        if keys[row.name] in seen:
            raise InputError(
                f"{table.path}: the rows {seen[keys[row.name]]!r} and {row.name!r} have the same "
                "settings; change one or leave it out"
            )
        seen[keys[row.name]] = row.name


def check_folder(folder: Path, args: argparse.Namespace) -> None:
    """Refuse the folder of a run if it holds anything but a run of these settings.

    Args:
        folder: may not exist.
        args: all flags of train.py.
    """
    if not (folder / CONFIG_FILE).is_file():
        if folder.exists() and (foreign := foreign_names(folder)):
            raise InputError(
                f"{folder} holds {first_few(foreign)} but no {CONFIG_FILE}, so it is no run of "
                "this table; move it away, or choose another --output"
            )
        return
    saved = read_run(folder)
    known_values(saved, train_parser().flags, folder / CONFIG_FILE)
    if saved.get("root_path") != args.root_path:
        args = argparse.Namespace(**vars(args), data=_data_of(args))
    found = differences(saved, args)
    names = [name for name in OF_WHOLE_RUNS if saved.get(name) != getattr(args, name)]
    found += [f"--{name} {saved.get(name)!s:.80} → {getattr(args, name)!s:.80}" for name in names]
    if found:
        raise InputError(
            f"{folder} is a run of other settings than the table's: {', '.join(found)}; restore "
            "them, move the folder away, or choose another --output"
        )


def foreign_names(folder: Path) -> list[str]:
    """Return what a folder holds besides what train.py writes before it notes its settings."""
    if not folder.is_dir():
        return [folder.name]
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name not in BEFORE_CONFIG and ".partial." not in name]


def _data_of(args: argparse.Namespace) -> dict[str, str]:
    """Read all training slices, which takes seconds, and return their fingerprint."""
    dataset = Synapse_dataset(args.root_path, args.list_dir, "train", num_classes=args.num_classes)
    left, held_out = dataset, {}
    if args.val_every:
        left, held_out = hold_out(dataset, args.val_cases, args.seed)
    cases = {case: part.sample_list for case, part in held_out.items()}
    return fingerprint_data(dataset.check(), left.sample_list, cases)
