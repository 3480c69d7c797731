"""Phantom CT in the layout of the raw BTCV data: `python -m preprocess.phantom --help`."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from common.arguments import ArgumentParser
from common.errors import InputError, exit_on_bad_input, first_few
from common.files import make_folder
from common.writing import remove_partials, write_json
from datasets.registry import SPEC_FILE, SYNAPSE, DatasetSpec, stored_spec
from datasets.scans.errors import require_scan_packages
from datasets.scans.geometry import Geometry
from distributed.signals import ended_by_signals
from distributed.workers import Killed, in_processes
from preprocess.phantom_families import LABELLED, PHASES, SCANNERS, Family
from preprocess.phantom_volume import make_phantom

# The numbers of BTCV's cases; the published split is of real scans, so phantoms have none.
NUMBERS = [*range(1, 11), *range(21, 41)]
PHANTOM = replace(SYNAPSE, name="Phantom", train_cases=(), test_cases=())
KINDS = ("img", "label")


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m preprocess.phantom`."""
    parser = ArgumentParser(
        prog="python -m preprocess.phantom",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make phantom CT volumes of the abdomen, each with a different anatomy:\n"
        "OUTPUT/Training/img/img0001.nii.gz (HU) and OUTPUT/Training/label/label0001.nii.gz\n"
        "(raw BTCV values), with the file names of BTCV, and OUTPUT/Training/dataset_spec.json,\n"
        "which names the data set Phantom. Continue as with real data:\n"
        "  python -m preprocess.prepare --input OUTPUT --output DATA\n\n"
        "A family of phantoms unlike the default one, as from another hospital:\n"
        "  python -m preprocess.phantom --output OUTPUT --seed 1 --phase arterial \\\n"
        "      --scanner low_dose --missing gallbladder 'left kidney'",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--cases",
        type=int,
        default=len(NUMBERS),
        help=f"number of cases, at most {len(NUMBERS)} (default: all)",
    )
    parser.add_argument(
        "--size", type=int, default=160, help="number of rows and of columns (default: 160)"
    )
    parser.add_argument(
        "--slices", type=int, default=32, help="number of slices of 5 mm (default: 32)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all cases (default: 0)")
    parser.add_argument("--workers", type=int, help="number of processes (default: one per core)")
    family = parser.add_argument_group("the family, of which all cases are")
    family.add_argument(
        "--phase", choices=PHASES, default="portal", help="phase of the contrast (default: portal)"
    )
    family.add_argument(
        "--scanner",
        choices=SCANNERS,
        default="standard",
        help="noise and blur (default: standard)",
    )
    family.add_argument(
        "--missing",
        nargs="+",
        choices=LABELLED,
        default=[],
        metavar="ORGAN",
        help="organs that a random half of the cases lack (default: none)",
    )
    family.add_argument(
        "--classes",
        nargs="+",
        choices=LABELLED,
        default=SYNAPSE.class_names,
        metavar="ORGAN",
        help="organs to segment, in the order of the classes (default: the eight of Synapse; "
        f"others: {', '.join(name for name in LABELLED if name not in SYNAPSE.class_names)})",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Check the flags, then make the cases in parallel."""
    args = build_parser().parse_args(argv)
    with exit_on_bad_input(), ended_by_signals():
        for name, low, high in (
            ("cases", 1, len(NUMBERS)),
            ("size", 32, 1024),
            ("slices", 1, 512),
            ("seed", 0, 2**32),
            ("workers", 1, 256),
        ):
            value = getattr(args, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"--{name} is {value}, expected {low}…{high}")
        if len(set(args.classes)) < len(args.classes):
            raise InputError(f"--classes names an organ twice: {first_few(args.classes, 13)}")
        require_scan_packages()
        numbers = NUMBERS[: args.cases]
        family = Family(phase=args.phase, scanner=args.scanner, missing=tuple(args.missing))
        make = partial(
            write_case,
            args.output,
            seed=args.seed,
            size=args.size,
            slices=args.slices,
            family=family,
        )
        refuse_other_scans(args.output, numbers)
        for kind in KINDS:
            remove_partials(make_folder(args.output / "Training" / kind, flag="--output"))
        write_json(args.output / "Training" / SPEC_FILE, with_classes(args.classes).to_json())
        workers = min(args.workers or os.cpu_count() or 1, len(numbers))
        with contextlib.closing(in_processes(make, numbers, workers)) as made:
            for index, end in tqdm(made, total=len(numbers), desc="making", unit="case"):
                if isinstance(end, Killed):
                    raise InputError(
                        f"the process that made phantom {numbers[index]} {end}; if memory ran out, "
                        "pass fewer --workers or a smaller --size"
                    )
    print(f"{len(numbers)} phantoms in {args.output}. Next:")
    print(f"  python -m preprocess.prepare --input {args.output} --output DATA")


def with_classes(names: Sequence[str]) -> DatasetSpec:
    """Describe phantoms of which these organs are the classes 1, 2, …; the others are background.

    The label files hold all organs.
    """
    raw_labels = {LABELLED[name]: index for index, name in enumerate(names, start=1)}
    return replace(
        PHANTOM,
        class_names=tuple(names),
        raw_labels=raw_labels,
        ignored_labels=tuple(sorted(set(LABELLED.values()) - raw_labels.keys())),
        predicted_values=tuple(range(1, len(names) + 1)),
    )


def scan_path(output: Path, kind: str, number: int) -> Path:
    """Return the path of the scan or label of a case."""
    return output / "Training" / kind / f"{kind}{number:04d}.nii.gz"


def refuse_other_scans(output: Path, numbers: Sequence[int]) -> None:
    """Raise an `InputError` if phantoms would replace scans: real ones have the same names."""
    paths = [scan_path(output, kind, number) for number in numbers for kind in KINDS]
    taken = [path.name for path in paths if path.exists()]
    spec = stored_spec(output / "Training") if taken else None
    if taken and (spec is None or spec.name != PHANTOM.name):
        raise InputError(
            f"--output {output} holds {first_few(taken)}, which are no phantoms; choose another "
            "folder"
        )


def write_case(
    output: Path, number: int, *, seed: int, size: int, slices: int, family: Family
) -> None:
    """Make and write one case; its anatomy depends only on (seed, number)."""
    from datasets.scans.volumes import write_volume

    phantom = make_phantom((seed, number), size=size, slices=slices, family=family)
    geometry = replace(Geometry.unknown(), spacing=phantom.spacing)
    for kind, array in zip(KINDS, (phantom.image, phantom.label), strict=True):
        write_volume(scan_path(output, kind, number), array, geometry)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
