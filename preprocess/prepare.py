"""Raw scans to training slices and test volumes: `python -m preprocess.prepare --help`.

The steps of a run: find the cases and describe the data set (`raw_data.py`), choose which cases
train and which are tested (`split.py`), check them (`jobs.py`), convert them in parallel
(`convert.py`), write lists and summary (`summary.py`). Each finished case has a record, so that the
next run skips it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import (
    EXIT_BAD_INPUT,
    InputError,
    exit_code_of,
    exit_on_bad_input,
    first_few,
    warn,
)
from common.locks import only_user
from common.names import safe_name
from common.writing import flush_folder, write_json
from datasets.registry import SPEC_FILE, DatasetSpec
from distributed.signals import ended_by_signals
from distributed.workers import Killed, in_processes
from preprocess.convert import NoPlaceError, try_convert
from preprocess.flags import build_parser, check_flags
from preprocess.jobs import LISTS, RECORDS, Job, check_headers, turned
from preprocess.planes import with_common_orientation, with_plane
from preprocess.raw_data import find_raw_data
from preprocess.records import (
    LOCK_FILE,
    finished_results,
    open_output,
    refuse_lost,
    remove_outdated,
    remove_unfinished,
)
from preprocess.split import TEST, TRAIN, Split, choose_roles, warn_of_split_groups
from preprocess.summary import (
    DESCRIPTION,
    find_leaks,
    print_table,
    recorded_geometry,
    warn_of_labels,
    write_lists,
    write_summary,
)

LARGEST_CASE = 2**30  # pixels of the resized slices of one case: 4 GiB, and as much to compute them


def main(argv: Sequence[str] | None = None) -> None:
    """Check flags and headers, convert the cases, then write lists and summary."""
    args = build_parser().parse_args(argv)
    with exit_on_bad_input(), ended_by_signals():
        check_flags(args)
        jobs = plan_jobs(args)
        headers, problems = check_headers(jobs)
        _stop_on(problems, len(jobs), "nothing was converted")
        jobs = with_plane(jobs, headers, args.plane)
        shapes = [turned(*header, jobs[0].spec.orientation)[0] for header in headers]
        _check_size(args.size, jobs, shapes)
        refuse_input_folders(args.output, jobs)
        written = open_output(args.output, args.overwrite)
        taken = f"another process is preparing {args.output}; wait for it, or choose another folder"
        with only_user(args.output / RECORDS / LOCK_FILE, taken=taken):
            remove_unfinished(args.output)
            try:
                results, kept = convert(args, jobs)
            finally:
                remove_unfinished(args.output)  # of workers that were killed
            with written.noting():
                leaks = describe(args, jobs, results)
    spec, cases = jobs[0].spec, [results[job.name] for job in jobs]
    print_table(spec, cases, kept)
    warn_of_labels(args, spec, cases)
    for leak in leaks:
        warn(leak)
    slices = sum(case["slices"] for case in cases if TRAIN in case["roles"])
    tests = sum(TEST in case["roles"] for case in cases)
    print(f"\n{spec.name}: {spec.num_classes} classes, {spec.intensity}")
    print(f"{args.output}: {slices} training slices, {tests} test volumes. Next:")
    print(f"  python train.py --root_path {args.output} --warmup --AdamW")


def convert(
    args: argparse.Namespace, jobs: list[Job]
) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """Convert the cases that are not finished.

    Returns:
        The results of all cases by name, and the names of those that were finished before.
    """
    results = {} if args.overwrite else dict(finished_results(jobs))
    kept = set(results)
    pending = [job for job in jobs if job.name not in results]
    if pending:  # lists must not name files that are being replaced
        for stale in DESCRIPTION:
            (args.output / stale).unlink(missing_ok=True)
        flush_folder(args.output / LISTS)
        remove_outdated(args.output, pending)
    problems = convert_all(pending, args.workers or min(4, _cpu_count()), results)
    _stop_on(problems, len(jobs), "lists were not written, finished cases are kept")
    return results, kept


def describe(
    args: argparse.Namespace, jobs: list[Job], results: dict[str, dict[str, Any]]
) -> list[str]:
    """Write summary, description and lists, which are last: they make the folder usable.

    Returns:
        Warnings of slices that are both trained on and tested.
    """
    refuse_lost(jobs, results)
    spec, cases = jobs[0].spec, [results[job.name] for job in jobs]
    leaks = find_leaks(cases)
    write_summary(args, spec, cases, leaks)
    # The headers that were checked first may belong to scans that were replaced since.
    geometries = [recorded_geometry(case) for case in cases]
    described = with_facts(with_common_orientation(spec, geometries), cases)
    write_json(args.output / SPEC_FILE, described.to_json())
    write_lists(jobs, args.output, cases)
    return leaks


def _check_size(size: int | None, jobs: Sequence[Job], shapes: Sequence[tuple[int, ...]]) -> None:
    """Warn if `--size` changes proportions; refuse it if a case would not fit into memory.

    Args:
        shapes: (D, H, W) of the slices of each case.
    """
    if size is None:
        return
    if any(rows != columns for _, rows, columns in shapes):
        warn(f"some slices are not square; --size {size} changes their proportions")
    for job, (slices, _, _) in zip(jobs, shapes, strict=True):
        if TRAIN in job.roles and slices * size**2 > LARGEST_CASE:
            raise InputError(
                f"--size is {size}, but {job.case.image.path} has {slices} slices, whose images "
                f"would take {slices * size**2 / 2**28:.0f} GiB of memory; pass a smaller --size"
            )


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
        if roles[safe_name(name, source=args.input)]
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


def convert_all(jobs: list[Job], workers: int, results: dict[str, dict[str, Any]]) -> list[str]:
    """Convert the cases, add their results to `results` by name, and return the problems.

    Raises:
        InputError: the output folder cannot be written.
    """
    if not jobs:
        return []
    problems = []
    try:
        with contextlib.closing(_attempts(jobs, min(workers, len(jobs)))) as attempts:
            for job, result in tqdm(attempts, total=len(jobs), desc="converting", unit="case"):
                if isinstance(result, NoPlaceError):
                    raise result
                if isinstance(result, str):
                    problems.append(result)
                else:
                    results[job.name] = result
    except KeyboardInterrupt as stop:
        print("\ninterrupted; run the same command again to continue", file=sys.stderr)
        raise SystemExit(exit_code_of(stop)) from None
    return problems


def _attempts(
    jobs: list[Job], workers: int
) -> Iterator[tuple[Job, dict[str, Any] | str | NoPlaceError]]:
    """Yield the results of `try_convert` as the cases finish."""
    if workers <= 1:
        for job in jobs:
            yield job, try_convert(job)
        return
    with contextlib.closing(in_processes(try_convert, jobs, workers)) as results:
        for index, result in results:
            if isinstance(result, Killed):
                case = jobs[index].case
                result = (
                    f"{case.name}: the process that read {case.image.path} and {case.label.path} "
                    f"{result}; if memory ran out, run the same command with fewer --workers, "
                    "otherwise check these files"
                )
            yield jobs[index], result


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
