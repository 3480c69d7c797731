"""What preprocessing writes and prints about all cases: lists, summary, table, warnings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import first_few, warn
from common.writing import write_json, write_text
from datasets.digests import leak_warnings
from datasets.intensity import AIR, PERCENTILES, WINDOW
from datasets.registry import SPEC_FILE, SUMMARY_FILE, DatasetSpec
from datasets.scans.geometry import Geometry
from datasets.scans.orientation import orientation_of, reorient_geometry
from preprocess.jobs import LISTS, Job
from preprocess.split import TEST, TRAIN

LIST_FILES = {TRAIN: f"{LISTS}/train.txt", TEST: f"{LISTS}/test_vol.txt"}
DESCRIPTION = (*LIST_FILES.values(), SUMMARY_FILE, SPEC_FILE)  # of the whole data set
TABLE_ROWS = 60
MUCH_CLIPPED = 0.25  # of the labelled voxels: the window hides what the network should learn


def write_lists(jobs: Sequence[Job], output: Path, cases: Sequence[dict[str, Any]]) -> None:
    """Write `train.txt` with the names of slices, and `test_vol.txt` with the names of cases.

    Published cases come first, in the published order.
    """
    slice_counts = {job.name: case["slices"] for job, case in zip(jobs, cases, strict=True)}
    spec = jobs[0].spec
    for role, published in ((TRAIN, spec.train_cases), (TEST, spec.test_cases)):
        rank = {name: position for position, name in enumerate(published)}
        listed = [job for job in jobs if role in job.roles]
        listed.sort(key=lambda job: rank.get(job.name, len(rank)))
        names: list[str] = []
        for job in listed:
            names += job.slice_names(slice_counts[job.name]) if role == TRAIN else [job.name]
        write_text(output / LIST_FILES[role], "".join(f"{name}\n" for name in names))


def find_leaks(cases: Sequence[dict[str, Any]]) -> list[str]:
    """Return a warning if slices of a training case are tested under another name."""
    trained, tested = (
        [(case["case"], case["digests"]) for case in cases if role in case["roles"]]
        for role in (TRAIN, TEST)
    )
    return leak_warnings(trained, tested)


def write_summary(
    args: argparse.Namespace,
    spec: DatasetSpec,
    cases: Sequence[dict[str, Any]],
    leaks: Sequence[str],
) -> None:
    """Write `preprocess.json`: the flags of the run, the data set, and facts about each case."""
    content = {
        "flags": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "spec": spec.to_json(),
        "groups": len({case["group"] for case in cases}),
        "leaks": list(leaks),
        "cases": [{k: v for k, v in case.items() if k != "digests"} for case in cases],
    }
    write_json(args.output / SUMMARY_FILE, content)


def print_table(spec: DatasetSpec, cases: Sequence[dict[str, Any]], kept: set[str]) -> None:
    """Print one line per case; `kept` holds the cases that were finished before this run."""
    width = max(8, max(len(case["case"]) for case in cases)) + 1
    print(
        f"\n{'case':<{width}}{'for':<11}{'slices':>6}  {'rows x cols':<12}"
        f"{'spacing x y z, mm':<22}{'labelled':>8}  {'':<5}absent classes"
    )
    for case in cases[:TABLE_ROWS]:
        _, rows, columns = case["shape"]
        voxels = case["voxels"]
        labelled = 1 - voxels["background"] / sum(voxels.values())
        absent = [name for name in spec.class_names if not voxels[name]]
        spacing = " ".join(f"{s:.3f}" for s in _slice_spacing(case, spec)) or "-"
        print(
            f"{case['case']:<{width}}{'+'.join(case['roles']):<11}{case['slices']:>6}  "
            f"{f'{rows} x {columns}':<12}{spacing:<22}"
            f"{labelled:>8.2%}  {'kept' if case['case'] in kept else '':<5}"
            f"{'all' if len(absent) == spec.num_classes else first_few(absent, 3) or '-'}"
        )
    if len(cases) > TABLE_ROWS:
        print(f"… and {len(cases) - TABLE_ROWS} more, in {SUMMARY_FILE}")


def recorded_geometry(case: dict[str, Any]) -> Geometry | None:
    """Return the geometry in the result of a case; None for a picture."""
    if "spacing" not in case:
        return None
    return Geometry(*(tuple(case[name]) for name in ("spacing", "origin", "direction")))


def _slice_spacing(case: dict[str, Any], spec: DatasetSpec) -> tuple[float, ...]:
    """Return the spacing (x, y, z) of the slices of a case in mm; empty for a picture."""
    scan = recorded_geometry(case)
    if scan is None:
        return ()
    return reorient_geometry(scan, (1, 1, 1), spec.orientation or orientation_of(scan)).spacing


def warn_of_labels(
    args: argparse.Namespace, spec: DatasetSpec, cases: Sequence[dict[str, Any]]
) -> None:
    """Warn about empty labels, classes read as raw values, and intensities of another kind."""
    empty = [c["case"] for c in cases if c["voxels"]["background"] == sum(c["voxels"].values())]
    if empty:
        warn(f"no class of {spec.name} is in the labels of {first_few(empty)}; they are kept")
    largest = max(case["largest_label_value"] for case in cases)
    if args.label_values == "raw" and 0 < largest <= spec.num_classes < max(spec.raw_labels):
        warn(
            f"no label value is above {largest}, so the labels may hold classes "
            f"0…{spec.num_classes} already; in that case pass --label_values classes"
        )
    dark = [c["case"] for c in cases if "range" in c and c["range"][0] <= AIR]
    if dark and spec.intensity.rule == PERCENTILES:
        warn(
            f"{len(dark)} scan(s) hold values like CT in Hounsfield units, but are scaled as MR: "
            f"{first_few(dark)}; if they are CT, pass --intensity ct"
        )
    hidden = [f"{c['case']} {c['clipped']:.0%}" for c in cases if c["clipped"] > MUCH_CLIPPED]
    if hidden and spec.intensity.rule == WINDOW:
        warn(
            f"many labelled voxels lie outside HU {spec.intensity.low:g}…{spec.intensity.high:g}: "
            f"{first_few(hidden)}; pass a --window that includes them"
        )
