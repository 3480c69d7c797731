"""Whether a test is held out: which of its cases the adapter was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.errors import first_few
from datasets.names import case_of

LISTED = 12  # names in the warning


def trained_cases(tested: Mapping[str, str], trained: Sequence[str] | None) -> list[str] | None:
    """Return the test cases that were trained on; None if the training cases are unknown.

    Args:
        tested: test case -> the scan or patient it belongs to, or itself. A slice that is a case of
            its own counts as its scan.
        trained: names of training cases, and of their scans or patients.
    """
    if trained is None:
        return None
    known = set(trained)
    return [name for name, group in tested.items() if {name, group, case_of(name)} & known]


def held_out_warning(seen: Sequence[str] | None, count: int) -> str | None:
    """Return a warning that a test is not held out; None if it is, or if nothing is known.

    Args:
        seen: what `trained_cases` found.
        count: number of test cases.
    """
    if not seen:
        return None
    verb = "was" if len(seen) == 1 else "were"
    return (
        f"{len(seen)} of {count} test cases {verb} trained on: {first_few(seen, LISTED)}; this is "
        "no held-out score"
    )
