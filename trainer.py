"""The training loop, the optimiser and the learning rate (SAMed, section 3.4)."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from config import adapter_settings, complete
from datasets.augmentation import Augmentation, draw_augmentation, keyed_rng, prepare_batch
from datasets.dataset_synapse import Synapse_dataset
from losses import SegmentationLoss
from run_log import RunLog
from utils import amp_dtype, unwrap

SAVE_EVERY = 20  # epochs; epoch_159.pth is the published adapter
PICTURES_EVERY = 200  # steps

# Without prompts the loss never reaches these; frozen, they keep their values on any number of
# GPUs. They still go into the adapter file.
UNREACHED = (
    "prompt_encoder.point_embeddings.",
    "prompt_encoder.not_a_point_embed.",
    "prompt_encoder.mask_downscaling.",
    "mask_decoder.iou_prediction_head.",
)


def learning_rate(
    step: int, *, base_lr: float, warmup: int, max_iterations: int, exponent: float
) -> float:
    """The rate that step `step` runs with.

    The original sets the rate *after* a step from that step's number, so each step runs with the
    one of the step before; the first runs as if it followed itself. The published numbers were
    trained so.

    Args:
        warmup: steps of the linear rise; 0 for none.
        max_iterations: length of the polynomial decay.
    """
    previous = max(step - 1, 0)
    if previous < warmup:
        return base_lr * (previous + 1) / warmup
    return base_lr * (1 - (previous - warmup) / max_iterations) ** exponent


def make_optimizer(model: nn.Module, *, adamw: bool, base_lr: float) -> torch.optim.Optimizer:
    """AdamW (betas 0.9 and 0.999, decay 0.1) or SGD (momentum 0.9, decay 1e-4)."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if adamw:
        return torch.optim.AdamW(trainable, lr=base_lr, betas=(0.9, 0.999), weight_decay=0.1)
    return torch.optim.SGD(trainable, lr=base_lr, momentum=0.9, weight_decay=1e-4)


def freeze_unreached(model: nn.Module) -> None:
    """Exclude the parameters that get no gradient from training."""
    for name, parameter in model.sam.named_parameters():
        if name.startswith(UNREACHED):
            parameter.requires_grad_(False)


class EpochSampler(Sampler[int]):
    """A permutation of the samples keyed by (seed, epoch); nothing else can change the order."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        return iter(order.tolist())

    def __len__(self) -> int:
        return self.length


def collate_slices(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack slices of one size into tensors (B, H, W); leave mixed sizes as lists."""
    batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in samples[0]}
    for key in ("image", "label"):
        arrays = [torch.from_numpy(array) for array in batch[key]]
        batch[key] = torch.stack(arrays) if len({a.shape for a in arrays}) == 1 else arrays
    return batch


def training_step(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    criterion: SegmentationLoss,
    optimizer: torch.optim.Optimizer,
    lr: float,
    *,
    clip_grad: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    autocast: contextlib.AbstractContextManager[Any] | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One optimiser update.

    Args:
        batch: `image` (B, 3, S, S) about [0, 1] and `low_res_label` (B, S/4, S/4) int64.
        clip_grad: largest norm of the whole gradient; None, as published, leaves it alone.

    Returns:
        The detached loss terms and logits (B, classes + 1, S/4, S/4), still on the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    with autocast or contextlib.nullcontext():
        # the loss reads only low_res_logits: full-size masks are not made
        logits = model(batch["image"], full_size_masks=False)["low_res_logits"]
    terms = criterion(logits, batch["low_res_label"])

    optimizer.zero_grad(set_to_none=True)
    scaler = scaler or torch.amp.GradScaler(enabled=False)  # which passes everything through
    # fp16 gradients underflow unless scaled; a step that overflowed is skipped
    scaler.scale(terms["loss"]).backward()
    if clip_grad is not None:
        scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        terms["grad_norm"] = nn.utils.clip_grad_norm_(parameters, clip_grad)
    scaler.step(optimizer)
    scaler.update()
    return {name: value.detach() for name, value in terms.items()}, logits.detach()


def make_loader(
    dataset: Synapse_dataset, args: argparse.Namespace, device: torch.device
) -> DataLoader:
    """Batches of raw slices, in an order keyed by (seed, epoch); the last may be smaller."""
    workers = args.num_workers
    if workers is None:  # on a CPU a slice is read faster than a worker hands it over
        workers = 4 if device.type == "cuda" else 0
    return DataLoader(
        dataset,
        batch_size=args.batch_size * args.n_gpu,
        sampler=EpochSampler(len(dataset), args.seed),
        collate_fn=collate_slices,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )


def trainer_synapse(
    args: argparse.Namespace,
    model: nn.Module,
    snapshot_path: str | Path,
    multimask_output: bool,
    low_res: int,
    *,
    dataset: Synapse_dataset | None = None,
) -> str:
    """Train `model` and save its adapter at the published epochs.

    Args:
        args: the flags of `train.py`; those that the original did not have may be absent.
        model: a `LoRA_Sam` on its device.
        snapshot_path: the run folder: adapters, log, metrics.jsonl and TensorBoard go there.
        multimask_output: kept for callers; every class is always predicted.
        low_res: side of the logits, S/4.
        dataset: checked training slices; None: opened from `args` and checked.
    """
    del multimask_output
    args = complete(args)
    folder = Path(snapshot_path)
    device = next(model.parameters()).device
    if dataset is None:
        dataset = Synapse_dataset(
            args.root_path, args.list_dir, "train", num_classes=args.num_classes
        )
        dataset.check()
    freeze_unreached(model)
    unwrap(model).sam.image_encoder.checkpoint_blocks = args.checkpoint_blocks

    loader = make_loader(dataset, args, device)
    criterion = SegmentationLoss(args.num_classes + 1, args.dice_param)
    optimizer = make_optimizer(model, adamw=args.AdamW, base_lr=args.base_lr)
    network = torch.compile(model) if args.compile else model
    dtype = amp_dtype(device) if args.use_amp else None
    scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None

    max_iterations = args.max_epochs * len(loader)  # of the schedule
    epochs = min(args.stop_epoch, args.max_epochs)
    last_step = min(epochs * len(loader), args.max_iterations or math.inf)
    logging.info(
        "%d slices, %d steps an epoch of %d × %d slices, %d steps in all, on %s in %s",
        *(
            len(dataset),
            len(loader),
            args.batch_size,
            args.n_gpu,
            last_step,
            device,
            dtype or "full precision",
        ),
    )
    model.train()
    step = 0
    with (
        RunLog(folder, every=args.log_every) as log,
        # no bar where nobody watches it move: there the log's line per epoch tells
        tqdm(total=last_step, desc="training", unit="step", disable=None) as bar,
        logging_redirect_tqdm(),
    ):
        for epoch in range(epochs):
            loader.sampler.epoch = epoch
            started = time.perf_counter()
            for slices in loader:
                lr = learning_rate(
                    step,
                    base_lr=args.base_lr,
                    warmup=args.warmup_period if args.warmup else 0,
                    max_iterations=max_iterations,
                    exponent=args.lr_exp,
                )
                batch = augmented_batch(slices, epoch, args, low_res, device)
                terms, logits = training_step(
                    *(network, batch, criterion, optimizer, lr),
                    clip_grad=args.clip_grad,
                    scaler=scaler,
                    autocast=torch.autocast(device.type, dtype, enabled=args.use_amp),
                )
                log.step({"step": step, "epoch": epoch, "lr": lr}, terms)
                if step % PICTURES_EVERY == 0:
                    log.pictures(step, batch["image"][0], logits[0], batch["low_res_label"][0])
                step += 1
                bar.update()
                bar.set_postfix(epoch=epoch, loss=f"{log.last_loss:.4f}", refresh=False)
                if step >= last_step:
                    break
            seconds = time.perf_counter() - started
            loss = log.end_epoch(epoch, step, seconds)
            logging.info("epoch %d: mean loss %.4f, %.0f s", epoch, loss, seconds)
            if (epoch + 1) % SAVE_EVERY == 0 or step >= last_step:
                path = folder / f"epoch_{epoch}.pth"
                unwrap(model).save_lora_parameters(path, settings=adapter_settings(args))
                logging.info("saved %s", path)
            if step >= last_step:
                break
    return "Training Finished!"


def augmented_batch(
    slices: dict[str, Any],
    epoch: int,
    args: argparse.Namespace,
    low_res: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Bring raw slices to the device and there to what the network and its loss take."""

    def to_device(arrays: torch.Tensor | list[torch.Tensor]) -> Any:
        if isinstance(arrays, torch.Tensor):
            return arrays.to(device, non_blocking=True)
        return [array.to(device, non_blocking=True) for array in arrays]

    choices = [
        Augmentation() if args.no_augment else draw_augmentation(keyed_rng(args.seed, epoch, index))
        for index in slices["index"]
    ]
    return prepare_batch(
        to_device(slices["image"]),
        to_device(slices["label"]),
        choices,
        output_size=(args.img_size, args.img_size),
        low_res=(low_res, low_res),
    )
