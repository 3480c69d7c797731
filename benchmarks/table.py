"""Write the measured part of docs/benchmarks.md from the saved numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.writing import atomic_path

from . import scaling
from .gpu import report

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
RESULTS = Path(__file__).resolve().parent / "results"
PROOF = "gpu.json"  # what `python -m benchmarks.gpu` found
START, END = "<!-- measured -->", "<!-- end of measured -->"
DEVICES = {"cpu": "On a CPU", "cuda": "On a GPU"}


def update_page(page: Path, results: Path) -> None:
    """Replace the text between the markers of the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    parts = []
    for device, title in DEVICES.items():
        path = results / f"{device}.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        proof = results / PROOF
        if device == "cuda" and proof.is_file():
            kept_proof = json.loads(proof.read_text(encoding="utf-8"))
            shown = report.table(kept_proof).replace("<", "&lt;")  # in names of kernels
            summary = f"All rows of make gpu: {report.counts(kept_proof)}"
            parts.append(
                f"### {title}\n\n<details>\n<summary>{summary}</summary>\n\n{shown}\n\n</details>"
            )
            if not kept:
                continue
            title = f"{title}, against other programs"
        parts.append(section(title, device, kept))
    text = before + START + "\n\n" + "\n\n".join(parts) + "\n\n" + END + after
    with atomic_path(page) as temporary:
        temporary.write_text(text, encoding="utf-8")


def section(title: str, device: str, kept: dict[str, Any]) -> str:
    """Return the tables of one device."""
    lines = [f"### {title}", ""]
    if not kept:
        command = "make gpu" if device == "cuda" else f"make benchmark DEVICE={device}"
        return "\n".join([*lines, f"Not measured. `{command}` fills this section in."])
    rows = [
        (row, entry["where"])
        for name, entry in kept.items()
        if name != "scaling"
        for row in entry["measured"]
    ]
    lines += [
        "| what | peer | times faster | spread | target | results within |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row, _ in rows:
        target = "–" if row["target"] is None else f"≥ {row['target']:g}"
        spread = f"{row['low']:.2f}–{row['high']:.2f}, {row['repeats']} repeats"
        peer = f"{row['peer']} ({row['notes']})" if row["notes"] else row["peer"]
        cells = [row["what"], peer, f"**{row['ratio']:.2f}**", spread, target]
        lines.append("| " + " | ".join([*cells, f"{row['difference']:.1g}"]) + " |")
    for row, _ in rows:
        if row["facts"]:
            facts = [f"{key} {value:.4g}" for key, value in row["facts"].items() if value]
            lines.append(f"\n{row['what']}, {row['notes'] or 'facts'}: {', '.join(facts)}.")
    places = {
        f"{where['device']}, {where['date']}, Python {where['python']}, torch {where['torch']}, "
        + ", ".join(f"{name} {number}" for name, number in where["versions"].items())
        for where in (entry["where"] for entry in kept.values())
    }
    lines += ["", f"`make benchmark DEVICE={device}` on {'; '.join(sorted(places))}."]
    if "scaling" in kept:
        lines += ["", *scaling_lines(kept["scaling"]["measured"], device)]
    return "\n".join(lines)


def scaling_lines(curves: dict[str, list[dict[str, float]]], device: str) -> list[str]:
    """Return the picture and the table of growth."""
    lines = [
        f"![Time and memory against size](scaling_{device}.png)",
        "",
        "| cost against | sizes | time grows as size to the | memory grows as size to the |",
        "| --- | --- | --- | --- |",
    ]
    for curve, points in curves.items():
        sizes = ", ".join(str(point["value"]) for point in points)
        growths = [f"{scaling.growth(points, key):.2f}" for key in ("seconds", "memory_gib")]
        lines.append(f"| {scaling.CURVES[curve][0]} | {sizes} | {growths[0]} | {growths[1]} |")
    return lines
