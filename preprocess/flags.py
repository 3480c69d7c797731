"""The flags of `python -m preprocess.prepare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from common.errors import InputError
from datasets.registry import DATASETS

from .descriptor import RULES

DESCRIPTION = (
    "Convert scans or pictures and their labels to what train.py and test.py read.\n\n"
    "Your own data, as nnU-Net or the Medical Segmentation Decathlon keep theirs (dataset.json,\n"
    "imagesTr/, labelsTr/), or a folder of images/ and labels/ with files of equal names:\n"
    "  python -m preprocess.prepare --input Dataset004_Liver --output data/liver\n"
    "  python -m preprocess.prepare --input heart2d --output data/heart --test_cases 10004 \\\n"
    "      --class_names LV RV LA RA aorta PA SVC IVC\n"
    "Synapse, with the published split and slices of 224 x 224:\n"
    "  python -m preprocess.prepare --input RawData --output data/Synapse --size 224\n"
    "One scan to train and test on (an overfit check):\n"
    "  python -m preprocess.prepare --input raw --output data/one --train_cases scan1 "
    "--test_cases scan1\n\n"
    "Run the same command again after an interruption or a corrected file: finished cases\n"
    "are kept, changed ones are converted again. See preprocess/README.md."
)


def build_parser() -> argparse.ArgumentParser:
    """The flags of `python -m preprocess.prepare`."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.prepare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
    )
    parser.add_argument("--input", type=Path, required=True, help="folder of the raw data")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write, made if it is missing"
    )
    parser.add_argument(
        "--size", type=int, help="zoom training slices to SIZE x SIZE (default: keep their size)"
    )
    data = parser.add_argument_group("what the data are, where they do not say it themselves")
    data.add_argument(
        "--dataset",
        help=f"classes and split of {', '.join(DATASETS)} (default: for folders named like BTCV's)",
    )
    data.add_argument("--name", help="of the data set (default: dataset.json's or the folder's)")
    data.add_argument(
        "--class_names", nargs="+", help="of the label values, ascending, without background"
    )
    data.add_argument(
        "--intensity",
        choices=tuple(RULES),
        help=f"{'; '.join(f'{key}: {rule}' for key, rule in RULES.items()).replace('%', '%%')} "
        "(default: by dataset.json, else by the first scan's values)",
    )
    data.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="other limits of that rule, e.g. -160 240 HU",
    )
    data.add_argument("--channel", type=int, help="which of several channels, from 0")
    data.add_argument(
        "--group",
        choices=("auto", "none"),
        default="auto",
        help="auto (default): pictures named SCAN_NUMBER are slices of their scans, never split",
    )
    data.add_argument(
        "--label_values",
        choices=("raw", "classes"),
        default="raw",
        help="raw (default): map the data set's own values to classes; classes: already mapped",
    )
    split = parser.add_argument_group("split, by case")
    split.add_argument(
        "--train_cases", nargs="*", metavar="CASE", help="(default: all that are not test cases)"
    )
    split.add_argument(
        "--test_cases",
        nargs="*",
        metavar="CASE",
        help="names, or numbers of BTCV's (default: the published ones; those of imagesTs/ with "
        "labelsTs/; else a share)",
    )
    split.add_argument(
        "--test_share", type=float, default=0.2, help="drawn for testing (default: %(default)s)"
    )
    split.add_argument("--folds", type=int, help="test one of so many equal parts instead")
    split.add_argument("--fold", type=int, help="which, from 0 (default)")
    split.add_argument("--seed", type=int, default=1234, help="of the draw (default: 1234)")
    parser.add_argument(
        "--workers", type=int, help="processes (default: up to 4), about 2 GB each for 512 x 512"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="convert every case again, also into a folder of slices made elsewhere",
    )
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse values that make no sense, before anything is read."""
    lowest = {"size": 1, "workers": 1, "folds": 2, "fold": 0, "channel": 0, "seed": 0}
    for flag, low in lowest.items():
        value = getattr(args, flag)
        if value is not None and value < low:
            raise InputError(f"--{flag} is {value}, expected at least {low}")
    if not 0 < args.test_share < 1:
        raise InputError(f"--test_share is {args.test_share:g}, expected between 0 and 1")
    if args.fold is not None and args.folds is None:
        raise InputError(f"--fold is {args.fold}, but of how many is not said; pass --folds")
    if args.folds is not None and args.test_cases is not None:
        raise InputError("--folds and --test_cases both say what is tested; pass one of them")
    args.fold = args.fold or 0
    if args.folds is not None and args.fold >= args.folds:
        raise InputError(f"--fold is {args.fold}, expected 0…{args.folds - 1}")
    if args.output.resolve() == args.input.resolve():
        raise InputError(f"--output is the --input folder {args.input}; choose another")
