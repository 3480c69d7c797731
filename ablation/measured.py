"""What the folder of one run tells: its scores, what it cost, or how far it is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_json
from config.run_folder import CONFIG_FILE, newest_adapter
from evaluation.test_runs import TestRun
from evaluation.test_runs import read_json as read_results
from training.curves import read_metrics

RESULTS = Path("test", "results.json")
REPORT = Path("test", "report.html")
NO_FILE = "this file is read only if it is there"


@dataclass(frozen=True)
class Cost:
    """What a run cost; None: its folder does not tell."""

    trainable: int | None  # parameters that get a gradient
    adapter_bytes: int | None  # size of the adapter file, with the settings in it
    seconds_per_step: float | None  # median over the epochs of the mean over their steps
    peak_bytes: int | None  # see `training.memory.peak_memory`
    device: str | None  # what it was trained on
    commit: str | None  # version of the code that trained it
    command: str | None  # its newest start


def read_tested(folder: Path) -> TestRun:
    """Return the results of a tested run, its cases sorted by name.

    Raises:
        MissingFileError: it is not tested.
        InputError: its results are damaged, or those of another adapter.
    """
    test = read_results(folder / RESULTS)
    if (folder / CONFIG_FILE).is_file():
        _require_own(folder, test)
    return replace(test, results=sorted(test.results, key=lambda result: result.case))


def _require_own(folder: Path, test: TestRun) -> None:
    """Refuse results that another run left, or another adapter than the newest of this run."""
    recorded = Path(str(test.settings["flags"].get("lora_ckpt")))
    # The folder of all runs may have moved, and adapters may be gone.
    newest = newest_adapter(folder).name if any(folder.glob("epoch_*.pth")) else recorded.name
    if (recorded.parent.name, recorded.name) != (folder.name, newest):
        raise InputError(
            f"{folder / RESULTS} is of the adapter {recorded}, expected {newest} of {folder}; run "
            "ablate.py again, which tests that"
        )


def read_cost(folder: Path, test: TestRun) -> Cost:
    """Return what a tested run cost."""
    start = _newest_start(folder)
    epochs = _epochs(folder)
    peaks = [e["peak_memory"] for e in epochs if _is_number(e.get("peak_memory"))]
    return Cost(
        trainable=_trainable(folder),
        adapter_bytes=_adapter_bytes(folder, test),
        seconds_per_step=_seconds_per_step(epochs),
        peak_bytes=max(peaks, default=None),
        device=_text(start.get("gpu")) or _text(start.get("machine")),
        commit=_text(start.get("commit")),
        command=_text(start.get("command")),
    )


def progress_of(folder: Path) -> str:
    """Say how far a run is that has no results."""
    config = _content(folder / CONFIG_FILE)
    if not isinstance(config, dict):
        return "not started"
    ends = [config[n] for n in ("max_epochs", "stop_epoch") if _is_number(config.get(n))]
    done = max((epoch["epoch"] + 1 for epoch in _epochs(folder)), default=0)
    return f"trained for {done} of {min(ends, default='?')} epochs, not tested"


def _content(path: Path) -> Any:
    """Return the content of a JSON file that the user may have damaged; None: there is none."""
    try:
        return read_json(path, remedy=NO_FILE)
    except InputError:
        return None


def _epochs(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl about whole epochs."""
    return [
        record
        for record in read_metrics(folder)
        if all(_is_number(record.get(name)) for name in ("epoch", "steps", "seconds"))
    ]


def _seconds_per_step(epochs: Sequence[dict[str, Any]]) -> float | None:
    steps = [0, *(epoch["steps"] for epoch in epochs)]
    means = [
        epoch["seconds"] / (after - before)
        for epoch, (before, after) in zip(epochs, pairwise(steps), strict=True)
        if after > before
    ]
    return statistics.median(means) if means else None


def _trainable(folder: Path) -> int | None:
    try:
        count = _content(folder / "check.json")["parameters"]["train"]
    except (TypeError, KeyError):
        return None
    return count if _is_number(count) else None


def _adapter_bytes(folder: Path, test: TestRun) -> int | None:
    """Return the size of the adapter that was tested, wherever the folder was moved to."""
    recorded = test.settings["flags"].get("lora_ckpt")
    if not isinstance(recorded, str):
        return None
    for path in (folder / Path(recorded).name, Path(recorded)):
        if path.is_file():
            return path.stat().st_size
    return None


def _newest_start(folder: Path) -> dict[str, Any]:
    starts = _content(folder / "environment.json")
    start = starts[-1] if isinstance(starts, list) and starts else None
    return start if isinstance(start, dict) else {}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
