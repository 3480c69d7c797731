"""What a training run writes while it goes: log.txt, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tensorboardX import SummaryWriter

from datasets.registry import label_colours


class RunLog:
    """Scalars are kept on the device and fetched together, so that steps need not wait for them.

    Args:
        folder: the run's.
        every: steps between fetches.
    """

    def __init__(self, folder: Path, *, every: int) -> None:
        self.every = every
        self.writer = SummaryWriter(str(folder / "log"))
        self.metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.waiting: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = []
        self.last_loss = math.nan
        self.epoch_losses: list[float] = []

    def step(self, facts: dict[str, Any], terms: dict[str, torch.Tensor]) -> None:
        """Note one step: plain facts (step, epoch, lr) and scalars still on the device."""
        self.waiting.append((facts, terms))
        if len(self.waiting) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Fetch what is waiting with one copy and write it.

        Raises:
            FloatingPointError: a loss is NaN or infinite.
        """
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        names = list(waiting[0][1])
        on_device = [terms[name] for _, terms in waiting for name in names]
        values = torch.stack(on_device).view(-1, len(names)).tolist()
        for (facts, _), row in zip(waiting, values, strict=True):
            scalars = dict(zip(names, row, strict=True))
            self.epoch_losses.append(scalars["loss"])
            self.write(facts | scalars)
            for name, value in [("lr", facts["lr"]), *scalars.items()]:
                self.writer.add_scalar(f"info/{name}", value, facts["step"])
            if not math.isfinite(scalars["loss"]):
                raise FloatingPointError(
                    f"the loss is {scalars['loss']} at step {facts['step']}; lower --base_lr or "
                    "lengthen --warmup_period"
                )
        self.last_loss = self.epoch_losses[-1]
        self.metrics.flush()

    def end_epoch(self, epoch: int, step: int, seconds: float) -> float:
        """Write one line about the epoch; returns the mean loss of its steps."""
        self.flush()
        loss = sum(self.epoch_losses) / len(self.epoch_losses)
        self.epoch_losses.clear()
        self.write({"epoch": epoch, "step": step, "mean_loss": loss, "seconds": seconds})
        return loss

    def write(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self.metrics.write(json.dumps(record) + "\n")

    def pictures(
        self, step: int, image: torch.Tensor, logits: torch.Tensor, label: torch.Tensor
    ) -> None:
        """Show one sample: image (3, S, S), logits (C, S/4, S/4) and label (S/4, S/4)."""
        colours = label_colours(len(logits) - 1)
        small = F.interpolate(image[None].float(), label.shape, mode="area")[0]
        grey = small - small.min()
        grey = grey / grey.max().clamp_min(1e-6)  # a constant slice is black, not a division by 0
        pictures = {
            "Image": (grey.cpu().numpy().transpose(1, 2, 0) * 255).astype(np.uint8),
            "Prediction": colours[logits.argmax(dim=0).cpu().numpy()],
            "GroundTruth": colours[label.cpu().numpy()],
        }
        for name, picture in pictures.items():  # (H, W, 3) uint8
            self.writer.add_image(f"train/{name}", picture, step, dataformats="HWC")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        """Write what is waiting and close the files."""
        try:
            self.flush()
        finally:
            self.metrics.close()
            self.writer.close()


def start_logging(path: Path) -> None:
    """Send log lines to the terminal and, with the time, to `path`."""
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    to_terminal = logging.StreamHandler(sys.stdout)
    to_terminal.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[to_file, to_terminal], force=True)
