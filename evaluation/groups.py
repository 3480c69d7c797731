"""Group the cases that belong to the same scan or patient.

Slices of a scan resemble each other, so they do not count as independent cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from datasets.groups import groups_of
from evaluation.tables import CaseResult


def with_groups(results: Sequence[CaseResult], folder: Path) -> list[CaseResult]:
    """Return the results with the group of each case.

    Args:
        folder: holds the test volumes.
    """
    slices = all(result.slices == 1 for result in results)
    groups = groups_of([result.case for result in results], folder, slices=slices).groups
    return [replace(result, group=groups[result.case]) for result in results]
