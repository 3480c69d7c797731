"""Write one page of test runs, alone or side by side: `python -m evaluation --help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.arguments import ArgumentParser
from common.errors import InputError, exit_on_bad_input
from common.writing import remove_partials
from common.written import Written
from evaluation.page import write_page
from evaluation.test_runs import TestRun, read_json

PAGES = (".html", ".htm")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the results of one or more test runs and write their page."""
    parser = ArgumentParser(
        prog="python -m evaluation",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write test runs as one HTML page that needs no network and no other file.\n"
        "Each run after the first is compared with the first, case by case:\n"
        "  python -m evaluation output/RUN1 output/RUN2 --output comparison.html",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a tested run folder, a folder written by test.py, or its results.json",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="page to write (default: report.html beside the results of a single run, else "
        "comparison.html beside the folder of the first run)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a page that no program of this project wrote, or that was changed since",
    )
    args = parser.parse_args(argv)
    with exit_on_bad_input():
        runs = [read_json(results_file(run)) for run in args.runs]
        output = args.output or default_page(runs)
        if output.suffix not in PAGES:
            raise InputError(f"the page {output} would be no .html file; choose another path")
        written = Written(output.parent)
        if not args.overwrite:
            written.refuse_foreign([output.name], flag="--output")
        remove_partials(output.parent)
        with written.noting():
            write_page(output, runs)
    print(f"written: {output}")


def default_page(runs: Sequence[TestRun]) -> Path:
    """Return where the page goes: beside its run, or beside the folder of the first of several."""
    folder = runs[0].path.parent
    if len(runs) == 1:
        return folder / "report.html"
    run = folder.parent if folder.name == "test" else folder  # test.py writes RUN/test/
    return run.parent / "comparison.html"


def results_file(run: Path) -> Path:
    """Return the path of the `results.json` that an argument means."""
    candidates = [run, run / "results.json", run / "test" / "results.json"]
    return next((path for path in candidates if path.is_file()), run / "results.json")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
