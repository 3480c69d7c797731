"""The table of the proof."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .rows import Row, from_json

VERDICTS = ("PASS", "FAIL", "figure", "not run")


def table(proof: dict[str, Any]) -> str:
    """Return all rows as a Markdown table, after them where they were measured."""
    lines = ["| stage | what | value | bound | result |", "| --- | --- | --- | --- | --- |"]
    for name, stage in proof["stages"].items():
        for row in map(from_json, stage["rows"]):
            result = f"{row.verdict}: {row.note}" if row.note else row.verdict
            cells = [name, row.what, value_text(row), row.bound, result]
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join([*lines, "", f"{counts(proof)}. {place(proof['where'])}"])


def value_text(row: Row) -> str:
    """Return the value with its unit."""
    if row.value is None:
        return "–"
    value = row.value if isinstance(row.value, str) else f"{row.value:.4g}"
    return f"{value} {row.unit}".strip()


def counts(proof: dict[str, Any]) -> str:
    """Return how many rows passed, failed, are figures and were not run."""
    found = Counter(
        from_json(row).verdict for stage in proof["stages"].values() for row in stage["rows"]
    )
    return ", ".join(f"{found[verdict]} {verdict}" for verdict in VERDICTS)


def place(where: dict[str, Any] | None) -> str:
    """Return the hardware, versions and date as a sentence."""
    if where is None:
        return "No stage came far enough to say where it ran."
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    return (
        f"{where['device']}, {where['date']}, Python {where['python']}, torch {where['torch']}, "
        f"{versions}, commit {where['commit'] or 'not known'}."
    )
