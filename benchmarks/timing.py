"""Time this project and a peer in turns; report no speed if their results differ."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


class DisagreementError(Exception):
    """The results differ, so the times mean nothing."""


@dataclass
class Row:
    """One line of the table."""

    name: str
    what: str  # the task that was timed
    peer: str
    ratio: float  # the peer's time divided by ours, median of the repeats
    low: float  # smallest ratio
    high: float  # largest ratio
    repeats: int
    difference: float  # largest difference of the results
    tolerance: float  # largest difference that is allowed
    target: float | None  # smallest promised ratio; None: no promise
    notes: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # on a GPU: times, memory, rates

    @property
    def met(self) -> bool:
        """Whether the ratio reaches the target."""
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
    if device is not None and device.type == "cuda":  # on a shared CPU only ratios mean anything
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
    """Return the difference if it is within the tolerance, else raise a `DisagreementError`."""
    if not difference <= tolerance:  # also true for NaN
        raise DisagreementError(
            f"{name}: results differ by {difference:g}, at most {tolerance:g} is allowed"
        )
    return difference


def timed(function: Callable[[], Any], device: torch.device | None = None) -> float:
    """Return the seconds of one call, including the work of the device."""
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device | None) -> None:
    """Wait until the device has finished its work."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest absolute difference."""
    return float((a.float().cpu() - b.float().cpu()).abs().max())
