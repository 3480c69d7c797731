"""A task for worker processes, in a module that imports nothing large."""

from __future__ import annotations

import os


def end_oddly(number: int) -> int:
    """Kill the own process, or return what it was given."""
    if number < 0:
        os.kill(os.getpid(), -number)
    return number
