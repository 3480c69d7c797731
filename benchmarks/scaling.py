"""Measure how time and memory grow with slices, volumes, image size and batch size."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import test
from evaluation.charts import save
from trainer import freeze_unreached, make_optimizer, training_step
from training.losses import SegmentationLoss
from training.memory import peak_memory

from . import scenes
from .timing import timed, wait

CURVES = {
    "slices": ("slices of a volume, test.py", (12, 24, 48)),
    "volumes": ("volumes of 24 slices, test.py", (1, 2, 4)),
    "image_size": ("image size in px, vit_b forward", (224, 512, 768, 1024)),
    "batch": ("slices a step, vit_b at 224 px", (1, 2, 4)),
}


def measure(curve: str, value: int, device: torch.device) -> dict[str, float]:
    """Measure seconds and peak memory (GiB) of one point; memory is that of the whole process."""
    prepare = {"slices": test_slices, "volumes": test_volumes, "image_size": forward, "batch": step}
    run = prepare[curve](value, device)
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = statistics.median(timed(run, device) for _ in range(2))
    wait(device)
    return {"value": value, "seconds": seconds, "memory_gib": peak_memory(device) / 2**30}


def test_slices(count: int, device: torch.device, volumes: int = 1) -> Callable[[], object]:
    """Return a run of `test.py` on volumes of `count` slices of 256 × 256, smallest encoder."""
    folder = scenes.scratch_folder()
    rng = np.random.default_rng(0)
    label = np.zeros((count, 256, 256), dtype=np.uint8)
    label[:, 60:180, 50:150] = rng.integers(1, 9)
    cases = {}
    for index in range(1, volumes + 1):
        image = (label / 8 + 0.05 * rng.random(label.shape)).astype(np.float32)
        cases[f"case{index:04d}"] = (image, label)
    args, dataset = scenes.test_data(folder, cases, "--is_savenii", "--img_size", "224")
    model = scenes.network("vit_tiny", 224).eval().to(device)
    model.merge()
    return lambda: list(test.test_cases(args, model, dataset, folder / "out"))


def test_volumes(count: int, device: torch.device) -> Callable[[], object]:
    """Return a run of `test.py` on `count` volumes of 24 slices."""
    return test_slices(24, device, volumes=count)


def forward(image_size: int, device: torch.device) -> Callable[[], object]:
    """Return a forward pass of one image through vit_b."""
    model = scenes.network("vit_b", image_size).eval().to(device)
    model.merge()
    image = torch.rand(1, 3, image_size, image_size, device=device)

    @torch.inference_mode()
    def run() -> None:
        model(image)

    return run


def step(batch_size: int, device: torch.device) -> Callable[[], object]:
    """Return one update of vit_b at 224 px."""
    model = scenes.network("vit_b", 224).train().to(device)
    freeze_unreached(model)
    optimizer = make_optimizer(model, "adamw", 1e-4)
    criterion = SegmentationLoss(scenes.NUM_CLASSES + 1, 0.8)
    batch = {
        "image": torch.rand(batch_size, 3, 224, 224, device=device),
        "low_res_label": torch.randint(
            0, scenes.NUM_CLASSES + 1, (batch_size, 56, 56), device=device
        ),
    }
    return lambda: training_step(model, batch, criterion, optimizer, 1e-4)


def measure_all(device: torch.device) -> dict[str, list[dict[str, float]]]:
    """Measure all points of all curves, each in a new process so that peaks do not mix."""
    curves: dict[str, list[dict[str, float]]] = {}
    for curve, (_, values) in CURVES.items():
        curves[curve] = []
        for value in values:
            command = [sys.executable, "-m", "benchmarks.scaling", curve, str(value), str(device)]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                cwd=Path(__file__).parent.parent,
            )
            if done.returncode:
                raise RuntimeError(f"{' '.join(command[2:])} failed: {done.stderr[-2000:]}")
            curves[curve].append(json.loads(done.stdout.splitlines()[-1]))
    return curves


def growth(points: list[dict[str, float]], key: str) -> float:
    """Return the exponent of growth between the last two points: 0 constant, 1 linear."""
    last, before = points[-1], points[-2]
    return float(np.log(last[key] / before[key]) / np.log(last["value"] / before["value"]))


def draw(curves: dict[str, list[dict[str, float]]], path: Path, device: str) -> None:
    """Draw time, relative to the first point, and peak memory of each curve."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(curves), figsize=(3.4 * len(curves), 5.6))
    for column, (curve, points) in zip(axes.T, curves.items(), strict=True):
        values = [point["value"] for point in points]
        times = [point["seconds"] / points[0]["seconds"] for point in points]
        column[0].plot(values, times, "o-", color="tab:blue")
        column[0].set_ylabel("time, first point = 1")
        column[1].plot(values, [point["memory_gib"] for point in points], "o-", color="tab:red")
        column[1].set_ylabel("peak memory, GiB")
        for axis in column:
            axis.set_xlabel(CURVES[curve][0])
            axis.set_ylim(bottom=0)
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3)
    figure.suptitle(f"Cost against size, on {device}")
    figure.tight_layout()
    save(figure, path)


if __name__ == "__main__":
    curve_name, point_value, device_name = sys.argv[1:]
    print(json.dumps(measure(curve_name, int(point_value), torch.device(device_name))))
