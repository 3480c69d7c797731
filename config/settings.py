"""The flags' values: where they come from, and their check.

Order of authority: command line, `--config`, the adapter file's own settings, default.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import require_file
from config.flags import train_parser
from config.run_folder import AUTO, CONFIG_FILE, SCRATCH, newest_adapter, read_config_file
from datasets.registry import SYNAPSE, DatasetSpec, get_dataset, spec_from_json, stored_spec
from lora.adapter_file import holds_every_weight, read_adapter
from segment_anything import ENCODERS

REPOSITORY = Path(__file__).resolve().parent.parent
CHECKPOINTS = REPOSITORY / "checkpoints"
# Fields of an adapter's settings that rebuild its network.
NETWORK = ("vit_name", "img_size", "num_classes", "rank", "module")


def parse_args(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse with precedence: command line, `--config`, the adapter's settings, defaults.

    Raises:
        InputError: a missing or unreadable configuration or adapter, or a value out of range.
    """
    early, _ = parser.parse_known_args(argv)
    training = parser.prog == "train.py"
    resumed = getattr(early, "resume", None)
    given = getattr(early, "config", None) or (resumed if resumed != AUTO else None)
    config = config_path(given) if given else None
    values = read_config_file(config) if config else {}
    saved = known_values(values, parser, config)
    saved.pop("dataset", None)  # the spec beside it says more
    if not training:  # a run's newest adapter, or the published one
        for training_only in ("batch_size", "use_amp", "tf32", "processes"):
            saved.pop(training_only, None)
        if early.lora_ckpt is None:
            published = CHECKPOINTS / "epoch_159.pth"
            saved["lora_ckpt"] = str(newest_adapter(config.parent) if config else published)
    if parser.prog == "test.py":
        saved["output_dir"] = str(config.parent / "test") if config else "output/test"
    adapter = early.lora_ckpt or saved.get("lora_ckpt")
    specs = [spec_from_json(values["spec"], config)] if "spec" in values else []
    if adapter:
        state, settings = read_adapter(adapter)
        own = {key: settings[key] for key in NETWORK if key in settings}
        if training:  # the data say how many classes there are
            own.pop("num_classes", None)
        if holds_every_weight(state):
            own["ckpt"] = SCRATCH
        parser.set_defaults(**known_values(own, parser, adapter))
        specs += [spec_from_json(settings["spec"], adapter)] if "spec" in settings else []
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    _fill_in(args, _choose_spec(args, specs, training))
    _check_values(args)
    return args


def _choose_spec(
    args: argparse.Namespace, trained_on: list[DatasetSpec], training: bool
) -> DatasetSpec:
    """The data set: named, else for training what the data say, else what was trained on.

    Raises:
        InputError: test data of other classes than the adapter's, or prepared otherwise.
    """
    folder = getattr(args, "root_path" if training else "volume_path", None)
    data = stored_spec(folder) if folder else None
    if args.dataset is not None:
        return get_dataset(args.dataset)
    if training:
        return next((spec for spec in (data, *trained_on) if spec is not None), SYNAPSE)
    if not trained_on and data is not None and args.num_classes == data.num_classes:
        return data  # the adapter names no classes; their number is what was asked for
    chosen = trained_on[0] if trained_on else SYNAPSE
    if data is not None and data.class_names != chosen.class_names:
        raise InputError(
            f"{folder} holds the classes {', '.join(data.class_names)}; {args.lora_ckpt} was "
            f"trained on {', '.join(chosen.class_names)}; pass the data or the adapter that fits"
        )
    if data is not None and trained_on and (found := _seen_otherwise(data, chosen)):
        raise InputError(
            f"{folder} and what {args.lora_ckpt} was trained on differ in {', '.join(found)}; "
            "prepare the data as those were, or pass the adapter that fits"
        )
    return chosen


def _seen_otherwise(data: DatasetSpec, trained: DatasetSpec) -> list[str]:
    """How the network would see data otherwise than those it was trained on; None is not known."""
    pairs = {
        "intensities": (str(data.intensity), str(trained.intensity)),
        "orientation": (data.orientation, trained.orientation),
        "colour channels": (data.channels, trained.channels),
        "channel": (data.channel, trained.channel),
    }
    return [
        f"{what} {own} and {other}"
        for what, (own, other) in pairs.items()
        if None not in (own, other) and own != other
    ]


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Add the training flags that a script written against the original does not know."""
    defaults = vars(train_parser().parse_args([]))
    merged = argparse.Namespace(**(defaults | vars(args)))
    if "spec" not in vars(merged):
        _fill_in(merged, get_dataset(merged.dataset or SYNAPSE.name))
    return merged


def config_path(given: str) -> Path:
    """The file that `--config` names: itself, or the one in a run folder."""
    path = Path(given) / CONFIG_FILE if Path(given).is_dir() else Path(given)
    return require_file(path, what="configuration", remedy="pass a run folder or its config.json")


def known_values(
    values: dict[str, Any], parser: argparse.ArgumentParser, source: object
) -> dict[str, Any]:
    """The values that the parser knows, checked against the types of its flags.

    Raises:
        InputError: a value of another type than the flag's; `source` is named.
    """
    known = {}
    for action in parser._actions:
        if action.dest not in values or action.dest in ("config", "help"):
            continue
        value = values[action.dest]
        expected = bool if action.const is True else action.type or str
        number = expected is float and isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not number and type(value) is not expected:
            raise InputError(
                f"{source} has {action.dest} = {value!r}, expected a value of type "
                f"{expected.__name__}; correct it or leave it out"
            )
        if value is not None and action.choices and value not in action.choices:
            raise InputError(f"{source} has {action.dest} = {value!r}, expected {action.choices}")
        known[action.dest] = value
    return known


def dataset_spec(args: argparse.Namespace) -> DatasetSpec:
    """The data set that the flags mean."""
    return spec_from_json(args.spec, "--config")


def class_names(args: argparse.Namespace) -> list[str]:
    """Names of the classes 1…num_classes."""
    return list(args.spec["class_names"])


def adapter_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What is saved inside an adapter file: its network, and what to do with scans."""
    network = {key: getattr(args, key) for key in NETWORK}
    return network | {"class_names": class_names(args), "spec": args.spec}


def base_checkpoint(args: argparse.Namespace) -> Path | None:
    """The file of base weights; None for `--ckpt none`."""
    return None if args.ckpt == SCRATCH else Path(args.ckpt)


def _fill_in(args: argparse.Namespace, spec: DatasetSpec) -> None:
    """Defaults that depend on other flags; the data set as plain values."""
    if args.num_classes is None:
        args.num_classes = spec.num_classes
    if args.num_classes != spec.num_classes:
        spec = spec.of_plain_classes(max(args.num_classes, 1))  # below 1 is refused with the others
    args.spec, args.dataset = spec.to_json(), spec.name
    if getattr(args, "input_size", 0) is None:
        args.input_size = spec.size or args.img_size
    if args.ckpt is None:
        public = ENCODERS[args.vit_name].weights
        args.ckpt = str(CHECKPOINTS / (public.file if public else f"{args.vit_name}.pth"))


def _check_values(args: argparse.Namespace) -> None:
    positive = ("num_classes", "img_size", "rank", "batch_size", "n_gpu", "max_epochs")
    positive += ("stop_epoch", "warmup_period", "max_iterations", "log_every", "input_size")
    positive += ("global_batch", "processes", "save_steps", "keep_states")
    positive += ("val_every", "val_cases", "patience")
    for name in positive:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}, expected at least 1")
    for name, low, high in (
        *(("dice_param", 0, 1), ("base_lr", 0, 10), ("lr_exp", 0, 100)),
        *(("save_minutes", 0, 10_000), ("skip_nan", 0, 1_000_000), ("nsd_tolerance", 0, 1000)),
    ):
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name} is {value}, expected {low}…{high}")
    clip = getattr(args, "clip_grad", None)
    if clip is not None and not 0 < clip < math.inf:  # NaN neither
        raise InputError(f"--clip_grad is {clip}, expected above 0; leave it out not to clip")
    if args.num_classes > 255:
        raise InputError(
            f"--num_classes is {args.num_classes}, expected at most 255 (8-bit labels)"
        )
    for name in ("num_workers", "seed", "channel"):
        if (getattr(args, name, None) or 0) < 0:
            raise InputError(f"--{name} is {getattr(args, name)}, expected 0 or more")
    if getattr(args, "val_every", 1) is None and (args.val_cases or args.patience):
        raise InputError("--val_cases and --patience need --val_every; pass it, e.g. 5")
    if getattr(args, "root_path", "") is None:
        raise InputError("--root_path is missing; pass the folder that preprocess wrote")
    if args.img_size % 16:
        raise InputError(
            f"--img_size is {args.img_size}, expected a multiple of 16, the encoder's patch size"
        )
    if not args.module.isidentifier() or not hasattr(_import(args.module), "LoRA_Sam"):
        raise InputError(f"--module {args.module} has no class LoRA_Sam; expected a LoRA variant")


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise InputError(
            f"--module {name} does not exist; expected sam_lora_image_encoder, "
            "sam_lora_image_encoder_mask_decoder or a module of your own beside them"
        ) from None
