"""Names of cases and slices: how they are made, and what they tell."""

from __future__ import annotations

import re
from collections.abc import Sequence


def case_names(*numbers: int) -> tuple[str, ...]:
    """`case0001` …: the names of BTCV's cases in the lists and test volumes."""
    return tuple(f"case{number:04d}" for number in numbers)


def slice_name(case: str, index: int) -> str:
    """`case0001_slice000`: the name of a training slice in the lists and on disk."""
    return f"{case}_slice{index:03d}"


NUMBERED = re.compile(r"(.+)_(\d+)")  # SCAN_NUMBER, as slices of scans are often called


def are_slices(scans: Sequence[str]) -> bool:
    """Whether names as SCAN_NUMBER, of these scans, are slices: several of several scans.

    Of one scan alone, or each of another, the number may as well count pictures.
    """
    return 1 < len(set(scans)) < len(scans)


SLICE = re.compile(r"_slice\d+$")


def case_of(name: str) -> str:
    """`case0005_slice012` is of `case0005`."""
    return SLICE.sub("", name)


def mistaken_slices(names: Sequence[str]) -> list[str]:
    """A warning if `case0005_002` and the like count as cases; pictures may be named so rightly.

    They are taken for slices where `preprocess` takes pictures for slices of scans.
    """
    scans = [match[1] for match in map(NUMBERED.fullmatch, names) if match]
    if len(scans) < len(names) or not are_slices(scans):
        return []
    return [
        f"{len(names)} slices named as {min(names)} count as {len(names)} cases, not "
        f"{len(set(scans))}: --val_every would validate on neighbours of what is trained; if they "
        "are slices of scans, name them <case>_slice<number>"
    ]


def slices_by_case(names: Sequence[str]) -> dict[str, list[int]]:
    """Indices of every case's slices, in the order of their names."""
    cases: dict[str, list[int]] = {}
    for index in sorted(range(len(names)), key=lambda i: names[i]):
        cases.setdefault(case_of(names[index]), []).append(index)
    return cases
