"""Every flag, its default and its check.

Order of authority: command line, `--config`, the adapter file's own settings, default.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from adapter_file import holds_every_weight, read_adapter
from datasets.registry import DATASETS, get_dataset
from run_folder import AUTO, CONFIG_FILE, SCRATCH, newest_adapter, read_config_file
from safe_io import InputError, require_file
from segment_anything import ENCODERS

REPOSITORY = Path(__file__).resolve().parent
CHECKPOINTS = REPOSITORY / "checkpoints"
# Fields of an adapter's settings that rebuild its network.
NETWORK = ("vit_name", "img_size", "num_classes", "rank", "module", "dataset")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' lines and shows every default that is not None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def train_parser() -> argparse.ArgumentParser:
    """The flags of `train.py`."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Fine-tune SAM with LoRA on training slices.\n\n"
        "The published recipe:\n"
        "  python train.py --root_path data/Synapse --output output --warmup --AdamW\n"
        "Without base weights, on a CPU:\n"
        "  python train.py --root_path data/Synapse --vit_name vit_tiny --ckpt none "
        "--img_size 224 \\\n      --batch_size 8 --n_gpu 1 --base_lr 3e-4 --clip_grad 0.5 "
        "--warmup --AdamW",
        formatter_class=HelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--root_path", help="folder of train_npz/, or that folder itself (required)")
    data.add_argument("--output", default="output", help="folder that run folders are made in")
    data.add_argument("--num_workers", type=int, help="loader processes; default 4, on a CPU 0")
    data.add_argument(
        "--check",
        action="store_true",
        help="read all data, show one page of facts and warnings, and stop",
    )
    _add_data_flags(data)
    _add_network_flags(parser.add_argument_group("network"))

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--max_epochs", type=int, default=200, help="length of the rate's schedule")
    recipe.add_argument("--stop_epoch", type=int, default=160, help="epochs that are trained")
    recipe.add_argument("--max_iterations", type=int, help="stop after so many steps, if sooner")
    recipe.add_argument(
        "--batch_size", type=int, default=12, help="slices that a GPU takes at once"
    )
    recipe.add_argument(
        "--n_gpu",
        type=int,
        default=2,
        help="GPUs of the recipe: an update is of batch_size × n_gpu slices on any hardware, in "
        "parts of batch_size where there are fewer GPUs",
    )
    recipe.add_argument(
        "--global_batch", type=int, help="slices of an update; default: batch_size × n_gpu"
    )
    recipe.add_argument("--base_lr", type=float, default=0.005, help="largest learning rate")
    recipe.add_argument("--warmup", action="store_true", help="raise the rate linearly at first")
    recipe.add_argument("--warmup_period", type=int, default=250, help="steps of the warmup")
    recipe.add_argument("--lr_exp", type=float, default=0.9, help="exponent of the rate's decay")
    recipe.add_argument("--AdamW", action="store_true", help="AdamW instead of SGD")
    recipe.add_argument("--dice_param", type=float, default=0.8, help="weight of Dice in the loss")
    recipe.add_argument(
        "--clip_grad", type=float, help="largest norm of the gradient; default: not clipped"
    )
    recipe.add_argument("--no_augment", action="store_true", help="train on the slices as they are")

    saving = parser.add_argument_group("saving and going on")
    saving.add_argument(
        "--resume",
        help="a run folder to go on with, or 'auto': the newest under --output with these "
        "settings, a new run if there is none",
    )
    saving.add_argument(
        "--save_minutes", type=float, default=10, help="between saves of the full state"
    )
    saving.add_argument("--save_steps", type=int, help="steps between saves of the full state")
    saving.add_argument("--keep_states", type=int, default=2, help="full states that are kept")
    saving.add_argument(
        "--skip_nan",
        type=int,
        default=0,
        help="updates that may be left out because their loss is NaN or infinite; more stop the "
        "run. Watching for them costs a wait for the GPU in every step",
    )

    validation = parser.add_argument_group("validation")
    validation.add_argument(
        "--val_every",
        type=int,
        help="epochs between validations on held-out training cases; default: none is held out, "
        "as published",
    )
    validation.add_argument("--val_cases", type=int, help="cases held out; default: a sixth")
    validation.add_argument(
        "--patience", type=int, help="stop after so many validations without a better score"
    )

    speed = parser.add_argument_group("speed")
    _add_precision_flags(speed)
    _add_processes_flag(speed)
    speed.add_argument("--compile", action="store_true", help="torch.compile; pays on a GPU")
    speed.add_argument(
        "--checkpoint_blocks",
        action="store_true",
        help="keep less of the encoder for the gradient and compute it again: same numbers, "
        "less memory, more time",
    )
    parser.add_argument_group("logging").add_argument(
        "--log_every", type=int, default=20, help="steps between writes of the scalars"
    )
    return parser


def test_parser() -> argparse.ArgumentParser:
    """The flags of `test.py`."""
    parser = argparse.ArgumentParser(
        prog="test.py",
        description="Segment test volumes and score them.\n\n"
        "A published adapter:\n"
        "  python test.py --volume_path testset/test_vol_h5 --lora_ckpt checkpoints/epoch_159.pth "
        "--is_savenii\n"
        "A run of train.py, with its own settings and newest adapter:\n"
        "  python test.py --config output/RUN/config.json --volume_path data/Synapse",
        formatter_class=HelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--volume_path", default="testset/test_vol_h5", help="folder of the .npy.h5 volumes"
    )
    data.add_argument(
        "--output_dir", help="default: test/ in the run of --config, else output/test"
    )
    data.add_argument(
        "--is_savenii", action="store_true", help="write prediction, image and label as NIfTI"
    )
    _add_data_flags(data)
    network = parser.add_argument_group("network")
    _add_network_flags(network)
    network.add_argument(
        "--input_size",
        type=int,
        default=224,
        help="slices are brought to this size first, as the training slices were",
    )
    speed = parser.add_argument_group("speed")
    speed.add_argument("--batch_size", type=int, help="slices at once; default 12, on a CPU 2")
    _add_precision_flags(speed)
    _add_processes_flag(speed)
    return parser


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--config", help="a run folder or its config.json; the command line wins")
    group.add_argument(
        "--dataset", default="Synapse", help=f"one of {', '.join(DATASETS)}: classes and names"
    )
    group.add_argument(
        "--list_dir", help="folder of the lists; default: lists/ beside the data, else published"
    )
    group.add_argument(
        "--num_classes", type=int, help="foreground classes; default: the data set's"
    )


def _add_network_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--vit_name", default="vit_b", choices=list(ENCODERS), help="image encoder")
    group.add_argument(
        "--ckpt",
        help="base weights; default: the encoder's public file in checkpoints/; 'none': train "
        "every weight from scratch",
    )
    group.add_argument("--lora_ckpt", help="adapter file to load")
    group.add_argument("--img_size", type=int, default=512, help="side of the network's input")
    group.add_argument("--rank", type=int, default=4, help="rank of the LoRA updates")
    group.add_argument(
        "--module",
        default="sam_lora_image_encoder",
        help="LoRA variant: sam_lora_image_encoder (SAMed) or …_mask_decoder (SAMed_s)",
    )
    group.add_argument("--seed", type=int, default=1234, help="of every random choice")
    group.add_argument(
        "--deterministic", type=int, default=1, choices=(0, 1), help="repeatable GPU kernels"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def _add_precision_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--use_amp", action="store_true", help="bf16 where the device has it, else fp16"
    )
    group.add_argument("--tf32", action="store_true", help="TF32 matrix products on NVIDIA GPUs")


def _add_processes_flag(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--processes", type=int, help="processes started here; default: one for each GPU in use"
    )


def parse_args(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse with precedence: command line, `--config`, the adapter's settings, defaults.

    Raises:
        InputError: a missing or unreadable configuration or adapter, or a value out of range.
    """
    early, _ = parser.parse_known_args(argv)
    resumed = getattr(early, "resume", None)
    given = early.config or (resumed if resumed != AUTO else None)
    config = config_path(given) if given else None
    saved = read_config(config, parser) if config else {}
    if parser.prog == "test.py":  # a run's newest adapter, or the published one
        for training_only in ("batch_size", "use_amp", "tf32", "processes"):
            saved.pop(training_only, None)
        saved["output_dir"] = str(config.parent / "test") if config else "output/test"
        if early.lora_ckpt is None:
            published = CHECKPOINTS / "epoch_159.pth"
            saved["lora_ckpt"] = str(newest_adapter(config.parent) if config else published)
    adapter = early.lora_ckpt or saved.get("lora_ckpt")
    if adapter:
        state, settings = read_adapter(adapter)
        own = {key: settings[key] for key in NETWORK if key in settings}
        if holds_every_weight(state):
            own["ckpt"] = SCRATCH
        parser.set_defaults(**own)
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    _fill_in(args)
    _check_values(args)
    return args


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Add the training flags that a script written against the original does not know."""
    defaults = vars(train_parser().parse_args([]))
    merged = argparse.Namespace(**(defaults | vars(args)))
    _fill_in(merged)
    return merged


def config_path(given: str) -> Path:
    """The file that `--config` names: itself, or the one in a run folder."""
    path = Path(given) / CONFIG_FILE if Path(given).is_dir() else Path(given)
    return require_file(path, what="configuration", remedy="pass a run folder or its config.json")


def read_config(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The saved values that the parser knows, checked against the types of its flags.

    Raises:
        InputError: no JSON object, or a value of another type than the flag's.
    """
    saved = read_config_file(path)
    known = {}
    for action in parser._actions:
        if action.dest not in saved or action.dest in ("config", "help"):
            continue
        value = saved[action.dest]
        expected = bool if action.const is True else action.type or str
        number = expected is float and isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not number and type(value) is not expected:
            raise InputError(
                f"{path} has {action.dest} = {value!r}, expected a value of type "
                f"{expected.__name__}; correct it or leave it out"
            )
        if value is not None and action.choices and value not in action.choices:
            raise InputError(f"{path} has {action.dest} = {value!r}, expected {action.choices}")
        known[action.dest] = value
    return known


def class_names(args: argparse.Namespace) -> list[str]:
    """Names of the classes 1…num_classes: the data set's, where their number is the same."""
    names = get_dataset(args.dataset).class_names
    if len(names) == args.num_classes:
        return list(names)
    return [f"class {index}" for index in range(1, args.num_classes + 1)]


def adapter_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What is saved inside an adapter file so that it restores its network by itself."""
    return {key: getattr(args, key) for key in NETWORK} | {"class_names": class_names(args)}


def base_checkpoint(args: argparse.Namespace) -> Path | None:
    """The file of base weights; None for `--ckpt none`."""
    return None if args.ckpt == SCRATCH else Path(args.ckpt)


def _fill_in(args: argparse.Namespace) -> None:
    """Defaults that depend on other flags."""
    if args.num_classes is None:
        args.num_classes = get_dataset(args.dataset).num_classes
    if args.ckpt is None:
        public = ENCODERS[args.vit_name].weights
        args.ckpt = str(CHECKPOINTS / (public.file if public else f"{args.vit_name}.pth"))


def _check_values(args: argparse.Namespace) -> None:
    get_dataset(args.dataset)
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
        *(("save_minutes", 0, 10_000), ("skip_nan", 0, 1_000_000)),
    ):
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name} is {value}, expected {low}…{high}")
    if args.num_classes > 255:
        raise InputError(
            f"--num_classes is {args.num_classes}, expected at most 255 (8-bit labels)"
        )
    if (getattr(args, "num_workers", None) or 0) < 0:
        raise InputError(f"--num_workers is {args.num_workers}, expected 0 or more")
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}, expected 0 or more")
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
