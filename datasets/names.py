"""Names of cases and slices: how they are made and read."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBERED = re.compile(r"(.+)_(\d+)")  # SCAN_NUMBER, a frequent name for a slice of a scan
SLICE = re.compile(r"_slice\d+$")


def case_names(*numbers: int) -> tuple[str, ...]:
    """Return `case0001` …, the names of BTCV's cases in the lists and test volumes."""
    return tuple(f"case{number:04d}" for number in numbers)


def slice_name(case: str, index: int) -> str:
    """Return `case0001_slice000`, the name of a training slice in the lists and on disk."""
    return f"{case}_slice{index:03d}"


def case_of(name: str) -> str:
    """Return the case of a slice: `case0005` for `case0005_slice012`."""
    return SLICE.sub("", name)


def are_slices(scans: Sequence[str]) -> bool:
    """Return whether files named SCAN_NUMBER are slices of their scans.

    Files count as slices if there are several scans and some scan has several files. Otherwise the
    number may simply count pictures.

    Args:
        scans: the part SCAN of each file's name.
    """
    return 1 < len(set(scans)) < len(scans)


def mistaken_slices(names: Sequence[str]) -> list[str]:
    """Return a warning if names like `case0005_002` seem to be slices but count as cases.

    It is only a warning, because pictures may have these names too. `preprocess` uses the same rule
    to recognise pictures as slices of scans.
    """
    scans = [match[1] for match in map(NUMBERED.fullmatch, names) if match]
    if len(scans) < len(names) or not are_slices(scans):
        return []
    return [
        f"{len(names)} slices named like {min(names)} count as {len(names)} cases, not "
        f"{len(set(scans))}, so --val_every would validate on neighbours of training slices; if "
        "they are slices of scans, name them <case>_slice<number>"
    ]


def slices_by_case(names: Sequence[str]) -> dict[str, list[int]]:
    """Return the indices of the slices of each case, in the order of the slices' names."""
    cases: dict[str, list[int]] = {}
    for index in sorted(range(len(names)), key=lambda i: names[i]):
        cases.setdefault(case_of(names[index]), []).append(index)
    return cases
