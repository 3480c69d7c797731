"""Time this project against the alternatives: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.arguments import ArgumentParser
from common.errors import InputError, exit_on_bad_input
from common.writing import atomic_path
from utils import choose_device

from . import scaling
from .rows import ROWS
from .table import PAGE, RESULTS, update_page
from .timing import DisagreementError
from .where import device_name, installed, where

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("transformers", "onnxruntime", "MedPy", "scipy", "SimpleITK", "h5py")
NEEDS = {  # row: peers that it cannot do without; the others are imported by the project itself
    "encoder": ("transformers",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "testing": ("MedPy",),
    "metrics": ("MedPy",),
}
EXIT_DISAGREEMENT, EXIT_SLOW = 3, 4


def build_parser() -> ArgumentParser:
    """Build the parser of `python -m benchmarks`."""
    parser = ArgumentParser(
        prog="python -m benchmarks",
        description="Check that this project and its peers give the same results, time them in\n"
        "turns, and write benchmarks/results/DEVICE.json and the tables in docs/benchmarks.md.\n"
        f"Exit code {EXIT_DISAGREEMENT}: results differ. {EXIT_SLOW}: a target is missed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "rows", nargs="*", help=f"some of {', '.join([*ROWS, 'scaling'])}; default: all"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the rows, save the numbers, and return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    known = [*ROWS, "scaling"]
    unknown = [name for name in args.rows if name not in known]
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}, expected some of {', '.join(known)}")
    require_peers(args.rows or known)
    device = choose_device(args.device)
    if device.type == "cuda":  # `python -m benchmarks.gpu` times training steps there
        known.remove("step")
        if "step" in args.rows:
            parser.error("the row 'step' is of a CPU; run: python -m benchmarks.gpu --only speed")
    torch.manual_seed(0)
    path = RESULTS / f"{device.type}.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    missed = []
    for name in args.rows or known:
        print(f"{name} …", flush=True)
        if name == "scaling":
            measured: Any = scaling.measure_all(device)
            picture = PAGE.parent / f"scaling_{device.type}.png"
            scaling.draw(measured, picture, device_name(device))
        else:
            try:
                rows = ROWS[name](device)
            except DisagreementError as error:
                print(f"error: {error}; no speed is reported", file=sys.stderr)
                return EXIT_DISAGREEMENT
            measured = [vars(row) for row in rows]
            for row in rows:
                print(
                    f"  {row.ratio:7.2f} × [{row.low:.2f}, {row.high:.2f}]  {row.what}, against "
                    f"{row.peer}; results within {row.difference:.1g}"
                    + ("" if row.met else f"  MISSED: {row.target} ×"),
                    flush=True,
                )
            missed += [row.what for row in rows if not row.met]
        kept[name] = {"measured": measured, "where": where(device, PEERS)}
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    update_page(PAGE, RESULTS)
    print(f"tables: {PAGE.relative_to(ROOT)}, numbers: {path.relative_to(ROOT)}")
    for what in missed:
        print(f"missed: {what}")
    return EXIT_SLOW if missed else 0


def require_peers(rows: Sequence[str]) -> None:
    """Raise an `InputError` before the first measurement if a row's peer is not installed."""
    missing = {name: row for row in rows for name in NEEDS.get(row, ()) if not installed(name)}
    for name, row in missing.items():
        raise InputError(
            f"the row {row!r} is timed against {name}, which is not installed; run: pip install -r "
            "benchmarks/requirements.txt, or name other rows"
        )


if __name__ == "__main__":
    with exit_on_bad_input():
        sys.exit(main())
