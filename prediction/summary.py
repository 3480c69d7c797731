"""What `predict.py` writes and prints about all cases: tables, warnings, and what to open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common.names import write_table
from common.writing import write_json
from datasets.registry import DatasetSpec
from datasets.scans.labels import write_label_tables
from datasets.scans.text_headers import SEGMENTATION
from datasets.scans.unused import Unused
from prediction.records import INTENSITIES, require_output

COLUMNS = ("case", "class", "value", "voxels", "ml", "cut_by_edge", *INTENSITIES)
SUMMARY = ("labels.txt", "labels.ctbl", "volumes.csv", "predictions.json", "viewer.html")
TABLE_ROWS = 40  # cases that are printed


def write_summary(
    spec: DatasetSpec,
    folder: Path,
    results: dict[str, dict[str, Any]],
    failures: dict[str, str],
    unused: Sequence[Unused],
    *,
    settings: dict[str, Any],
) -> None:
    """Write `volumes.csv`, `predictions.json` and the tables of names and colours.

    Args:
        results: result of each case that is listed, by name.
        failures: message for each scan that failed, by name.
        unused: what was left out of the input.
    """
    require_output(folder)
    cases = [result for _, result in sorted(results.items())]
    write_label_tables(folder, spec)
    rows = [row for result in cases for row in _rows(spec, result)]
    write_table(folder / "volumes.csv", [COLUMNS, *rows])
    content = {
        "cases": cases,
        "failed": failures,
        "not_used": [asdict(one) for one in unused],
        "spec": spec.to_json(),
        **settings,
    }
    write_json(folder / "predictions.json", content)


def _rows(spec: DatasetSpec, result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Return a row of `volumes.csv` for each class of a case."""
    unknown = [None] * spec.num_classes
    amounts = result["ml"] or unknown
    classes = zip(
        spec.class_names,
        spec.predicted_values,
        result["voxels"],
        amounts,
        result["cut_by_edge"],
        *(result.get(name) or unknown for name in INTENSITIES),
        strict=True,
    )
    return [
        (
            result["case"],
            name,
            value,
            voxels,
            "" if ml is None else shown_ml(ml),
            "yes" if cut else "no",
            # Numbers, not texts: a text that begins with a minus would be quoted.
            *("" if number is None else float(f"{number:.6g}") for number in numbers),
        )
        for name, value, voxels, ml, cut, *numbers in classes
    ]


def shown_ml(ml: float) -> str:
    """Return a volume to 0.01 ml, or below 1 ml to three digits."""
    if ml >= 1:
        return f"{ml:.2f}"
    return np.format_float_positional(ml, precision=3, fractional=False, trim="-")


def volume_table(spec: DatasetSpec, results: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each case with the volumes of its organs, for the terminal."""
    unit = "voxels" if any(result["ml"] is None for result in results) else "ml"
    lines = [f"volumes in {unit} (* the edge of the scan cuts the organ):"]
    width = max((len(result["case"]) for result in results[:TABLE_ROWS]), default=0)
    for result in results[:TABLE_ROWS]:
        found, absent = [], []
        amounts = result["ml"] if unit == "ml" else result["voxels"]
        classes = zip(spec.class_names, amounts, result["cut_by_edge"], strict=True)
        for name, amount, cut in classes:
            shown = f"{amount:.3g}" if unit == "ml" and amount < 100 else f"{amount:.0f}"
            (found if amount else absent).append(f"{name} {shown}{'*' * cut}" if amount else name)
        missing = f"; not found: {', '.join(absent)}" if absent else ""
        lines.append(f"  {result['case']:<{width}}  {', '.join(found) or 'nothing'}{missing}")
    if len(results) > TABLE_ROWS:
        lines.append(f"  … and {len(results) - TABLE_ROWS} more")
    return lines


def what_to_open(folder: Path, results: Sequence[dict[str, Any]]) -> list[str]:
    """Return lines that say which files to look at, and with which program."""
    lines = [f"to look at: {folder / 'overlays'} (pictures), {folder / 'volumes.csv'} (volumes)"]
    scans = [result["file"] for result in results if not result["file"].endswith(".png")]
    if scans and scans[0].endswith(SEGMENTATION):
        lines.append(f"  {folder / scans[0]} over its scan: in 3D Slicer, with names and colours")
    elif scans:
        lines.append(
            f"  {folder / scans[0]} over its scan: in ITK-SNAP with {folder / 'labels.txt'}, in 3D "
            f"Slicer with {folder / 'labels.ctbl'}"
        )
    return lines
