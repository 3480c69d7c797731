"""The curves of a training run as one picture: loss, learning rate, DSC of every organ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import warn
from common.files import parse_json
from common.writing import atomic_path
from datasets.colours import label_colours
from training.run_log import METRICS

PICTURE = "curves.png"
# Larger numbers come from a damaged line, and no axis can show them.
LARGEST = 1e15


def draw_curves(folder: Path, class_names: Sequence[str]) -> Path:
    """Draw `curves.png` from metrics.jsonl; the DSC panel needs at least one validation."""
    from matplotlib.figure import Figure

    records = read_metrics(folder)
    steps = [record for record in records if _holds_numbers(record, "step", "loss", "lr")]
    epochs = [record for record in records if _holds_numbers(record, "steps", "mean_loss")]
    validations = [record for record in records if _is_validation(record, class_names)]
    panels = 3 if validations else 2
    figure = Figure(figsize=(5 * panels, 3.6), layout="constrained")
    axes = figure.subplots(1, panels)

    at = [record["step"] for record in steps]
    axes[0].plot(at, [record["loss"] for record in steps], color="0.8", lw=0.8, label="step")
    axes[0].plot(
        [record["steps"] for record in epochs],
        [record["mean_loss"] for record in epochs],
        color="C0",
        marker="." if len(epochs) < 40 else None,
        label="mean of the epoch",
    )
    axes[0].set(title="loss", xlabel="step")
    axes[0].legend()
    axes[1].plot(at, [record["lr"] for record in steps], color="C1")
    axes[1].set(title="learning rate", xlabel="step", ylim=(0, None))

    if validations:
        at = [record["epoch"] + 1 for record in validations]
        colours = label_colours(class_names)[1:] / 255
        for index, (name, colour) in enumerate(zip(class_names, colours, strict=True)):
            dsc = [record["dsc"][index] for record in validations]
            percent = [np.nan if value is None else 100 * value for value in dsc]
            if not np.isnan(percent).all():
                axes[2].plot(at, percent, color=colour, label=name, marker=".")
        scores = [100 * record["score"] for record in validations]
        axes[2].plot(at, scores, color="black", lw=2, label="mean")
        best = int(np.argmax(scores))
        axes[2].plot(at[best], scores[best], "k*", ms=12, label=f"best, epoch {at[best]}")
        axes[2].set(title="DSC % of held-out cases", xlabel="epoch", ylim=(0, 100))
        axes[2].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    for panel in axes:
        panel.grid(alpha=0.3)
    with atomic_path(folder / PICTURE) as temporary:
        figure.savefig(temporary, dpi=110)
    return folder / PICTURE


def read_validations(folder: Path, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Read the validations in metrics.jsonl: `epoch`, `score`, `dsc` of each class, `cases`."""
    return [record for record in read_metrics(folder) if _is_validation(record, class_names)]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the records of metrics.jsonl; lines that are none are left out with a warning."""
    path = folder / METRICS
    records, damaged = [], []
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            record = parse_json(line) if line else {}
        except ValueError:
            record = None
        if not isinstance(record, dict):
            damaged.append(number)
        elif record:
            records.append(record)
    if damaged:
        warn(f"{path} is damaged in {len(damaged)} line(s), first {damaged[0]}; they are left out")
    return records


def _holds_numbers(record: dict[str, Any], *names: str) -> bool:
    return all(
        isinstance(record.get(name), (int, float)) and abs(record[name]) < LARGEST for name in names
    )


def _is_validation(record: dict[str, Any], class_names: Sequence[str]) -> bool:
    return _holds_numbers(record, "epoch", "score") and _are_scores(record.get("dsc"), class_names)


def _are_scores(values: object, class_names: Sequence[str]) -> bool:
    return (
        isinstance(values, list)
        and len(values) == len(class_names)
        and all(value is None or _holds_numbers({"": value}, "") for value in values)
    )
