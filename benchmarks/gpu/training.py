"""The training step that several stages time, and the ways to compute it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks import scenes
from benchmarks.timing import timed
from trainer import StepOptions, freeze_unreached, make_optimizer, training_step
from training.losses import SegmentationLoss
from training.optimizers import parameters_of
from training.recording import RecordedGradients
from utils import allow_tf32, seed_everything

from .rows import Setting

CLASSES = scenes.NUM_CLASSES + 1
LR = 1e-4
WARM_UP, TOGETHER = 3, 3  # steps before the clock starts; steps that are timed together
FEWEST, MOST = 3, 10  # measurements of a median
ENOUGH = 2.0  # seconds after which the fewest measurements are enough


@dataclass(frozen=True)
class Case:
    """The network and the batch of the published recipe, or a small form of it."""

    vit_name: str
    image_size: int
    batch: int

    @classmethod
    def of(cls, setting: Setting) -> Case:
        """Return the case of a setting."""
        return cls("vit_tiny", 64, 2) if setting.small else cls("vit_b", 512, 24)

    def __str__(self) -> str:
        return f"{self.vit_name}, {self.image_size} px, batch {self.batch}"

    def network(self, device: torch.device) -> nn.Module:
        """Return a network with random weights, equal in each call, as the trainer prepares it."""
        model = scenes.network(self.vit_name, self.image_size).train().to(device)
        freeze_unreached(model)
        return model

    def slices(self, count: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Return `count` slices with random content, equal in each call, as `training_step` takes.

        The first slices do not depend on `count`.
        """
        generator = torch.Generator().manual_seed(1)
        images, labels = [], []
        for _ in range(count):
            side = self.image_size
            images.append(torch.rand(1, side, side, generator=generator))
            side //= 4
            labels.append(torch.randint(0, CLASSES, (side, side), generator=generator))
        return {
            "image": torch.stack(images).to(device).expand(-1, 3, -1, -1),
            "low_res_label": torch.stack(labels).to(device),
        }


@dataclass(frozen=True)
class Way:
    """A way to compute a training step.

    Args:
        parts: number of equal parts in which the batch is computed.
        recorded: whether a CUDA graph replays the step.
    """

    precision: str  # fp32, tf32 or bf16
    deterministic: bool = True
    parts: int = 1
    recorded: bool = False

    def __str__(self) -> str:
        order = "deterministic" if self.deterministic else "not deterministic"
        parts = f", in {self.parts} parts" * (self.parts > 1)
        return f"{self.precision}, {order}" + parts + ", recorded" * self.recorded

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """The dtype of autocast."""
        return torch.bfloat16 if self.precision == "bf16" else None

    def choose(self, *, compiles: bool = False) -> None:
        """Choose kernels as the programs do for this way.

        Args:
            compiles: whether the network is compiled.
        """
        seed_everything(0, deterministic=self.deterministic, compiles=compiles)
        allow_tf32(self.precision == "tf32")

    def updates(
        self, network: nn.Module, batch_size: int
    ) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
        """Return a function from a batch to the loss, on the device, after an update by AdamW."""
        criterion = SegmentationLoss(CLASSES, 0.8)
        optimizer = make_optimizer(network, "adamw", LR)
        options = StepOptions(
            at_once=-(-batch_size // self.parts),
            amp_dtype=self.amp_dtype,
            recorded=RecordedGradients(parameters_of(optimizer)) if self.recorded else None,
        )
        return lambda batch: training_step(network, batch, criterion, optimizer, LR, options)[0][
            "loss"
        ]


def median_seconds(step: Callable[[], object], setting: Setting) -> float:
    """Return the median seconds of a step after some to warm up.

    A few steps are timed together, as in training: the host may run ahead of the GPU.
    """
    if setting.small:
        return timed(step, setting.device)
    for _ in range(WARM_UP):
        step()

    def steps() -> None:
        for _ in range(TOGETHER):
            step()

    found: list[float] = []
    began = time.perf_counter()
    while len(found) < FEWEST or (len(found) < MOST and time.perf_counter() - began < ENOUGH):
        found.append(timed(steps, setting.device) / TOGETHER)
    return statistics.median(found)
