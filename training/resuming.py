"""What a run folder still holds when its run is started again."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError, first_few, warn
from common.files import read_json
from common.writing import flush_folder
from config.run_folder import CONFIG_FILE, LOCK_FILE
from training.checkpoint import STATES, damaged_states, saved_states
from training.run_log import METRICS

# Start of the folders in which `set_aside` keeps what a run left.
BEFORE = "before-"
# What decides in which order numbers are added, by its name in environment.json.
ROUNDING = {"processes": "processes", "threads": "threads", "at_once": "slices at once"}


def has_state(folder: Path) -> bool:
    """Return whether a run can go on from a state; False: nothing was trained yet.

    A run saves its first state before its first step, so results without a state mean that states
    were deleted.

    Raises:
        InputError: there are results but no states. To begin again would replace the results.
    """
    if saved_states(folder) or damaged_states(folder):
        return True
    left = [path.name for path in sorted(folder.glob("*.pth"))]
    if (folder / METRICS).is_file() and (folder / METRICS).stat().st_size:
        left.append(METRICS)
    if left:
        raise InputError(
            f"{folder} holds results ({first_few(left)}) but no state in {STATES}/, so its run "
            "cannot go on; put the states back, start a new run without --resume, or begin this "
            f"one anew by --resume {folder} --restart (its files then move to {BEFORE}N/)"
        )
    return False


def set_aside(folder: Path) -> Path:
    """Move what a run left into a folder inside its own, and return it.

    The lock and config.json stay, so that the folder is that of a run at every moment.
    """
    names = (folder / f"{BEFORE}{number}" for number in itertools.count(1))
    target = next(path for path in names if not path.exists())
    target.mkdir()
    shutil.copy2(folder / CONFIG_FILE, target)
    # States first: whatever is left after a power cut is then refused, and not trained further.
    for path in sorted(folder.iterdir(), key=lambda path: path.name != STATES):
        if path.name not in (LOCK_FILE, CONFIG_FILE) and not path.name.startswith(BEFORE):
            path.rename(target / path.name)
    flush_folder(target)
    flush_folder(folder)
    return target


def earlier_starts(path: Path) -> list[dict[str, Any]]:
    """Read the environments of the earlier starts of a run; a damaged file is renamed."""
    if not path.exists():
        return []
    try:
        starts = read_json(path, remedy="it is begun anew")
        if isinstance(starts, list) and all(isinstance(start, dict) for start in starts):
            return starts
        reason = f"{path} holds no list of objects; it is begun anew"
    except InputError as error:
        reason = str(error)
    kept = path.with_name(f"{path.name}.damaged")
    path.replace(kept)
    warn(f"{reason}, and the damaged file is kept as {kept.name}")
    return []


def at_once_before(starts: Sequence[dict[str, Any]], now: dict[str, Any]) -> int | None:
    """Return how many slices a run computed at once on such a GPU; None: nothing is known.

    With another GPU or other processes the numbers are rounded differently anyway.
    """
    if not starts or any(starts[-1].get(name) != now.get(name) for name in ("gpu", "processes")):
        return None
    found = starts[-1].get("at_once")
    return found if type(found) is int and found > 0 else None


def unlike_before(starts: Sequence[dict[str, Any]], now: dict[str, Any]) -> str | None:
    """Return a sentence if a run goes on with other processes, threads or parts of its batches."""
    if not starts:
        return None
    found = [
        f"{starts[-1][name]} {what} before, {now[name]} now"
        for name, what in ROUNDING.items()
        if name in starts[-1] and starts[-1][name] != now.get(name)
    ]
    return f"{', '.join(found)}: the numbers go on equal up to rounding" if found else None
