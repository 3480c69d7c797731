"""The values of the flags: where they come from, and the checks that concern several flags.

Order of authority: command line, `--config`, the settings inside the adapter file, default.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError, first_few, warn
from common.files import require_file, sha256_of
from config.data_spec import choose_spec, described_training_data, with_chosen_intensity
from config.flags import train_parser
from config.inference_flags import PREDICT
from config.network_settings import (
    lora_choices,
    refuse_beside_onnx,
    require_recorded_flags,
    require_train_has_effect,
    write_plainly,
)
from config.parser import (
    Flag,
    Parser,
    by_name,
    check_limits,
    that_change_numbers,
    without_second_names,
)
from config.recipe_flags import check_recipe
from config.run_folder import (
    CONFIG_FILE,
    HEADS_OF_OLDER_RUNS,
    newest_adapter,
    read_config_file,
    read_run,
    runs_in,
)
from config.shared_flags import AUTO, SCRATCH
from config.source_code import changed_files, fingerprint_code, fingerprint_file
from datasets.registry import DatasetSpec, spec_from_json
from datasets.trained_on import TrainedOn
from evaluation.onnx_network import read_onnx_settings
from lora.adapter_file import holds_every_weight, read_adapter
from lora.variants import SAMED, load_variant
from segment_anything import ENCODERS

REPOSITORY = Path(__file__).resolve().parent.parent
# The programs that pip installs set the variable to checkpoints/ of the current folder.
CHECKPOINTS = Path(os.environ.get("SAMED_CHECKPOINTS") or REPOSITORY / "checkpoints")
FOLDER_WORD = re.compile(r"[\w.-]{1,60}")


def parse_args(parser: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line, with the settings of the run and the adapter that it names.

    Raises:
        InputError: a configuration or adapter is missing or unreadable, or a value is out of range.
    """
    early, _ = parser.parse_known_args(argv)
    check_limits(parser.flags.values(), early)
    training = "root_path" in parser.flags
    exported = getattr(early, "onnx", None)
    if exported:
        refuse_beside_onnx(parser, argv)
        parser.set_defaults(ckpt=SCRATCH)
    resumed = getattr(early, "resume", None)
    given = getattr(early, "config", None) or (resumed if resumed != AUTO else None)
    config = config_path(given) if given else None
    config_values = read_config_file(config) if config else {}
    run_values = known_values(config_values, parser.flags, config)
    # The spec in config.json says more than the data set's name.
    run_values.pop("dataset", None)
    if training and "spec" in config_values:
        run_values = HEADS_OF_OLDER_RUNS | run_values
    if not training and early.lora_ckpt is None and not exported:
        published = CHECKPOINTS / "epoch_159.pth"
        run_values["lora_ckpt"] = str(newest_adapter(config.parent) if config else published)
    if "output_dir" in parser.flags:
        run_values["output_dir"] = str(config.parent / "test") if config else "output/test"
    specs = [spec_from_json(config_values["spec"], config)] if "spec" in config_values else []
    trained_on, state, settings = None, {}, {}
    adapter = early.lora_ckpt or run_values.get("lora_ckpt")
    if adapter or exported:
        state, settings = ({}, read_onnx_settings(exported)) if exported else read_adapter(adapter)
        trained_on = TrainedOn.from_json(settings.get("trained_on"))
        source = exported or adapter
        parser.set_defaults(**_network_values(parser, state, settings, source))
        specs += [spec_from_json(settings["spec"], source)] if "spec" in settings else []
    parser.set_defaults(**run_values)
    args = parser.parse_args(argv)
    # What the adapter was trained on; a training run replaces it with what it trains on.
    args.trained_on = trained_on.to_json() if trained_on else None
    _fill_in(args, with_chosen_intensity(args, choose_spec(args, specs, training)))
    write_plainly(args)
    _check_values(args, parser.flags)
    if adapter:
        require_recorded_flags(args, settings, adapter, training=training)
    if training:
        require_train_has_effect(args, settings, holds_every_weight(state))
    # The graph of an ONNX file holds what a variant computes, so its module need not be here.
    args.code = fingerprint_code(SAMED if exported else args.module)
    return args


def _network_values(
    parser: Parser, state: dict[str, Any], settings: dict[str, Any], adapter: str
) -> dict[str, Any]:
    """Return the flags' values that rebuild the network of an adapter."""
    names = [flag.name for flag in parser.flags.values() if flag.in_adapter]
    if "root_path" in parser.flags:  # In training, the data decide the number of classes.
        names.remove("num_classes")
    values = {name: settings[name] for name in names if name in settings}
    if holds_every_weight(state):
        values["ckpt"] = SCRATCH
    return known_values(values, parser.flags, adapter)


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Add the training flags that a script written against the original does not have.

    Such a script passes `max_iterations`, by default 30000, which had no effect there.
    """
    defaults = vars(train_parser().parse_args([]))
    given = without_second_names(vars(args), train_parser().flags, "the script")
    merged = argparse.Namespace(**(defaults | given))
    check_recipe(merged)
    if "spec" not in vars(merged):
        merged.max_iterations = None
        # Such scripts say "Synapse" of all data, so the data themselves are asked.
        _fill_in(merged, described_training_data(merged, []))
    if "trained_on" not in vars(merged):
        merged.trained_on = None
    if "code" not in vars(merged):
        merged.code = fingerprint_code(merged.module)
    return merged


def config_path(given: str) -> Path:
    """Return the configuration file that `--config` names.

    Args:
        given: the file, a run folder, or a folder of run folders, of which the newest counts.
    """
    path = Path(given)
    if path.is_dir() and not (path / CONFIG_FILE).is_file():
        runs = runs_in(path)
        # A run that has just begun has no adapter to test.
        runs = [run for run in runs if any(run.glob("epoch_*.pth"))] or runs
        if runs:
            print(f"settings of {runs[-1]}, the newest of {len(runs)} runs in {path}")
            return runs[-1] / CONFIG_FILE
    file = path / CONFIG_FILE if path.is_dir() else path
    file = require_file(file, what="configuration", remedy="pass a run folder or its config.json")
    if path.is_dir():
        read_run(path)
    return file


def known_values(values: dict[str, Any], flags: dict[str, Flag], source: object) -> dict[str, Any]:
    """Return the values of a run or an adapter that set flags of this program.

    Args:
        source: file that the values come from, for messages.

    Raises:
        InputError: a value has another type than its flag, or is outside its limits.
    """
    known = {}
    for name, flag in flags.items():
        if name in values and flag.from_config and not flag.means:
            flag.check_type(values[name], source)
            flag.check_limits(values[name], source)
            known[name] = values[name]
    return known


def dataset_spec(args: argparse.Namespace) -> DatasetSpec:
    """Return the data set that the flags describe."""
    return spec_from_json(args.spec, "--config")


def class_names(args: argparse.Namespace) -> list[str]:
    """Return the names of the classes 1…num_classes."""
    return list(args.spec["class_names"])


def adapter_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that an adapter file records: network, data set and source code."""
    flags = train_parser().flags.values()
    # A program that trains nothing has no --prompt_prob, for example.
    given = [flag.name for flag in flags if flag.in_adapter and hasattr(args, flag.name)]
    network = {name: getattr(args, name) for name in given}
    return network | {
        "class_names": class_names(args),
        "spec": args.spec,
        "code": args.code,
        "trained_on": args.trained_on,
    }


def recorded_values(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags as plain JSON values, with one hash in place of all source fingerprints.

    What the adapter was trained on is left out, since the adapter tells it.
    """
    values = json.loads(json.dumps(vars(args)))
    del values["trained_on"]
    values["code"] = hashlib.sha256(json.dumps(values["code"]).encode()).hexdigest()[:16]
    return values


def prediction_key(args: argparse.Namespace) -> dict[str, Any]:
    """Return what decides the files of a segmented case besides its scan.

    A case whose record holds the same key needs no second segmentation.
    """
    values = that_change_numbers(recorded_values(args), by_name(PREDICT))
    return values | {
        "adapter": sha256_of(Path(getattr(args, "onnx", None) or args.lora_ckpt)),
        "program": fingerprint_file(REPOSITORY / "prediction" / "segmenting.py"),
    }


def warn_of_changed_code(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Warn if an adapter was trained with other source code than that of today.

    Args:
        settings: what the adapter file `args.lora_ckpt` records.
    """
    recorded = settings.get("code")
    if recorded is None or getattr(args, "same_code", False):
        return
    # A script written against the original passes no `code`.
    changed = changed_files(recorded, getattr(args, "code", None) or fingerprint_code(args.module))
    if changed:
        warn(
            f"{args.lora_ckpt} was trained with other source code; changed since: "
            f"{first_few(changed)}. If the changes mean nothing, pass --same_code"
        )


def base_checkpoint(args: argparse.Namespace) -> Path | None:
    """Return the file of base weights; None for `--ckpt none`."""
    return None if args.ckpt == SCRATCH else Path(args.ckpt)


def _fill_in(args: argparse.Namespace, spec: DatasetSpec) -> None:
    """Set the defaults that depend on other flags, and the data set as plain values."""
    if args.num_classes is None:
        args.num_classes = spec.num_classes
    if args.num_classes != spec.num_classes:
        spec = spec.of_plain_classes(args.num_classes)
    args.spec, args.dataset = spec.to_json(), spec.name
    if getattr(args, "input_size", 0) is None:
        args.input_size = spec.size or args.img_size
    if args.ckpt is None:
        public = ENCODERS[args.vit_name].weights
        args.ckpt = str(CHECKPOINTS / (public.file if public else f"{args.vit_name}.pth"))


def _check_values(args: argparse.Namespace, flags: dict[str, Flag]) -> None:
    check_limits(flags.values(), args)
    if "root_path" in flags:
        check_recipe(args)
    if getattr(args, "val_every", 1) is None and (args.val_cases or args.patience):
        raise InputError("--val_cases and --patience need --val_every; pass it, for example 5")
    if getattr(args, "compile", False) and args.lora_dropout:
        raise InputError(
            "--lora_dropout draws for each slice by itself, which --compile cannot compile; leave "
            "out one of them"
        )
    if getattr(args, "restart", False) and args.resume in (None, AUTO):
        raise InputError("--restart needs --resume FOLDER, the run to begin anew")
    if getattr(args, "root_path", "") is None:
        raise InputError("--root_path is missing; pass the folder that preprocess wrote")
    for name in ("name", "note"):
        word = getattr(args, name, None)
        if word is not None and not (FOLDER_WORD.fullmatch(word) and word.strip(".")):
            raise InputError(
                f"--{name} is {word!r}, expected 1…60 letters, digits, '_', '.' or '-', which "
                "become a folder's name"
            )
    if not getattr(args, "onnx", None):
        load_variant(args.module, lora_choices(args))
