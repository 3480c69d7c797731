"""Times this project and a peer in turns, and lets no speed stand whose results disagree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


class DisagreementError(Exception):
    """Both sides ran and their results differ: their times mean nothing."""


@dataclass
class Row:
    """One line of the table."""

    name: str
    what: str  # was timed
    peer: str
    ratio: float  # the peer's time over ours: the median of the repeats
    low: float  # smallest and largest ratio of a repeat
    high: float
    repeats: int
    difference: float  # largest difference of the results
    tolerance: float
    target: float | None  # the least ratio that is promised; None: none is
    notes: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # GPU alone: times, memory, rates

    @property
    def met(self) -> bool:
        return self.target is None or self.ratio >= self.target


@dataclass(frozen=True)
class Comparison:
    """Two functions that compute the same, and how much their results may differ."""

    name: str
    what: str  # the task that is timed
    peer_name: str
    ours: Callable[[], Any]
    peer: Callable[[], Any]
    difference: Callable[[Any, Any], float]  # of their two results
    tolerance: float  # the largest difference that is allowed
    target: float | None  # the smallest promised ratio; None: no promise
    notes: str = ""


def compare(pair: Comparison, *, repeats: int = 5, device: torch.device | None = None) -> Row:
    """Run both once to warm up and to compare their results, then in turns to time them.

    Raises:
        DisagreementError: the results differ by more than the tolerance.
    """
    difference = check_agreement(
        pair.name, pair.difference(pair.ours(), pair.peer()), pair.tolerance
    )
    ratios, seconds = [], []
    for _ in range(repeats):
        peer_seconds, our_seconds = timed(pair.peer, device), timed(pair.ours, device)
        ratios.append(peer_seconds / our_seconds)
        seconds.append((our_seconds, peer_seconds))
    facts = {}
    if device is not None and device.type == "cuda":  # a shared CPU's times say little alone
        facts = {
            "ours_ms": 1e3 * statistics.median(pair[0] for pair in seconds),
            "peer_ms": 1e3 * statistics.median(pair[1] for pair in seconds),
        }
    return Row(
        name=pair.name,
        what=pair.what,
        peer=pair.peer_name,
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        repeats=repeats,
        difference=difference,
        tolerance=pair.tolerance,
        target=pair.target,
        notes=pair.notes,
        facts=facts,
    )


def check_agreement(name: str, difference: float, tolerance: float) -> float:
    """Return the difference if it is small enough."""
    if not difference <= tolerance:  # NaN is no agreement either
        raise DisagreementError(f"{name}: results differ by {difference:g}, at most {tolerance:g}")
    return difference


def timed(function: Callable[[], Any], device: torch.device | None = None) -> float:
    """Seconds of one call, the device's work included."""
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device | None) -> None:
    """Until the device has done all it was given."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference."""
    return float((a.float().cpu() - b.float().cpu()).abs().max())
