"""The training loop, the optimiser and the learning rate (SAMed, section 3.4)."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from config.settings import class_names, complete
from datasets.dataset_synapse import Synapse_dataset
from distributed.ranks import ALONE, Ranks, under_torchrun
from distributed.signals import Interruption
from training.batches import augmented_batch, make_loader, read_batches, watched_workers
from training.checkpoint import Checkpoint, Progress, newest_state, restore
from training.curves import draw_curves
from training.losses import SegmentationLoss
from training.run_log import RunLog
from training.validation import hold_out, note_validation, validate
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
    for name, parameter in unwrap(model).sam.named_parameters():
        if name.startswith(UNREACHED):
            parameter.requires_grad_(False)


def training_step(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    criterion: SegmentationLoss,
    optimizer: torch.optim.Optimizer,
    lr: float,
    *,
    at_once: int | None = None,
    clip_grad: float | None = None,
    skip_not_finite: bool = False,
    scaler: torch.amp.GradScaler | None = None,
    autocast: contextlib.AbstractContextManager[Any] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One optimiser update.

    Args:
        batch: this rank's slices: `image` (B, 3, S, S) about [0, 1] and `low_res_label`
            (B, S/4, S/4) int64; B may be 0 on some ranks.
        at_once: slices through the network at a time. Dice pools its sums over the batch, so
            parts are not independent: their logits are made first, the loss of all gives the
            gradient of the logits, and each part is then computed again for its weights. The
            gradient is that of the whole batch, but for rounding, at the price of one more
            forward pass.
        clip_grad: largest norm of the whole gradient; None, as published, leaves it alone.
        skip_not_finite: leave the weights alone if the loss or, without `scaler`, the gradient is
            NaN or infinite; waits for both.

    Returns:
        The detached loss terms, of the batches of all ranks together, and this rank's logits
        (B, classes + 1, S/4, S/4), still on the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    images, labels = batch["image"], batch["low_res_label"]

    def forward(part: slice) -> torch.Tensor:
        with autocast or contextlib.nullcontext():
            # the loss reads only low_res_logits: full-size masks are not made
            return model(images[part], full_size_masks=False)["low_res_logits"]

    at_once = at_once or len(images)
    parts = [slice(start, start + at_once) for start in range(0, len(images), at_once or 1)]
    if len(parts) == 1:
        logits = forward(parts[0])
    elif parts:
        with torch.no_grad():
            logits = torch.cat([forward(part) for part in parts])
        logits.requires_grad_()
    else:
        logits = images.new_zeros(0, criterion.n_classes, *labels.shape[1:], requires_grad=True)
    terms = criterion(logits, labels)
    optimizer.zero_grad(set_to_none=True)
    measure = clip_grad is not None or skip_not_finite
    if skip_not_finite and not math.isfinite(terms["loss"].item()):
        terms["grad_norm"] = terms["loss"]  # there is none, and every step has the same terms
        return {name: value.detach() for name, value in terms.items()}, logits.detach()

    scaler = scaler or torch.amp.GradScaler(enabled=False)  # which passes everything through
    # fp16 gradients underflow unless scaled; a step that overflowed is skipped
    scaler.scale(terms["loss"]).backward()
    if len(parts) > 1:
        for part in parts:
            forward(part).backward(logits.grad[part])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    ranks.add_gradients(parameters)
    if measure:
        scaler.unscale_(optimizer)
        terms["grad_norm"] = nn.utils.clip_grad_norm_(parameters, clip_grad or math.inf)
    # with a scaler an overflow is nothing out of the common: it leaves that step out by itself
    left_out = skip_not_finite and not scaler.is_enabled() and not terms["grad_norm"].isfinite()
    if not left_out:
        scaler.step(optimizer)
        scaler.update()
    return {name: value.detach() for name, value in terms.items()}, logits.detach()


def trainer_synapse(
    args: argparse.Namespace,
    model: nn.Module,
    snapshot_path: str | Path,
    multimask_output: bool,
    low_res: int,
    *,
    dataset: Synapse_dataset | None = None,
    ranks: Ranks = ALONE,
) -> str:
    """Train `model` and save its adapter at the published epochs, its full state more often.

    Args:
        args: the flags of `train.py`; those that the original did not have may be absent.
        model: a `LoRA_Sam` on its device.
        snapshot_path: the run folder. If it holds a state and `args.resume` is given, training
            goes on from there.
        multimask_output: kept for callers; every class is always predicted.
        low_res: side of the logits, S/4.
        dataset: checked training slices; None: opened from `args` and checked.

    Raises:
        InputError: what a user can mend: a full disk, a loss that is not finite, too little GPU
            memory. States saved before are intact.
        SystemExit: with `EXIT_INTERRUPTED`, after a signal and when the state is saved.
    """
    del multimask_output
    args = complete(args)
    folder = Path(snapshot_path)
    model = unwrap(model)
    device = next(model.parameters()).device
    if dataset is None:
        dataset = Synapse_dataset(
            args.root_path, args.list_dir, "train", num_classes=args.num_classes
        )
        dataset.check()
    held_out: dict[str, Synapse_dataset] = {}
    if args.val_every:
        dataset, held_out = hold_out(dataset, args.val_cases, args.seed)
    freeze_unreached(model)
    model.sam.image_encoder.checkpoint_blocks = args.checkpoint_blocks

    loader = make_loader(dataset, args, device, ranks)
    batches, steps_an_epoch = loader.batch_sampler, len(loader)
    criterion = SegmentationLoss(args.num_classes + 1, args.dice_param, ranks.total)
    optimizer = make_optimizer(model, adamw=args.AdamW, base_lr=args.base_lr)
    names = class_names(args)
    network = torch.compile(model) if args.compile else model
    dtype = amp_dtype(device) if args.use_amp else None
    scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
    max_iterations = args.max_epochs * steps_an_epoch  # of the schedule
    epochs = min(args.stop_epoch, args.max_epochs)
    last_step = min(epochs * steps_an_epoch, args.max_iterations or math.inf)

    ranks.copy_first(model.state_dict().values())
    state = ranks.from_first(newest_state(folder) if args.resume and ranks.first else None)
    run = restore(state, model, optimizer, scaler, ranks) if state else Progress()
    logging.info(
        "%d slices, %d steps an epoch of %d slices on %d process(es), %d at once; %d steps in all, "
        "on %s in %s",
        *(len(dataset), steps_an_epoch, batches.global_batch, ranks.count, args.batch_size),
        *(last_step, device, dtype or "full precision"),
    )
    if state:
        logging.info("going on after step %d", run.step)
    if held_out:
        logging.info("held out for validation: %s", ", ".join(held_out))
        if last_step < args.val_every * steps_an_epoch:
            logging.warning("it ends before the first validation, after --val_every epochs")

    def names_of(facts: dict[str, Any]) -> list[str]:
        of_step = batches.step(facts["epoch"], facts["step"] - facts["epoch"] * steps_an_epoch)
        return [dataset.sample_list[index] for index in of_step]

    model.train()
    with (
        watched_workers(loader),
        Interruption(with_parent=under_torchrun()) as interruption,
        RunLog(
            folder if ranks.first else None,
            every=args.log_every,
            names_of=names_of,
            skip=args.skip_nan,
            watched=("loss",) if scaler else ("loss", "grad_norm"),
            position=state["log"] if state else None,
            step=run.step,
        ) as log,
        # no bar where nobody watches it move: there the log's line per epoch tells
        tqdm(
            total=last_step,
            initial=run.step,
            desc="training",
            unit="step",
            disable=None if ranks.first else True,
        ) as bar,
        logging_redirect_tqdm(),
    ):
        checkpoint = Checkpoint(folder, args, run, model, optimizer, scaler, log, ranks)
        for epoch in range(run.epoch, epochs):
            if run.out_of_patience(args.patience):
                logging.info("no better score in %d validations: stopping", run.not_better)
                break
            batches.enter(epoch, run.done)
            now = time.perf_counter()
            for slices in read_batches(loader) if run.step < last_step else ():
                lr = learning_rate(
                    run.step,
                    base_lr=args.base_lr,
                    warmup=args.warmup_period if args.warmup else 0,
                    max_iterations=max_iterations,
                    exponent=args.lr_exp,
                )
                batch = augmented_batch(slices, epoch, args, low_res, device)
                terms, logits = training_step(
                    *(network, batch, criterion, optimizer, lr),
                    at_once=args.batch_size,
                    clip_grad=args.clip_grad,
                    skip_not_finite=args.skip_nan > 0,
                    scaler=scaler,
                    autocast=torch.autocast(device.type, dtype, enabled=args.use_amp),
                    ranks=ranks,
                )
                log.step({"step": run.step, "epoch": epoch, "lr": lr}, terms)
                if run.step % PICTURES_EVERY == 0 and len(logits):
                    log.pictures(run.step, batch["image"][0], logits[0], batch["low_res_label"][0])
                run.step += 1
                run.done += 1
                before, now = now, time.perf_counter()
                run.seconds += now - before
                bar.update()
                bar.set_postfix(epoch=epoch, loss=f"{log.last_loss:.4f}", refresh=False)
                checkpoint.after_step(interruption)
                if run.step >= last_step:
                    break

            last = run.step >= last_step
            whole = run.done == steps_an_epoch
            due = bool(held_out) and whole and (epoch + 1) % args.val_every == 0
            if last or due:  # what follows can be done again: by a run that was asked to stop
                checkpoint.save()  # meanwhile, or that shall go on to more epochs
            loss = log.end_epoch(epoch, run.step, run.seconds)
            logging.info("epoch %d: mean loss %.4f, %.0f s", epoch, loss, run.seconds)
            if due:
                found = validate(
                    model,
                    held_out,
                    num_classes=args.num_classes,
                    img_size=args.img_size,
                    amp_dtype=dtype,
                    between_cases=lambda: interruption.asked and checkpoint.stop(),
                    ranks=ranks,
                )
                if note_validation(run, found, epoch, names, log):
                    checkpoint.save_adapter("best.pth")
            if (epoch + 1) % SAVE_EVERY == 0 or last or run.out_of_patience(args.patience):
                checkpoint.save_adapter(f"epoch_{epoch}.pth")
            if last:
                break
            run.epoch, run.done, run.seconds = epoch + 1, 0, 0.0
            checkpoint.save()
    if ranks.first:
        draw_curves(folder, names)
    return "Training Finished!"
