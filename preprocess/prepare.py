"""Raw scans to training slices and test volumes: `python -m preprocess.prepare --help`.

The order of events of one run: plan and check the cases (`cases.py`), convert them in parallel
(`convert.py`), write lists and summary. A finished case leaves a record, so a rerun skips it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from datasets.registry import DATASETS, DatasetSpec, case_name, get_dataset, slice_name
from safe_io import (
    EXIT_BAD_INPUT,
    InputError,
    atomic_path,
    exit_on_bad_input,
    first_few,
    make_folder,
)

from .cases import (
    LAYOUT,
    LISTS,
    RECORDS,
    SLICES,
    TEST,
    TRAIN,
    VOLUMES,
    Job,
    check_headers,
    choose_roles,
    find_cases,
    outputs,
    warn,
)
from .convert import try_convert, write_json

EXIT_INTERRUPTED = 130  # as shells report Ctrl-C
LIST_FILES = {TRAIN: f"{LISTS}/train.txt", TEST: f"{LISTS}/test_vol.txt"}
SUMMARY = "preprocess.json"
DESCRIPTION = (
    "Convert raw CT scans and their labels to what train.py and test.py read.\n\n"
    f"The input folder holds {LAYOUT}\n"
    "The published split, at the scans' own size:\n"
    "  python -m preprocess.prepare --input RawData --output data/Synapse\n"
    "Training slices of 224 x 224, as published (test volumes keep their size):\n"
    "  python -m preprocess.prepare --input RawData --output data/Synapse_224 --size 224\n"
    "One scan whose label already holds classes, to train and test on (an overfit check):\n"
    "  python -m preprocess.prepare --input RawData --output data/one --train_cases 1 "
    "\\\n      --test_cases 1 --label_values classes\n\n"
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
    parser.add_argument("--input", type=Path, required=True, help="RawData, or its Training")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write, made if it is missing"
    )
    parser.add_argument(
        "--dataset", default="Synapse", help=f"classes, window, split: {', '.join(DATASETS)}"
    )
    parser.add_argument(
        "--size", type=int, help="zoom training slices to SIZE x SIZE (default: keep their size)"
    )
    parser.add_argument(
        "--train_cases",
        type=int,
        nargs="*",
        metavar="N",
        help="numbers of the training cases (default: all that are not test cases)",
    )
    parser.add_argument(
        "--test_cases",
        type=int,
        nargs="*",
        metavar="N",
        help="numbers of the test cases (default: the published ones, less --train_cases)",
    )
    parser.add_argument(
        "--label_values",
        choices=("raw", "classes"),
        default="raw",
        help="raw (default): map the data set's own values to classes; classes: already mapped",
    )
    parser.add_argument(
        "--workers", type=int, help="processes (default: up to 4), about 2 GB each for 512 x 512"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="convert every case again, also into a folder of slices made elsewhere",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Check all that is cheap to check, convert, then write lists and summary."""
    args = build_parser().parse_args(argv)
    with exit_on_bad_input():
        for flag in ("size", "workers"):
            if getattr(args, flag) is not None and getattr(args, flag) < 1:
                raise InputError(f"--{flag} is {getattr(args, flag)}, expected at least 1")
        jobs = plan_jobs(args)
        shapes, problems = check_headers(jobs)
        _stop_if(problems, len(jobs), "nothing was converted")
        if args.size and any(height != width for _, height, width in shapes):
            warn(f"some slices are not square; --size {args.size} changes their proportions")
        open_output(args.output, args.overwrite)

        results = {} if args.overwrite else dict(finished_results(jobs))
        kept = set(results)
        pending = [job for job in jobs if job.number not in results]
        if pending:  # until all cases are done, no list may name what is being replaced
            for stale in (*LIST_FILES.values(), SUMMARY):
                (args.output / stale).unlink(missing_ok=True)
        problems = convert_all(pending, args.workers or min(4, _cpu_count()), results)
        _stop_if(problems, len(jobs), "lists were not written, finished cases are kept")

        cases = [results[number] for number in sorted(results)]
        write_lists(jobs[0].spec, args.output, cases)
        write_summary(jobs[0], args, cases)
    print_table(jobs[0].spec, cases, kept)
    warn_of_labels(jobs[0], cases)
    slices = sum(case["slices"] for case in cases if TRAIN in case["roles"])
    tests = sum(TEST in case["roles"] for case in cases)
    print(f"\n{args.output}: {slices} training slices, {tests} test volumes. Next:")
    print(f"  python train.py --root_path {args.output} --help")


def plan_jobs(args: argparse.Namespace) -> list[Job]:
    """Pair the files and give each case its roles; cases of no role are left out."""
    spec = get_dataset(args.dataset)
    files = find_cases(args.input)
    roles = choose_roles(list(files), spec, args.train_cases, args.test_cases)
    both = [case_name(number) for number, held in roles.items() if len(held) == 2]
    if both:
        warn(f"{first_few(both)} both train and test: an overfit check, no held-out score")
    left_out = [case_name(number) for number in files if not roles[number]]
    if left_out:
        warn(f"{len(left_out)} cases were not named and are left out: {first_few(left_out)}")
    settings = (spec, args.label_values, args.size, args.output)
    jobs = [
        Job(number, image, label, roles[number], *settings)
        for number, (image, label) in files.items()
        if roles[number]
    ]
    if not jobs:
        raise InputError("--train_cases and --test_cases name no case; name at least one")
    return jobs


def open_output(output: Path, overwrite: bool) -> None:
    """Make the output folder; refuse one whose slices this program did not write.

    Raises:
        InputError: it cannot be made, or holds data without records and `overwrite` is off.
    """
    foreign = [name for name in (SLICES, VOLUMES) if (output / name).exists()]
    if foreign and not (output / RECORDS).is_dir() and not overwrite:
        raise InputError(
            f"{output} already holds {' and '.join(foreign)} made elsewhere; choose another "
            "--output, or pass --overwrite to replace the cases of this run"
        )
    for name in (SLICES, VOLUMES, LISTS, RECORDS):
        make_folder(output / name, flag="--output")


def finished_results(jobs: list[Job]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The recorded results of the cases whose settings, sources and outputs are as recorded."""
    for job in jobs:
        try:
            record = json.loads(job.record_path.read_text(encoding="utf-8"))
            result = record["result"]
            files = list(outputs(job, result["slices"]))
            finished = record["key"] == job.key() and all(path.is_file() for path in files)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no record, or not one of ours: convert the case
        if finished:
            yield job.number, result


def convert_all(jobs: list[Job], workers: int, results: dict[int, dict[str, Any]]) -> list[str]:
    """Convert the cases, fill `results` by number, and return what went wrong with the others."""
    if not jobs:
        return []
    problems = []
    attempts = _attempts(jobs, min(workers, len(jobs)))
    try:
        for number, result in tqdm(attempts, total=len(jobs), desc="converting", unit="case"):
            if isinstance(result, str):
                problems.append(result)
            else:
                results[number] = result
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    return problems


def _attempts(jobs: list[Job], workers: int) -> Iterator[tuple[int, dict[str, Any] | str]]:
    if workers <= 1:
        yield from map(try_convert, jobs)
        return
    # spawn: a forked child would inherit locked threads of torch
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker)
    try:
        for future in as_completed([pool.submit(try_convert, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, most often for want of memory; run the same command "
            "with a smaller --workers (finished cases are kept)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)  # the cases are what runs in parallel
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C a begun case is finished


def write_lists(spec: DatasetSpec, output: Path, cases: list[dict[str, Any]]) -> None:
    """Write `train.txt` and `test_vol.txt`, named by slice and by case."""
    train = in_order([case for case in cases if TRAIN in case["roles"]], spec.train_cases)
    test = in_order([case for case in cases if TEST in case["roles"]], spec.test_cases)
    names = {
        TRAIN: [slice_name(c["number"], index) for c in train for index in range(c["slices"])],
        TEST: [case["case"] for case in test],
    }
    for role, file in LIST_FILES.items():
        with atomic_path(output / file) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in names[role]), encoding="utf-8")


def in_order(cases: list[dict[str, Any]], published: tuple[int, ...]) -> list[dict[str, Any]]:
    """The published cases in published order, then the others ascending."""
    rank = {number: position for position, number in enumerate(published)}
    return sorted(cases, key=lambda c: (rank.get(c["number"], len(rank)), c["number"]))


def write_summary(job: Job, args: argparse.Namespace, cases: list[dict[str, Any]]) -> None:
    """Write `preprocess.json`: the settings of the run and what each case holds."""
    settings = {key: value for key, value in job.key().items() if key not in ("roles", "sources")}
    write_json(args.output / SUMMARY, {**settings, "size": args.size, "cases": cases})


def print_table(spec: DatasetSpec, cases: list[dict[str, Any]], kept: Iterable[int]) -> None:
    """Print one line a case; `kept` are the numbers of those that were already up to date."""
    kept_names = {case_name(number) for number in kept}
    print(
        f"\n{'case':<9}{'for':<11}{'slices':>6}  {'rows x cols':<12}{'spacing x y z, mm':<22}"
        f"{'labelled':>8}  {'':<5}absent classes"
    )
    for case in cases:
        _, height, width = case["shape"]
        voxels = case["voxels"]
        labelled = 1 - voxels["background"] / sum(voxels.values())
        absent = [name for name in spec.class_names if not voxels[name]]
        print(
            f"{case['case']:<9}{'+'.join(case['roles']):<11}{case['slices']:>6}  "
            f"{f'{height} x {width}':<12}{' '.join(f'{s:.3f}' for s in case['spacing']):<22}"
            f"{labelled:>8.2%}  {'kept' if case['case'] in kept_names else '':<5}"
            f"{'all' if len(absent) == spec.num_classes else first_few(absent, 3) or '-'}"
        )


def warn_of_labels(job: Job, cases: list[dict[str, Any]]) -> None:
    """Warn of cases without foreground, and of classes that were read as raw values."""
    empty = [c["case"] for c in cases if c["voxels"]["background"] == sum(c["voxels"].values())]
    if empty:
        warn(f"no class of {job.spec.name} is in the labels of {first_few(empty)}; they were kept")
    largest = max(case["largest_label_value"] for case in cases)
    if job.label_values == "raw" and 0 < largest <= job.spec.num_classes < max(job.spec.raw_labels):
        warn(
            f"no label is above {largest}, as if they held classes 0…{job.spec.num_classes} "
            "already; if so, run again with --label_values classes"
        )


def _stop_if(problems: list[str], total: int, consequence: str) -> None:
    """End with exit code 2 and one line for each bad case, if there are any."""
    if problems:
        for problem in sorted(problems):
            print(f"error: {problem}", file=sys.stderr)
        print(f"{len(problems)} of {total} cases failed: {consequence}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
