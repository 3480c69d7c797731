"""The training loop, the optimiser and the learning rate (SAMed, section 3.4)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config.settings import complete
from datasets.dataset_synapse import Synapse_dataset
from distributed.ranks import ALONE, Ranks
from evaluation.predict_volume import default_batch_size
from lora.older_module import as_lora_model
from lora.prompts import require_takes_prompts
from training.batches import augmented_batch, make_loader
from training.compiling import compile_blocks
from training.losses import SegmentationLoss, calc_loss
from training.memory import choose_at_once
from training.optimizers import make_optimizer, parameters_of
from training.parts import BatchInParts
from training.prompts import DrawnPrompts, prompted_logits
from training.recording import RecordedGradients
from training.run import TrainingRun
from training.trained import Trained
from training.validation import training_data, validate
from utils import amp_dtype, unwrap

__all__ = ["calc_loss", "trainer_synapse"]  # what scripts of the field import

# What only prompts reach: with `--prompt_prob` it trains.
OF_PROMPTS = ("prompt_encoder.point_embeddings.", "prompt_encoder.not_a_point_embed.")
# Without prompts the loss does not depend on these parameters. They are frozen, so that they keep
# their values on any number of GPUs. The adapter file holds them all the same.
UNREACHED = (
    *OF_PROMPTS,
    "prompt_encoder.mask_downscaling.",
    "mask_decoder.iou_prediction_head.",
)


# How the learning rate decays, as a part of the largest one: from the part of the schedule that is
# left, 1…0, and the exponent of `--lr_exp`. A new one is a row here, and a choice of `--schedule`.
DECAYS: dict[str, Callable[[float, float], float]] = {
    "poly": lambda left, exponent: left**exponent,
    "cosine": lambda left, exponent: (1 - math.cos(math.pi * left)) / 2,
    "constant": lambda left, exponent: 1.0,
}


def learning_rate(
    step: int,
    *,
    base_lr: float,
    warmup: int,
    max_iterations: int,
    exponent: float,
    schedule: str = "poly",
) -> float:
    """Return the learning rate of a step.

    The original sets the rate after a step, from the number of that step. So step n runs with the
    rate of step n - 1, and step 0 with the rate of step 0. The published numbers were trained this
    way.

    Args:
        step: number of the step, from 0.
        warmup: number of steps of the linear rise; 0: no warmup.
        max_iterations: number of steps of the decay, which begins after the warmup. Training ends
            at this step, so after a warmup the decay does not reach its end, as published.
        exponent: of the polynomial decay.
        schedule: a row of `DECAYS`.
    """
    previous = max(step - 1, 0)
    if previous < warmup:
        return base_lr * (previous + 1) / warmup
    return base_lr * DECAYS[schedule](1 - (previous - warmup) / max_iterations, exponent)


def learning_rate_of(args: argparse.Namespace, step: int, max_iterations: int) -> float:
    """Return the learning rate of a step by the flags of `train.py`."""
    return learning_rate(
        step,
        base_lr=args.base_lr,
        warmup=args.warmup_period if args.warmup else 0,
        max_iterations=max_iterations,
        exponent=args.lr_exp,
        schedule=args.schedule,
    )


def freeze_unreached(model: nn.Module, prompt_prob: float = 0.0) -> None:
    """Freeze the parameters that get no gradient, in a training with this `--prompt_prob`.

    Raises:
        InputError: it is not 0, and the network is one that cannot be given prompts.
    """
    model = unwrap(model)
    if prompt_prob:
        require_takes_prompts(model, "leave --prompt_prob out")
    for name, parameter in model.sam.named_parameters():
        if name.startswith(UNREACHED) and not (prompt_prob and name.startswith(OF_PROMPTS)):
            parameter.requires_grad_(False)


@dataclass(frozen=True)
class StepOptions:
    """What is the same in every training step.

    Args:
        at_once: slices to compute at a time (`BatchInParts`); None: all.
        clip_grad: largest norm of the gradient; None, as published: no clipping.
        skip_not_finite: skip the update if the loss or the gradient is NaN or infinite. Every step
            then waits for the GPU.
        amp_dtype: dtype of autocast; None: full precision.
        scaler: scales the gradients of fp16, which would underflow, and skips steps that overflow.
        recorded: replays the forward and the backward pass from a recording; None: computes them.
    """

    at_once: int | None = None
    clip_grad: float | None = None
    skip_not_finite: bool = False
    amp_dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler = field(
        default_factory=lambda: torch.amp.GradScaler(enabled=False)
    )
    recorded: RecordedGradients | None = None
    ranks: Ranks = ALONE

    @classmethod
    def from_flags(
        cls,
        args: argparse.Namespace,
        device: torch.device,
        ranks: Ranks,
        optimizer: torch.optim.Optimizer,
    ) -> StepOptions:
        """Return the options that the flags of `train.py` describe."""
        dtype = amp_dtype(device) if args.use_amp else None
        return cls(
            at_once=args.at_once,
            clip_grad=args.clip_grad,
            skip_not_finite=args.skip_nan > 0,
            amp_dtype=dtype,
            scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
            recorded=RecordedGradients.from_flags(args, device, ranks, parameters_of(optimizer)),
            ranks=ranks,
        )


def training_step(
    model: nn.Module,
    batch: dict[str, Any],
    criterion: SegmentationLoss,
    optimizer: torch.optim.Optimizer,
    lr: float,
    options: StepOptions | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Make one optimiser update.

    Args:
        batch: this rank's slices: `image` (B, 3, S, S) about [0, 1] and `low_res_label`
            (B, s, s) int64, s the side of the logits; B may be 0 on some ranks. `seeds`, B numbers
            that decide what a dropout drops, only with one; `drawn`, only with prompts.

    Returns:
        The detached loss terms of the batches of all ranks together, and this rank's logits
        (B, classes + 1, s, s), still on the device. If the step is recorded, the next one
        overwrites the logits.
    """
    options = options or StepOptions()
    scaler, parameters = options.scaler, parameters_of(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)  # now, so that the forward pass has their memory
    compute = partial(_backpropagated, model, criterion, options)
    terms, logits = options.recorded(compute, batch) if options.recorded else compute(batch)
    if options.skip_not_finite and not math.isfinite(terms["loss"].item()):
        return terms | {"grad_norm": terms["loss"]}, logits  # Every step has the same terms.

    options.ranks.add_gradients(parameters)
    if options.clip_grad is not None or options.skip_not_finite:
        scaler.unscale_(optimizer)
        largest = options.clip_grad or math.inf
        terms["grad_norm"] = nn.utils.clip_grad_norm_(parameters, largest)
    # A scaler skips steps that overflow by itself, which is normal under fp16.
    watches = options.skip_not_finite and not scaler.is_enabled()
    if not watches or terms["grad_norm"].isfinite():
        scaler.step(optimizer)
        scaler.update()
    return terms, logits


def _backpropagated(
    model: nn.Module, criterion: SegmentationLoss, options: StepOptions, batch: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Set the gradients of a batch; return the detached terms of its loss, and its logits."""
    images, labels = batch["image"], batch["low_res_label"]
    if len(images):
        forward = partial(_low_res_logits, model, options.amp_dtype)
        others = {name: batch[name] for name in ("seeds", "drawn") if name in batch}
        parts = BatchInParts(forward, images, options.at_once, others)
        logits = parts.logits()
    else:  # There are fewer slices in this step than ranks.
        parts = None
        logits = images.new_zeros(0, criterion.n_classes, *labels.shape[1:], requires_grad=True)
    terms = criterion(logits, labels)
    options.scaler.scale(terms["loss"]).backward()
    if parts is not None:
        parts.backward(logits)
    return {name: value.detach() for name, value in terms.items()}, logits.detach()


def _low_res_logits(
    model: nn.Module,
    amp_dtype: torch.dtype | None,
    images: torch.Tensor,
    seeds: Sequence[int] | None = None,
    drawn: DrawnPrompts | None = None,
) -> torch.Tensor:  # (B, 3, S, S) -> (B, classes + 1, s, s)
    if seeds is not None:
        model.seed_dropout(seeds)
    with torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
        if drawn is not None and drawn.asked:
            return prompted_logits(model, images, drawn, seeds)
        # The loss does not need the masks at full size.
        return model(images, full_size_masks=False)["low_res_logits"]


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
    """Train `model`; save its adapter at the published epochs, and its full state more often.

    Args:
        args: the flags of `train.py`; a script written against the original may lack some.
        model: a `LoRA_Sam` on its device, or a module in the original's style.
        snapshot_path: the run folder. With `args.resume`, training continues from its newest state.
        multimask_output: has no effect; every class is always predicted.
        low_res: side s of the logits: S/4, or S/2 with `--logits 2`.
        dataset: checked training slices; None: those of `args.root_path`.

    Raises:
        InputError: the user can mend it: a full disk, a loss that is not finite, too little GPU
            memory. The states that were saved before are intact.
        SystemExit: a signal asked to stop, and the state is saved (`EXIT_INTERRUPTED`).
    """
    del multimask_output
    args = complete(args)
    model = as_lora_model(unwrap(model), args.rank)
    device = next(model.parameters()).device
    dataset, held_out = training_data(args, dataset)
    freeze_unreached(model, args.prompt_prob)
    model.require_trained_is_saved()
    model.sam.image_encoder.checkpoint_blocks = args.checkpoint_blocks
    choose_at_once(args, model, ranks)
    if args.compile:
        compile_blocks(model)
    criterion = SegmentationLoss.from_flags(args, device, ranks)
    optimizer = make_optimizer(model, args.optimizer, args.base_lr)
    options = StepOptions.from_flags(args, device, ranks, optimizer)
    loader = make_loader(dataset, args, device, ranks)

    folder, trained = Path(snapshot_path), Trained(model, optimizer, options.scaler, args.ema)
    with TrainingRun(folder, args, trained, loader, bool(held_out), ranks) as run:
        for epoch in run.epochs():
            for slices in run.batches(epoch):
                lr = learning_rate_of(args, run.step, run.max_iterations)
                batch = augmented_batch(slices, epoch, args, low_res, device)
                terms, logits = training_step(model, batch, criterion, optimizer, lr, options)
                run.end_step(lr, terms, batch, logits)
            run.end_epoch(epoch)
            if run.validates(epoch):
                with trained.average.in_use():
                    found = validate(
                        model,
                        held_out,
                        num_classes=args.num_classes,
                        img_size=args.img_size,
                        amp_dtype=options.amp_dtype,
                        # So that --at_once helps where validation is what does not fit.
                        batch_size=min(args.at_once, default_batch_size(device)),
                        between_cases=run.stop_if_asked,
                        ranks=ranks,
                    )
                run.end_validation(epoch, found)
            run.save_adapter(epoch)
    return "Training Finished!"
