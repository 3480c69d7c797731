"""Training on a GPU is repeatable: the same bits twice, and after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import scenes
from common.files import sha256_of
from training.checkpoint import newest_state

from . import files
from .programs import Program, start
from .rows import Row, Setting, holds

STEPS, BATCH = 6, 4  # in one epoch, so that the interrupted run stops in the middle of it
KINDS = {"float32": [], "bf16": ["--use_amp"]}


def repeats(setting: Setting) -> Iterator[Row]:
    """Run train.py for six steps twice, and for three, then resume it; all runs at once."""
    folder = scenes.scratch_folder()
    vit_name, size = ("vit_tiny", 64) if setting.small else ("vit_b", 512)
    flags = ["--root_path", str(files.write_slices(folder / "data", STEPS * BATCH, 64))]
    flags += ["--ckpt", str(files.write_base(folder / "base.pth", vit_name, size))]
    flags += ["--vit_name", vit_name, "--img_size", str(size), "--device", str(setting.device)]
    flags += ["--processes", "1", "--n_gpu", "1", "--batch_size", str(BATCH), "--AdamW"]
    flags += ["--base_lr", "1e-3", "--log_every", "1", "--max_epochs", "1"]
    flags += ["--num_workers", "1"]  # of each of the programs that run at once
    kinds = ["float32"] if setting.small else list(KINDS)

    def train(kind: str, log: str, name: str, steps: int, *more: str) -> Program:
        command = ["train.py", *flags, *KINDS[kind], "--output", str(folder / kind)]
        command += ["--name", name, "--max_iterations", str(steps), *more]
        return start(command, folder / f"{kind}_{log}.txt")

    running: dict[str, list[Program]] = {
        kind: [
            train(kind, "once", "once", STEPS),
            train(kind, "again", "again", STEPS),
            train(kind, "stopped", "resumed", STEPS // 2),
        ]
        for kind in kinds
    }
    for kind in kinds:
        running[kind][-1].process.wait()
        resume = ["--resume", str(folder / kind / "resumed")]
        running[kind].append(train(kind, "resumed", "resumed", STEPS, *resume))
    for kind in kinds:
        failed = [program for program in running[kind] if program.process.wait() != 0]
        for program in failed:
            yield holds(f"train.py ends, {program.log.stem}", False, program.told()[-1])
        if not failed:
            yield from compare(folder / kind, kind)


def compare(folder: Path, kind: str) -> Iterator[Row]:
    """Compare the adapters, losses, weights and optimisers that the runs left."""
    first = left(folder / "once")
    for name, what in (
        ("again", "six steps twice"),
        ("resumed", "three steps, resumed for three more"),
    ):
        other = left(folder / name)
        unlike = [part for part in first if first[part] != other[part]]
        told = f"unlike: {', '.join(unlike)}" if unlike else f"adapter {first['adapter'][:12]}"
        yield holds(f"{what}: the same bits, {kind}", not unlike, told)


def left(run: Path) -> dict[str, str]:
    """Return hashes of what a run left: adapter, measured losses, weights and optimiser."""
    (adapter,) = run.glob("*.pth")
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    measured = [line for line in lines if "lr" in line]  # not what is logged at the end of a run
    state = newest_state(run)
    return {
        "adapter": sha256_of(adapter),
        "losses": digest(measured),
        "weights": digest(state["model"]),
        "optimiser": digest(state["optimizer"]),
    }


def digest(content: Any) -> str:
    """Return a hash of tensors, numbers and texts in lists and dictionaries."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            found.update(f"{part.dtype}{tuple(part.shape)}".encode())
            found.update(part.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for key, value in part.items():
                found.update(repr(key).encode())
                add(value)
        elif isinstance(part, (list, tuple)):
            for value in part:
                add(value)
        else:
            found.update(repr(part).encode())

    add(content)
    return found.hexdigest()
