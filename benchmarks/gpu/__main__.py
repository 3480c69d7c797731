"""Prove on a GPU that the project is right and fast: `python -m benchmarks.gpu --help`."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.arguments import ArgumentParser
from common.errors import InputError, exit_on_bad_input
from common.writing import write_json

from .child import run_child
from .report import counts, table, value_text
from .rows import Row, from_json, not_run
from .running import ROOT, run_stage

EXIT_FAILED = 3
RESULTS = ROOT / "benchmarks" / "results"
# Under --small a stage has this many times its deadline: a CPU may have other work.
SMALL_SLACK = 4
# Stages in their order with their deadlines in seconds. They are named by text, so that a module
# that cannot be imported fails only its own stage. What matters most comes first: all deadlines
# together are more than the nine minutes, and a stage that is cut off keeps its rows.
STAGES: dict[str, tuple[str, float]] = {
    "machine": ("benchmarks.gpu.machine:machine", 60),
    "golden": ("benchmarks.gpu.golden:golden", 60),
    "attention": ("benchmarks.gpu.attention:attention", 60),
    "syncs": ("benchmarks.gpu.syncs:syncs", 40),
    "repeats": ("benchmarks.gpu.repeats:repeats", 100),
    "speed": ("benchmarks.gpu.speed:speed", 150),
    "kernels": ("benchmarks.gpu.kernels:kernels", 60),
    "loader": ("benchmarks.gpu.loader:loader", 60),
    "ranks": ("benchmarks.gpu.ranks:ranks", 60),
    "phantoms": ("benchmarks.gpu.phantoms:phantoms", 110),
    "memory": ("benchmarks.gpu.little_memory:memory", 60),
    "compiled": ("benchmarks.gpu.compiled:compiled", 120),
}


def build_parser(stages: Mapping[str, tuple[str, float]]) -> ArgumentParser:
    """Build the parser of `python -m benchmarks.gpu`."""
    parser = ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Prove that the project is right and fast on a GPU: print one table and write\n"
        f"a JSON file, which is complete after every row. Exit code {EXIT_FAILED}: a row failed.\n"
        "Needs PyTorch with CUDA, numpy, scipy, h5py, einops, safetensors, tqdm, pillow and\n"
        "matplotlib; no network.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--small",
        action="store_true",
        help="sizes for a CPU: shows that every stage runs, and its times mean nothing",
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(stages), metavar="STAGE", help=", ".join(stages)
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the JSON file; default: benchmarks/results/gpu.json, or gpu_small.json",
    )
    parser.add_argument("--deadline", type=float, default=9, help="minutes in all (default: 9)")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a stage, as module:function
    parser.add_argument("--rows_fd", type=int, help=argparse.SUPPRESS)
    return parser


def main(
    argv: Sequence[str] | None = None, stages: Mapping[str, tuple[str, float]] = STAGES
) -> int:
    """Run the stages, write the JSON, print the table, and return the exit code."""
    args = build_parser(stages).parse_args(argv)
    if args.child is not None:
        try:
            run_child(args.child, args.rows_fd, args.device, small=args.small)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # Python would wait for the processes that the stage has started.
        return 0
    if not args.small:
        require_gpu(args.device)
    output = args.output or RESULTS / ("gpu_small.json" if args.small else "gpu.json")
    proof = prove(args, stages, output)
    print(f"\n{table(proof)}\nnumbers: {output}", flush=True)
    if not (args.small or args.only or args.output):
        from benchmarks.table import PAGE, update_page

        update_page(PAGE, RESULTS)
    rows = [row for stage in proof["stages"].values() for row in stage["rows"]]
    return EXIT_FAILED if any(row["passed"] is False for row in rows) else 0


def require_gpu(device: str) -> None:
    """Raise an `InputError` if the sizes for a GPU would run on a CPU."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        raise InputError(
            f"--device is {device} and PyTorch finds {torch.cuda.device_count()} CUDA GPUs; pass "
            "--small to run every stage on a CPU, at sizes that prove nothing about speed"
        )


def prove(
    args: argparse.Namespace, stages: Mapping[str, tuple[str, float]], output: Path
) -> dict[str, Any]:
    """Run the stages one after another and write what they found after every row.

    Returns:
        `where` (facts of hardware and versions, None if no stage came so far), `small`, and by
        stage its `rows`, `seconds`, and of a failed one the end of its `stderr`.
    """
    began = time.monotonic()
    over = began + 60 * args.deadline
    proof: dict[str, Any] = {"where": None, "small": args.small, "stages": {}}
    flags = ["--device", args.device, *(["--small"] if args.small else [])]
    for name in [name for name in stages if args.only is None or name in args.only]:
        target, deadline = stages[name]
        seconds = deadline * (SMALL_SLACK if args.small else 1)
        why = "the stage's deadline"
        started = time.monotonic()
        if over - started < seconds:
            seconds, why = over - started, f"the total deadline of {args.deadline:g} minutes"
        found = proof["stages"][name] = {"rows": [], "seconds": 0.0}
        if seconds <= 0:
            keep(not_run("the stage", f"it would start after {why}"), name, found)
        else:
            for content in run_stage(target, flags, seconds, why):
                proof["where"] = content.get("where", proof["where"])
                if "stderr" in content:
                    found["stderr"] = content["stderr"]
                if "row" in content:
                    keep(from_json(content["row"]), name, found)
                found["seconds"] = round(time.monotonic() - started, 1)
                write_json(output, proof)
        found["seconds"] = round(time.monotonic() - started, 1)
        write_json(output, proof)
        print(f"{name}: {found['seconds']} s; so far {counts(proof)}", flush=True)
    return proof


def keep(row: Row, name: str, found: dict[str, Any]) -> None:
    """Add a row to those of its stage, and print it for a run that is cut off."""
    found["rows"].append(vars(row))
    bound = f" ({row.bound})" if row.bound else ""
    note = f"; {row.note}" if row.note else ""
    print(f"  {name}: {row.verdict} {row.what}: {value_text(row)}{bound}{note}", flush=True)


if __name__ == "__main__":
    with exit_on_bad_input():
        sys.exit(main())
