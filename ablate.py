"""Train, test and compare the runs of a table of ablations: `python ablate.py --help`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ablation.checks import check_folder
from ablation.plans import Place, Plan, build_networks, other_runs, plan_cells
from ablation.results import refuse_foreign, summarise, write
from ablation.running import run_cells
from ablation.table import Table, read_table
from common.arguments import share_of
from common.errors import EXIT_SOME_FAILED, InputError, exit_on_bad_input, first_few
from common.files import require_folder
from config.parser import Flag, Parser, check_limits
from config.shared_flags import SAME_CODE
from utils import choose_device

ABLATE = {
    "data": (
        Flag("root_path", "folder of the training slices, as for train.py (required)"),
        Flag("volume_path", "folder of the test volumes, as for test.py; default: --root_path"),
        Flag(
            "output",
            "folder for the runs, what they print (logs/) and the result (table.md, table.csv, "
            "table.json, index.html). The same command goes on there (required)",
        ),
    ),
    "what to run": (
        Flag("only", "names of the rows to run; default: all", takes_list=True),
        Flag("part", "K/N: every N-th run from the K-th on, for N machines or SLURM jobs"),
        Flag("dry_run", "print the commands and their cost in steps, and stop", type=bool),
        Flag(
            "report",
            "run nothing; make the result from what is in --output (with the same flags after --)",
            type=bool,
        ),
        SAME_CODE,
    ),
    "speed": (
        Flag("device", "auto, cpu, cuda or cuda:N", default="auto"),
        Flag(
            "jobs",
            "runs at the same time; default: one for each GPU, which a run has for itself",
            type=int,
            low=1,
            high=256,
        ),
    ),
}


def ablate_parser() -> Parser:
    """Return the parser of `ablate.py`."""
    parser = Parser(
        prog="ablate.py",
        usage="ablate.py TABLE --root_path DATA --output FOLDER [flags] [-- flags of train.py]",
        description="Train, test and compare the runs of a table of ablations.\n\n"
        "A table of this repository, on prepared data:\n"
        "  python ablate.py ablations/rank.toml --root_path data/Synapse --output output/rank\n"
        "What would it run, and how long is that?\n"
        "  python ablate.py ablations/rank.toml --root_path data/Synapse --output output/rank "
        "--dry_run\n"
        "Other flags of train.py for all runs, after --; they win over the table:\n"
        "  python ablate.py ablations/rank.toml --root_path data/Synapse --output output/try "
        "\\\n      -- --vit_name vit_tiny --ckpt none --max_iterations 100\n"
        "On several machines that share --output, or as a SLURM array (docs/slurm_ablate.sh):\n"
        "  python ablate.py ablations/rank.toml --root_path data/Synapse --output output/rank "
        "--part 1/4\n\n"
        "Every run is an ordinary run folder of train.py, ROW_sSEED/, and test.py's results are\n"
        "in its test/. Finished runs are left alone, and begun ones go on. Ctrl-C saves the state\n"
        "of what runs (exit code 75). Exit code 3: some runs failed, all others are done.\n"
        "The files in ablations/ and ablation/table.py show how to write a table.",
    )
    parser.add_argument("table", help="TOML file: flags of all runs, axes or rows, seeds")
    parser.add_flags(ABLATE)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Check all runs of a table, run those that are left, and write the result.

    Raises:
        SystemExit: `EXIT_SOME_FAILED`; `EXIT_INTERRUPTED` if a signal asked to stop.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = ablate_parser().parse_args(words[:cut])
    check_limits(ablate_parser().flags.values(), args)
    table, extra = read_table(args.table), tuple(words[cut + 1 :])
    if args.report:
        report(table, args, extra)
        return
    choose_device(args.device)
    place = Place(
        root_path=str(Path(_given(args, "root_path")).resolve()),
        volume_path=str(Path(args.volume_path or args.root_path).resolve()),
        output=Path(_given(args, "output")).resolve(),
        device=args.device,
        same_code=args.same_code,
        extra=extra,
    )
    plans = chosen(plan_cells(table, place), args)
    for plan in plans:
        check_folder(plan.folder, plan.args)
    if args.dry_run:
        show(plans)
        return
    refuse_foreign(place.output)
    build_networks(table, [plan for plan in plans if not plan.trained()])
    failed = run_cells(plans, device=args.device, jobs=args.jobs)
    finish(table, place.output, failed, extra)
    if failed:
        for name, reason in failed.items():
            print(f"error: {name}: {reason}", file=sys.stderr)
        rest = "; the others are done" if len(failed) < len(plans) else ""
        names = first_few(sorted(failed))
        print(f"{len(failed)} of {len(plans)} runs failed: {names}{rest}", file=sys.stderr)
        raise SystemExit(EXIT_SOME_FAILED)


def _given(args: argparse.Namespace, name: str) -> str:
    """Return the value of a flag that is required, unless only the report is made."""
    if (value := getattr(args, name)) is None:
        raise InputError(f"--{name} is missing; see ablate.py --help")
    return value


def chosen(plans: Sequence[Plan], args: argparse.Namespace) -> list[Plan]:
    """Return the runs of the rows of `--only`, and of these the share of `--part`."""
    names = list(dict.fromkeys(plan.cell.row.name for plan in plans))
    unknown = [name for name in args.only or () if name not in names]
    if unknown:
        raise InputError(
            f"--only names {unknown[0]!a:.60}, which is no row of {args.table}; its rows are "
            f"{first_few([repr(name) for name in names], 20)}"
        )
    kept = [plan for plan in plans if not args.only or plan.cell.row.name in args.only]
    return share_of(kept, args.part)


def show(plans: Sequence[Plan]) -> None:
    """Print the commands of all runs, their cost, and what is left."""
    left = 0
    for plan in plans:
        done = plan.trained()
        left += 0 if done else plan.steps
        state = "trained" if done else "begun" if plan.folder.exists() else "new"
        print(f"# {plan.cell.name}: {plan.steps:,} steps, {state}")
        print(shlex.join(plan.train_command()))
        print(shlex.join(plan.test_command()))
    print(
        f"# {len(plans)} runs, {sum(plan.steps for plan in plans):,} steps in all, {left:,} of "
        "them in runs that have not ended"
    )


def report(table: Table, args: argparse.Namespace, extra: Sequence[str]) -> None:
    """Write the result of what is in the folder, without the data."""
    idle = [name for name in ("only", "part", "dry_run") if getattr(args, name)]
    if idle:
        raise InputError(f"--{idle[0]} has no effect with --report; leave one of them out")
    output = require_folder(_given(args, "output"), what="--output", remedy="pass that of runs")
    finish(table, output, {}, extra)


def finish(
    table: Table, output: Path, failed: Mapping[str, str], extra: Sequence[str] = ()
) -> None:
    """Write the result of all runs in the folder, also of other parts, and print it.

    Args:
        extra: words for train.py after all others.
    """
    summary = summarise(table, output, other_runs(table, output, extra) | dict(failed))
    files = write(summary, output)
    print(summary.text())
    print("written: " + ", ".join(str(path) for path in files))


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
