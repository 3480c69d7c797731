"""Base weights for trying LoRA without SAM's weights: `python -m tools.phantom_base --help`."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import train
from common.arguments import ArgumentParser
from common.errors import InputError, exit_on_bad_input
from common.writing import write_json
from config.run_folder import newest_adapter
from preprocess import phantom, prepare
from tools import adapter

ORGANS = ("spleen", "right kidney", "left kidney", "liver")  # the classes of the base
SEED = 1000  # of its phantoms; none of the other data of this project has it
MADE = "made_with.json"  # the flags of finished phantoms, in their folder
Program = Callable[[Sequence[str]], None]


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m tools.phantom_base`."""
    parser = ArgumentParser(
        prog="python -m tools.phantom_base",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train vit_tiny from scratch, with every weight, on phantoms of the default\n"
        f"family, to find {', '.join(ORGANS)}.\n"
        "The result is a file of base weights, as SAM's are for vit_b. LoRA then adapts them to\n"
        "phantoms of another family and to other organs. Phantoms are not patients: such a base\n"
        "is for trying and comparing methods on a CPU, and for nothing else.\n\n"
        "  python -m tools.phantom_base --output checkpoints/vit_tiny.pth\n"
        "  python train.py --vit_name vit_tiny --ckpt checkpoints/vit_tiny.pth --fresh_heads …\n\n"
        "It takes about 15 minutes on one CPU core with the default sizes. After an interruption\n"
        "the same command goes on. Each program that it calls is printed first.",
    )
    parser.add_argument("--output", type=Path, required=True, help="file to write, .pth")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("output/phantom_base"),
        help="folder for phantoms, slices and the run (default: output/phantom_base)",
    )
    for name, default, what in (
        ("cases", 30, "number of phantoms, at most 30"),
        ("size", 112, "side of slices and of the network's input, divisible by 16"),
        ("slices", 32, "slices of a phantom"),
        ("epochs", 16, "epochs of the training"),
        ("seed", SEED, "seed of the phantoms"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{what} (default: {default})"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Make phantoms, train on them, and write the network without updates."""
    args = build_parser().parse_args(argv)
    if args.output.exists():
        raise InputError(f"--output {args.output} exists; delete it or choose another")
    adapter.check_output(args.output, overwrite=False, suffixes=adapter.SUFFIXES[:1])
    if args.size % 16:
        raise InputError(f"--size is {args.size}, expected a multiple of 16, the patch size")
    made = ["--cases", args.cases, "--size", args.size, "--slices", args.slices]
    data = phantom_data(
        args.work, [*made, "--seed", args.seed, "--classes", *ORGANS], test_share=0.1
    )
    run_folder = args.work / "runs" / "base"
    # As in the quickstart: training from scratch collapses at a larger rate or without clipping.
    recipe = (
        f"--vit_name vit_tiny --ckpt none --img_size {args.size} --batch_size 8 --n_gpu 1 --AdamW "
        "--base_lr 6e-4 --warmup --warmup_period 100 --clip_grad 0.5 --no_augment "
        f"--max_epochs {args.epochs} --stop_epoch {args.epochs} --save_minutes 2"
    ).split()
    folders = ["--root_path", data, "--output", run_folder.parent]
    go_on = ["--resume", run_folder] if (run_folder / "config.json").is_file() else []
    call("train.py", train.main, [*folders, "--name", "base", *recipe, *go_on])
    trained = newest_adapter(run_folder)
    merge = ["merge", args.output, "--lora_ckpt", trained]
    call("-m tools.adapter", adapter.main, merge)


def phantom_data(folder: Path, flags: Sequence[object], *, test_share: float) -> Path:
    """Make phantoms in `folder`/raw, prepare them, and return the folder of the prepared data.

    Args:
        flags: of `preprocess.phantom`. Phantoms that were made with the same ones are kept.
    """
    raw, data = folder / "raw", folder / "data"
    mark = raw / MADE
    wanted = [str(flag) for flag in flags]
    if not mark.is_file() or json.loads(mark.read_text(encoding="utf-8")) != wanted:
        mark.unlink(missing_ok=True)
        call("-m preprocess.phantom", phantom.main, ["--output", raw, *wanted])
        write_json(mark, wanted)
    share = ["--test_share", test_share]
    call("-m preprocess.prepare", prepare.main, ["--input", raw, "--output", data, *share])
    return data


def call(name: str, program: Program, flags: Sequence[object]) -> None:
    """Print the command line of a program, and run it in this process."""
    words = [str(flag) for flag in flags]
    print(f"$ python {name} {shlex.join(words)}", flush=True)
    program(words)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
