"""No operation of a training step makes the host wait for the GPU."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from config.settings import complete
from trainer import StepOptions, make_optimizer, training_step
from training.batches import augmented_batch
from training.losses import SegmentationLoss
from utils import allow_tf32, amp_dtype, seed_everything

from .rows import Row, Setting, holds, not_run
from .running import ROOT
from .training import CLASSES, LR, Case

EPOCHS = 3


def syncs(setting: Setting) -> Iterator[Row]:
    """Make steps whole and in parts, from pinned slices to the update, and refuse every wait."""
    seed_everything(0, deterministic=True)
    allow_tf32(False)
    case = Case.of(setting)
    size, count = case.image_size, case.batch
    model = case.network(setting.device)
    criterion = SegmentationLoss(CLASSES, 0.8)
    optimizer = make_optimizer(model, "adamw", LR)
    args = complete(argparse.Namespace(root_path="", num_classes=8, img_size=size))
    slices = {
        "image": torch.rand(count, 224, 224),
        "label": torch.randint(0, CLASSES, (count, 224, 224), dtype=torch.uint8),
        "index": list(range(count)),
    }
    if setting.device.type == "cuda":
        slices |= {name: slices[name].pin_memory() for name in ("image", "label")}

    for dtype in (None, amp_dtype(setting.device)):
        for at_once in (None, count // 2):
            options = StepOptions(at_once=at_once, clip_grad=1.0, amp_dtype=dtype)

            def steps(options: StepOptions = options) -> None:
                for epoch in range(EPOCHS):
                    batch = augmented_batch(slices, epoch, args, size // 4, setting.device)
                    training_step(model, batch, criterion, optimizer, LR, options)

            form = "whole" if at_once is None else "in two parts"
            name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
            what = f"{EPOCHS} steps of {count} slices wait for nothing, {form}, {name}"
            yield waits_for_nothing(what, steps, setting.device)


def waits_for_nothing(what: str, steps: Callable[[], None], device: torch.device) -> Row:
    """Make the same steps twice: the first time matrices for augmentation are made and kept."""
    steps()
    if device.type != "cuda":
        return not_run(what)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return holds(what, False, f"{str(error).splitlines()[0]}, in {place_of(error)}")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return holds(what, True)


def place_of(error: BaseException) -> str:
    """Return the innermost line of this project in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).is_relative_to(ROOT)] or frames
    inner = [f for f in own if "benchmarks" not in f.filename] or own
    return f"{Path(inner[-1].filename).name}:{inner[-1].lineno}: {inner[-1].line}"
