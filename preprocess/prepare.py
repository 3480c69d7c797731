"""Raw scans to training slices and test volumes: `python -m preprocess.prepare --help`.

The steps of a run: find the cases and describe the data set (`raw_data.py`), choose which cases
train and which are tested (`split.py`), check them (`jobs.py`), convert them in parallel
(`convert.py`), write lists and summary (`summary.py`). Each finished case has a record, so that the
next run skips it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.errors import (
    EXIT_BAD_INPUT,
    EXIT_KEYBOARD,
    InputError,
    exit_on_bad_input,
    first_few,
    warn,
)
from common.files import make_folder
from common.writing import write_json
from datasets.registry import SPEC_FILE, SUMMARY_FILE, DatasetSpec
from preprocess.convert import digests_of, try_convert
from preprocess.flags import build_parser, check_flags
from preprocess.jobs import LISTS, RECORDS, SLICES, VOLUMES, Job, check_headers, turned
from preprocess.planes import with_common_orientation, with_plane
from preprocess.raw_data import find_raw_data
from preprocess.split import TEST, TRAIN, Split, choose_roles, warn_of_split_groups
from preprocess.summary import (
    LIST_FILES,
    find_leaks,
    print_table,
    warn_of_labels,
    write_lists,
    write_summary,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Check flags and headers, convert the cases, then write lists and summary."""
    args = build_parser().parse_args(argv)
    with exit_on_bad_input():
        check_flags(args)
        jobs = plan_jobs(args)
        headers, problems = check_headers(jobs)
        _stop_on(problems, len(jobs), "nothing was converted")
        jobs = with_plane(jobs, headers, args.plane)
        spec = jobs[0].spec
        shapes = [turned(*header, spec.orientation)[0] for header in headers]
        if args.size and any(rows != columns for _, rows, columns in shapes):
            warn(f"some slices are not square; --size {args.size} changes their proportions")
        refuse_input_folders(args.output, jobs)
        open_output(args.output, args.overwrite)

        results = {} if args.overwrite else dict(finished_results(jobs))
        kept = set(results)
        pending = [job for job in jobs if job.name not in results]
        if pending:  # lists must not name files that are being replaced
            for stale in (*LIST_FILES.values(), SUMMARY_FILE, SPEC_FILE):
                (args.output / stale).unlink(missing_ok=True)
        problems = convert_all(pending, args.workers or min(4, _cpu_count()), results)
        _stop_on(problems, len(jobs), "lists were not written, finished cases are kept")

        cases = [results[job.name] for job in jobs]
        write_lists(jobs, args.output, cases)
        leaks = find_leaks(cases)
        write_summary(args, spec, cases, leaks)
        geometries = [geometry for _, geometry in headers]
        described = with_facts(with_common_orientation(spec, geometries), cases)
        write_json(args.output / SPEC_FILE, described.to_json())
    print_table(spec, cases, kept)
    warn_of_labels(args, spec, cases)
    for leak in leaks:
        warn(leak)
    slices = sum(case["slices"] for case in cases if TRAIN in case["roles"])
    tests = sum(TEST in case["roles"] for case in cases)
    print(f"\n{spec.name}: {spec.num_classes} classes, {spec.intensity}")
    print(f"{args.output}: {slices} training slices, {tests} test volumes. Next:")
    print(f"  python train.py --root_path {args.output} --warmup --AdamW")


def plan_jobs(args: argparse.Namespace) -> list[Job]:
    """Find the cases and choose their roles; cases without a role are left out."""
    data = find_raw_data(args)
    split = Split(
        train=args.train_cases,
        test=args.test_cases,
        test_share=args.test_share,
        folds=args.folds,
        fold=args.fold,
        seed=args.seed,
    )
    roles = choose_roles(data, split)
    warn_of_split_groups(data, roles, split)
    both = [name for name, case_roles in roles.items() if len(case_roles) == 2]
    if both:
        warn(
            f"{first_few(both)} both train and test, so the scores are an overfit check and not "
            "held-out scores"
        )
    left_out = [name for name in data.cases if not roles[name]]
    if left_out:
        warn(f"{len(left_out)} cases are not named and are left out: {first_few(left_out)}")
    spec = replace(data.spec, size=args.size)
    jobs = [
        Job(
            case=case,
            roles=roles[name],
            spec=spec,
            label_values=args.label_values,
            output=args.output,
        )
        for name, case in data.cases.items()
        if roles[name]
    ]
    if not jobs:
        raise InputError("--train_cases and --test_cases name no case, expected at least one")
    return jobs


def with_facts(spec: DatasetSpec, cases: Sequence[dict[str, Any]]) -> DatasetSpec:
    """Return the spec with range and modality of the training scans, if all cases record them.

    `predict.py` compares other scans with them.
    """
    cases = [case for case in cases if TRAIN in case["roles"]]
    ranges = [case["range"] for case in cases if "range" in case]
    modalities = {case.get("modality") for case in cases}
    if not ranges or len(ranges) < len(cases):  # an earlier version has converted some of them
        return spec
    return replace(
        spec,
        raw_range=(min(low for low, _ in ranges), max(high for _, high in ranges)),
        modality=modalities.pop() if len(modalities) == 1 else None,
    )


def refuse_input_folders(output: Path, jobs: Sequence[Job]) -> None:
    """Raise an `InputError` if the output lies in a folder that is searched for scans."""
    scans = [scan for job in jobs for scan in (job.case.image, job.case.label)]
    folders = {scan.path.resolve().parent for scan in scans}
    inside = output.resolve()
    if found := folders & {inside, *inside.parents}:
        raise InputError(
            f"--output {output} lies in {min(found)}, which holds input scans; choose another "
            "folder"
        )


def open_output(output: Path, overwrite: bool) -> None:
    """Make the output folder and its subfolders.

    Raises:
        InputError: a folder cannot be made, or the output holds data that this program did not
            write and `overwrite` is off.
    """
    foreign = [name for name in (SLICES, VOLUMES) if (output / name).exists()]
    if foreign and not (output / RECORDS).is_dir() and not overwrite:
        raise InputError(
            f"{output} already holds {' and '.join(foreign)} that were made elsewhere; choose "
            "another --output, or pass --overwrite to replace the cases of this run"
        )
    for name in (SLICES, VOLUMES, LISTS, RECORDS):
        make_folder(output / name, flag="--output")


def finished_results(jobs: list[Job]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the recorded results of cases whose settings, sources and outputs are unchanged."""
    for job in jobs:
        try:
            record = json.loads(job.record_path.read_text(encoding="utf-8"))
            result = record["result"]
            files = job.outputs(result["slices"])
            finished = record["key"] == job.key() and all(path.is_file() for path in files)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the case has no valid record, so it will be converted
        if finished:
            # What the outputs do not depend on may be new: the group, and digests in old records.
            result["group"] = job.case.group
            if "digests" not in result:
                result["digests"] = digests_of(job)
                write_json(job.record_path, record)
            yield job.name, result


def convert_all(jobs: list[Job], workers: int, results: dict[str, dict[str, Any]]) -> list[str]:
    """Convert the cases, add their results to `results` by name, and return the problems."""
    if not jobs:
        return []
    problems = []
    attempts = _attempts(jobs, min(workers, len(jobs)))
    try:
        for name, result in tqdm(attempts, total=len(jobs), desc="converting", unit="case"):
            if isinstance(result, str):
                problems.append(result)
            else:
                results[name] = result
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to continue", file=sys.stderr)
        raise SystemExit(EXIT_KEYBOARD) from None
    return problems


def _attempts(jobs: list[Job], workers: int) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield the results of `try_convert` as the cases finish."""
    if workers <= 1:
        yield from map(try_convert, jobs)
        return
    # Workers are spawned, because a forked process would inherit locked threads of torch.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker)
    try:
        for future in as_completed([pool.submit(try_convert, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, probably because memory ran out; run the same command "
            "with a smaller --workers (finished cases are kept)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)  # the workers run in parallel already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C, workers finish their cases


def _stop_on(problems: list[str], total: int, consequence: str) -> None:
    """If there are problems, print one line for each faulty case and end with exit code 2."""
    if problems:
        for problem in sorted(problems):
            print(f"error: {problem}", file=sys.stderr)
        print(f"{len(problems)} of {total} cases failed: {consequence}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
