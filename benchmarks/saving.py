"""Time saving and logging against the training that is saved and logged."""

from __future__ import annotations

import argparse
import statistics

import torch

from config.settings import complete
from distributed.ranks import ALONE
from trainer import freeze_unreached, make_optimizer, training_step
from training.checkpoint import Checkpoint, Progress, newest_state
from training.losses import SegmentationLoss
from training.run_log import RunLog
from training.trained import Trained

from . import scenes
from .timing import Row, check_agreement, largest, timed

UPDATES = 93  # per epoch of the published recipe; it has 24 slices per update, this row has 2


def saving_rows(device: torch.device) -> list[Row]:
    """Time the full state, the adapter and the log of one epoch against its training."""
    model = scenes.network().to(device).train()
    freeze_unreached(model)
    optimizer = make_optimizer(model, "adamw", 1e-4)
    batch = {
        "image": torch.rand(2, 1, 512, 512, device=device).expand(-1, 3, -1, -1),
        "low_res_label": torch.randint(0, scenes.NUM_CLASSES + 1, (2, 128, 128), device=device),
    }
    criterion = SegmentationLoss(scenes.NUM_CLASSES + 1, 0.8)
    terms, _ = training_step(model, batch, criterion, optimizer, 1e-4)
    args = complete(argparse.Namespace(root_path="."))
    folder = scenes.scratch_folder()

    with RunLog(folder, every=args.log_every) as log:
        run = Progress()
        trained = Trained(model, optimizer, torch.amp.GradScaler(enabled=False))
        checkpoint = Checkpoint(folder, args, run, trained, log, ALONE)

        def train() -> None:
            training_step(model, batch, criterion, optimizer, 1e-4)

        def save() -> None:
            for _ in range(UPDATES):
                log.step({"step": run.step, "epoch": 0, "lr": 1e-4}, terms)
                run.step += 1
            log.end_epoch(0, run.step, 1.0)
            checkpoint.save_adapter("epoch_0.pth")
            checkpoint.save()

        save()
        ratios = []
        for _ in range(5):
            ratios.append(UPDATES * timed(train, device) / timed(save, device))
        checkpoint.save()
    kept = newest_state(folder)["model"]
    names = dict(model.named_parameters())
    difference = max(largest(kept[n], names[n].detach()) for n in kept if n in names)
    return [
        Row(
            name="saving",
            what=f"state, adapter and log of an epoch of {UPDATES} updates, vit_b",
            peer="the training of that epoch, 512 px, 2 slices an update",
            ratio=statistics.median(ratios),
            low=min(ratios),
            high=max(ratios),
            repeats=len(ratios),
            difference=check_agreement("saving", difference, 0),
            tolerance=0,
            target=50,
            notes="at most 2 % of it",
        )
    ]
