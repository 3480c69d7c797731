"""The flags of `python -m preprocess.prepare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from common.arguments import ArgumentParser
from common.errors import InputError
from datasets.intensity import RULES
from datasets.registry import DATASETS, LARGEST_SIDE, LARGEST_VALUE
from datasets.scans.planes import PLANES
from preprocess.groups import AUTO, check_group_flag

DESCRIPTION = (
    "Convert scans or pictures and their labels to the files that train.py and test.py read.\n\n"
    "Your own data, in the layout of nnU-Net or the Medical Segmentation Decathlon (dataset.json,\n"
    "imagesTr/, labelsTr/), or in two folders images/ and labels/ with files of equal names:\n"
    "  python -m preprocess.prepare --input Dataset004_Liver --output data/liver\n"
    "  python -m preprocess.prepare --input heart2d --output data/heart --test_cases 10004 \\\n"
    "      --class_names LV RV LA RA aorta PA SVC IVC\n"
    "Synapse, with the published split and slices of 224 x 224:\n"
    "  python -m preprocess.prepare --input RawData --output data/Synapse --size 224\n"
    "One scan for both training and testing (an overfit check):\n"
    "  python -m preprocess.prepare --input raw --output data/one --train_cases scan1 "
    "--test_cases scan1\n\n"
    "After an interruption or a corrected file, run the same command again: finished cases are\n"
    "kept, changed cases are converted again. See preprocess/README.md."
)

# Values of `--plane`, beside those of `PLANES`.
AUTO_PLANE, STORED_PLANE = "auto", "stored"
# What `AUTO_PLANE` means where a description beside the scans says how their slices lie.
DESCRIBED_PLANE = "described"

# The limits of every number, both included.
LIMITS = {
    "size": (1, LARGEST_SIDE),
    "workers": (1, 256),
    "folds": (2, 10**6),
    "fold": (0, 10**6),
    "channel": (0, 65535),
    "seed": (0, 2**32 - 1),
    "window": (-LARGEST_VALUE, LARGEST_VALUE),
}


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m preprocess.prepare`."""
    parser = ArgumentParser(
        prog="python -m preprocess.prepare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
    )
    parser.add_argument("--input", type=Path, required=True, help="folder of the raw data")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write; it is made if missing"
    )
    parser.add_argument(
        "--size", type=int, help="zoom training slices to SIZE x SIZE (default: keep their size)"
    )
    data = parser.add_argument_group("the data set, where its files do not describe it")
    data.add_argument(
        "--dataset",
        help=f"use the classes and split of a known data set: {', '.join(DATASETS)} (default: "
        "Synapse if the folders have BTCV's names)",
    )
    data.add_argument(
        "--name", help="name of the data set (default: from dataset.json, else the folder's name)"
    )
    data.add_argument(
        "--class_names",
        nargs="+",
        help="names of the label values in ascending order, without background",
    )
    data.add_argument(
        "--intensity",
        choices=tuple(RULES),
        help="how values are scaled to [0, 1]; "
        f"{'; '.join(f'{key}: {rule}' for key, rule in RULES.items()).replace('%', '%%')} "
        "(default: from dataset.json, else from the values of the first scan)",
    )
    data.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="other limits for the intensity rule, e.g. -160 240 HU",
    )
    data.add_argument("--channel", type=int, help="which of several channels to use, from 0")
    data.add_argument(
        "--group",
        default=AUTO,
        metavar="auto|none|PATTERN|FILE.csv",
        help="which files belong to one scan or patient, which a random split keeps together; auto "
        "(default): by their names (SCAN_slice12, SCAN_12, PATIENT_left); none: every file is a "
        "case; PATTERN: a regular expression whose part in parentheses is the scan or patient, "
        "e.g. '(.+)_slice'; FILE.csv: a table with the columns file and group",
    )
    data.add_argument(
        "--plane",
        choices=(AUTO_PLANE, STORED_PLANE, *PLANES),
        default=AUTO_PLANE,
        help="plane of the slices; auto (default): across the thick axis of the scans, axial if "
        "they have none (Synapse: as stored); stored: across the last axis of each file",
    )
    data.add_argument(
        "--label_values",
        choices=("raw", "classes"),
        default="raw",
        help="raw (default): map the label values of the data set to classes; classes: the files "
        "hold classes already",
    )
    data.add_argument(
        "--label_threshold",
        type=float,
        help="label values from this on are the one class, lower ones background; for masks with "
        "grey edges, JPEG masks and mixed encodings, e.g. 128 for 0…255 (default: each value is a "
        "class)",
    )
    split = parser.add_argument_group("split of the cases")
    split.add_argument(
        "--train_cases",
        nargs="*",
        metavar="CASE",
        help="cases to train on (default: all that are not test cases)",
    )
    split.add_argument(
        "--test_cases",
        nargs="*",
        metavar="CASE",
        help="cases to test, by name or BTCV's number (default: the published test cases, else "
        "those in imagesTs/ and labelsTs/, else a random share)",
    )
    split.add_argument(
        "--test_share",
        type=float,
        default=0.2,
        help="share of the cases to draw for testing (default: %(default)s)",
    )
    split.add_argument(
        "--folds", type=int, help="cut the cases into this number of parts and test one of them"
    )
    split.add_argument("--fold", type=int, help="which part to test, from 0 (default: 0)")
    split.add_argument(
        "--seed", type=int, default=1234, help="seed of the random split (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="number of processes (default: up to 4); each needs about 2 GB for 512 x 512",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="convert every case again, also in a folder of slices that were made elsewhere",
    )
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse values that are not valid, before any file is read."""
    for flag, (low, high) in LIMITS.items():
        value = getattr(args, flag)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not low <= number <= high:
                raise InputError(f"--{flag} is {number!s:.40}, expected {low:,}…{high:,}")
    if args.label_threshold is not None and not 0 < args.label_threshold < 65536:
        raise InputError(f"--label_threshold is {args.label_threshold:g}, expected 0 < N < 65536")
    if args.label_threshold is not None and args.label_values == "classes":
        raise InputError("--label_threshold needs --label_values raw; leave out one of the flags")
    if not 0 < args.test_share < 1:
        raise InputError(f"--test_share is {args.test_share:g}, expected between 0 and 1")
    if args.fold is not None and args.folds is None:
        raise InputError(f"--fold is {args.fold} but --folds is missing; pass --folds")
    if args.folds is not None and args.test_cases is not None:
        raise InputError("--folds and --test_cases both choose test cases; pass only one of them")
    args.fold = args.fold or 0
    if args.folds is not None and args.fold >= args.folds:
        raise InputError(f"--fold is {args.fold}, expected 0…{args.folds - 1}")
    check_group_flag(args.group)
    if args.output.resolve() == args.input.resolve():
        raise InputError(f"--output is the --input folder {args.input}; choose another folder")
