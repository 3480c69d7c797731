"""Group the cases that belong to the same scan.

Slices of a scan resemble each other, so they do not count as independent cases.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from datasets.names import are_slices
from datasets.registry import SUMMARY_FILE
from evaluation.tables import CaseResult


def with_groups(results: Sequence[CaseResult], folder: Path) -> list[CaseResult]:
    """Return the results with the scan of each case, as preprocessing recorded it or by its name.

    Args:
        folder: holds the test volumes.
    """
    cases = [result.case for result in results]
    recorded = recorded_groups(folder)
    if all(case in recorded for case in cases):
        groups = [recorded[case] for case in cases]
    elif all(result.slices == 1 for result in results):
        groups = named_groups(cases)
    else:
        groups = cases
    return [replace(result, group=group) for result, group in zip(results, groups, strict=True)]


def recorded_groups(folder: Path) -> dict[str, str]:
    """Return the scan of each case as preprocessing recorded it; empty without such a record."""
    for path in (folder / SUMMARY_FILE, folder.parent / SUMMARY_FILE):
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["cases"]
            return {str(row["case"]): str(row["group"]) for row in rows}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # there is no such file, or another program wrote it
    return {}


def named_groups(cases: Sequence[str]) -> list[str]:
    """Return the scans of slices that are named SCAN_sliceNUMBER or SCAN_NUMBER.

    SCAN_NUMBER counts only if `are_slices`, the rule of preprocessing, accepts the names.
    """
    parts = [re.fullmatch(r"(.+)_(slice)?(\d+)", case) for case in cases]
    if not all(parts):
        return list(cases)
    scans = [part[1] for part in parts]
    by_slice = all(part[2] for part in parts)
    return scans if by_slice or are_slices(scans) else list(cases)
