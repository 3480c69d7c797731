"""Run the tables of ablations at tiny size, into docs/ablations.md: `… tools.evidence --help`."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import ablate
from common.arguments import ArgumentParser
from common.errors import EXIT_SOME_FAILED, InputError, exit_on_bad_input
from common.writing import atomic_path, write_text
from tools import phantom_base

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "ablations.md"
# What the base is adapted to: its organs in another contrast phase and on a noisier scanner, in
# patients of whom half lack a gallbladder or a stomach.
FAMILY = (
    *"--cases 24 --size 112 --slices 24 --seed 2000 --phase unenhanced --scanner low_dose".split(),
    *("--missing", "gallbladder", "stomach", "--classes", *phantom_base.ORGANS),
)
# In place of the recipe in the tables, which is for SAM's vit_b on a GPU.
RECIPE = (
    "--vit_name vit_tiny --batch_size 4 --n_gpu 1 --warmup_period 20 --clip_grad 0.5 "
    "--max_epochs 2 --stop_epoch 2"
).split()
SIZE, PLAIN = ("--img_size", "112"), ("--augment", "none")
WHOLE = ("--base_lr", "1e-3")  # updates and decoder train, as published
# Where the decoder trains as well, it does the adaptation, and no row differs from another.
UPDATES_ALONE = ("--train", "lora", "--base_lr", "5e-3")
TABLES = {  # a part of the page: a file in ablations/, and flags of train.py for all of its runs
    "rank": ("rank.toml", (*SIZE, *PLAIN, *UPDATES_ALONE)),
    "targets": ("targets.toml", (*SIZE, *PLAIN, *UPDATES_ALONE)),
    "loss": ("loss.toml", (*SIZE, *PLAIN, *WHOLE)),
    "augment": ("augment.toml", (*SIZE, *WHOLE)),
    "input": ("tiny_input.toml", (*PLAIN, *WHOLE)),
    "decoder": ("decoder.toml", (*SIZE, *PLAIN, *WHOLE)),
}


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m tools.evidence`."""
    parser = ArgumentParser(
        prog="python -m tools.evidence",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train base weights on a family of phantoms (tools.phantom_base), adapt them\n"
        "to another family by the tables of ablations, and write the results into\n"
        "docs/ablations.md. Phantoms are not patients: the tables show that the knobs work and\n"
        "what they do here.\n\n"
        "It takes about an hour on two CPU cores. After an interruption the same command goes on;\n"
        "finished runs are kept.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/evidence"),
        help="folder for phantoms, base weights and runs (default: output/evidence)",
    )
    parser.add_argument(
        "--base", type=Path, help="base weights of vit_tiny (default: made in OUTPUT/base.pth)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=TABLES, default=list(TABLES), help="tables (default: all)"
    )
    parser.add_argument(
        "--jobs", type=int, help="runs at the same time (default: one for each CPU core)"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="page to fill in")
    parser.add_argument("--dry_run", action="store_true", help="print the runs, and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Make data and base weights, run the tables, and fill in the page.

    Raises:
        SystemExit: `EXIT_SOME_FAILED` if runs failed; the page has the results of the others.
    """
    args = build_parser().parse_args(argv)
    check_page(args.page)
    base = args.base or args.output / "base.pth"
    if not base.is_file():
        if args.base:
            raise InputError(f"--base {base} does not exist; leave it out to train it")
        work = ["--work", args.output / "base"]
        if not args.dry_run:
            command = ["--output", base, *work]
            phantom_base.call("-m tools.phantom_base", phantom_base.main, command)
    data = phantom_base.phantom_data(args.output / "adapt", FAMILY, test_share=0.5)
    failed = False
    for name in args.only:
        try:
            phantom_base.call("ablate.py", ablate.main, table_flags(args, name, base, data))
        except SystemExit as stop:
            if stop.code != EXIT_SOME_FAILED:
                raise
            failed = True
        if not args.dry_run:
            fill_in(args.page, name, args.output / name)
    if failed:
        raise SystemExit(EXIT_SOME_FAILED)


def table_flags(args: argparse.Namespace, name: str, base: Path, data: Path) -> list[object]:
    """Return the flags of `ablate.py` for one table."""
    table, own = TABLES[name]
    return [
        REPOSITORY / "ablations" / table,
        *["--root_path", data, "--output", args.output / name, "--same_code"],
        *["--jobs", args.jobs or os.cpu_count() or 1],
        *(["--dry_run"] if args.dry_run else []),
        *["--", "--ckpt", base.resolve(), *RECIPE, *own],
    ]


def markers(name: str) -> tuple[str, str]:
    """Return the lines of a page around the result of a table."""
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def check_page(page: Path) -> None:
    """Refuse a page that lacks a place, before hours of work."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    for name in TABLES:
        start, end = markers(name)
        if not -1 < text.find(start) < text.find(end):
            raise InputError(f"--page {page} lacks the lines {start} and {end}; restore them")


def fill_in(page: Path, name: str, output: Path) -> None:
    """Put tables and plot of `output` between the markers of the page."""
    start, end = markers(name)
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    _, _, after = rest.partition(end)
    picture = f"ablations_{name}.png"
    with atomic_path(page.parent / picture) as temporary:
        shutil.copyfile(output / "plot.png", temporary)
    tables = (output / "table.md").read_text(encoding="utf-8").strip()
    tables = re.sub(r"^#", "###", tables)  # it is a section here
    result = "\n\n".join([start, tables, f"![Scores of every run]({picture})", where(output), end])
    write_text(page, before + result + after)


def where(output: Path) -> str:
    """Say when and on what machine the runs below `output` were tested."""
    found = [
        json.loads(path.read_text(encoding="utf-8"))["environment"]
        for path in sorted(output.glob("*/test/results.json"))
    ]
    days = sorted({one["tested"].split()[0] for one in found})
    machines = sorted({f"{one['machine']}, torch {one['torch']}" for one in found})
    return f"{len(found)} runs on {'; '.join(machines)}; {' and '.join(days)}."


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
