"""Which cases are of one scan: slices of a patient are alike, so they are no separate evidence."""

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
    """The results with the scan that each case is of, as preprocessing says, else by the names.

    Args:
        folder: of the test volumes.
    """
    cases = [result.case for result in results]
    recorded = recorded_groups(folder)
    if all(case in recorded for case in cases):
        groups = [recorded[case] for case in cases]
    elif all(result.slices == 1 for result in results):
        groups = named_groups(cases)
    else:
        groups = cases
    return [replace(result, group=one) for result, one in zip(results, groups, strict=True)]


def recorded_groups(folder: Path) -> dict[str, str]:
    """The scan of every case, as preprocessing recorded it; empty: it recorded none."""
    for path in (folder / SUMMARY_FILE, folder.parent / SUMMARY_FILE):
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["cases"]
            return {str(row["case"]): str(row["group"]) for row in rows}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # none, or of another program
    return {}


def named_groups(cases: Sequence[str]) -> list[str]:
    """The scans of slices named SCAN_NUMBER, by preprocessing's rule, or SCAN_sliceNUMBER."""
    parts = [re.fullmatch(r"(.+)_(slice)?(\d+)", case) for case in cases]
    if not all(parts):
        return list(cases)
    scans = [part[1] for part in parts]
    by_slice = all(part[2] for part in parts)
    return scans if by_slice or are_slices(scans) else list(cases)
