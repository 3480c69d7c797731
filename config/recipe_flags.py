"""The flags of the training recipe, one row each."""

from __future__ import annotations

import argparse
import math
from typing import Any

from common.errors import InputError
from config.parser import Flag
from datasets.augmentation import AUGMENTATIONS
from lora.trainable import PUBLISHED_TRAIN, TRAINABLE

PUBLISHED_LR_EXP, PUBLISHED_DICE = 0.9, 0.8
# The weight that the boundary loss starts with in its paper (arXiv 1812.07032).
BOUNDARY_WEIGHT = 0.01


def slices_of_update(values: dict[str, Any]) -> int:
    """Return the number of slices of one update, on all GPUs together."""
    return values.get("global_batch") or values["batch_size"] * values["n_gpu"]


def steps_of_run(args: argparse.Namespace, steps_per_epoch: int) -> int:
    """Return the number of updates of a whole run, unless --patience ends it before."""
    epochs = min(args.stop_epoch, args.max_epochs)
    return min(epochs * steps_per_epoch, args.max_iterations or math.inf)


RECIPE = (
    Flag(
        "train",
        "what is trained: adapter+decoder, as published; decoder: what the variant trains of SAM, "
        "with the updates as they start, at zero or as in --lora_ckpt; lora: the updates alone, "
        "with the decoder as it starts; all: every weight, which the adapter file then holds",
        default=PUBLISHED_TRAIN,
        choices=tuple(TRAINABLE),
        in_name=lambda args: f"train-{args.train}" if args.train != PUBLISHED_TRAIN else None,
    ),
    Flag(
        "lora_dropout",
        "share of the values that A of an update does not see in training, drawn for each slice",
        type=float,
        default=0.0,
        low=0,
        high=0.95,
        in_name=lambda args: f"drop{args.lora_dropout:g}" if args.lora_dropout else None,
    ),
    Flag(
        "optimizer",
        "sgd (momentum 0.9, weight decay 1e-4) or adamw (weight decay 0.1)",
        default="sgd",
        choices=("sgd", "adamw"),
        in_name=lambda args: args.optimizer,
    ),
    Flag("AdamW", "the same as --optimizer adamw", type=bool, means=("optimizer", "adamw")),
    Flag(
        "base_lr",
        "largest learning rate",
        type=float,
        default=0.005,
        low=0,
        high=10,
        in_name=lambda args: f"lr{args.base_lr:g}",
    ),
    Flag("warmup", "raise the learning rate linearly in the first steps", type=bool),
    Flag(
        "warmup_period",
        "number of warmup steps",
        type=int,
        default=250,
        low=1,
        high=10**9,
        in_name=lambda args: f"wu{args.warmup_period}" if args.warmup else None,
    ),
    Flag(
        "schedule",
        "decay of the learning rate: poly; cosine (arXiv 1608.03983, to 0, without restarts); or "
        "constant",
        default="poly",
        choices=("poly", "cosine", "constant"),
        in_name=lambda args: args.schedule if args.schedule != "poly" else None,
    ),
    Flag(
        "lr_exp",
        "exponent of the learning rate's polynomial decay (--schedule poly)",
        type=float,
        default=PUBLISHED_LR_EXP,
        low=0,
        high=100,
        in_name=lambda args: f"exp{args.lr_exp:g}" if args.lr_exp != PUBLISHED_LR_EXP else None,
    ),
    Flag(
        "loss",
        "terms of the loss: cross entropy (ce), focal loss (arXiv 1708.02002, gamma 2), Dice, and "
        "the boundary loss (arXiv 1812.07032)",
        default="ce+dice",
        choices=("ce+dice", "focal+dice", "ce", "dice", "ce+dice+boundary"),
        in_name=lambda args: args.loss if args.loss != "ce+dice" else None,
    ),
    Flag(
        "class_weights",
        "weights of the classes in cross entropy and focal loss: none, or the inverse of their "
        "frequency in the training slices",
        default="none",
        choices=("none", "inverse"),
        in_name=lambda args: f"cw-{args.class_weights}" if args.class_weights != "none" else None,
    ),
    Flag(
        "dice_param",
        "weight of the Dice loss where there is another term; that one gets the rest",
        type=float,
        default=PUBLISHED_DICE,
        low=0,
        high=1,
        in_name=lambda args: (
            f"dice{args.dice_param:g}" if args.dice_param != PUBLISHED_DICE else None
        ),
    ),
    Flag(
        "boundary_param",
        f"weight of the boundary loss, beside the other terms; default: {BOUNDARY_WEIGHT}",
        type=float,
        above=0,
        high=1000,
        in_name=lambda args: (
            None if args.boundary_param is None else f"boundary{args.boundary_param:g}"
        ),
    ),
    Flag(
        "batch_size",
        "slices of an update for each GPU of the recipe",
        type=int,
        default=12,
        low=1,
        high=100_000,
        changes_numbers=False,
    ),
    Flag(
        "n_gpu",
        "number of GPUs in the recipe. An update always uses batch_size × n_gpu slices, however "
        "many GPUs there are",
        type=int,
        default=2,
        low=1,
        high=100_000,
        changes_numbers=False,
    ),
    Flag(
        "global_batch",
        "slices of one update; default: batch_size × n_gpu",
        type=int,
        low=1,
        high=10**9,
        in_name=lambda args: f"bs{slices_of_update(vars(args))}",
    ),
    Flag(
        "max_epochs",
        "epochs of the learning rate's schedule; training never exceeds it",
        type=int,
        default=200,
        low=1,
        high=10**9,
    ),
    Flag(
        "stop_epoch",
        "number of epochs to train",
        type=int,
        default=160,
        low=1,
        high=10**9,
        # The schedule of the learning rate does not depend on it.
        changes_numbers=False,
        in_name=lambda args: f"epo{args.stop_epoch}of{args.max_epochs}",
    ),
    Flag(
        "max_iterations",
        "stop after this many steps, or after --stop_epoch if that comes first",
        type=int,
        low=1,
        high=10**12,
        changes_numbers=False,
        in_name=lambda args: f"it{args.max_iterations}" if args.max_iterations else None,
    ),
    Flag(
        "clip_grad",
        "largest norm of the gradient; default: no clipping",
        type=float,
        above=0,
        high=1e30,
        hint="leave it out to train without clipping",
        in_name=lambda args: f"clip{args.clip_grad:g}" if args.clip_grad else None,
    ),
    Flag(
        "augment",
        "changes of the training slices: samed (turns, flips, rotations), none, samed+intensity "
        "(also gamma, noise and blur of the image), anatomical (rotations, and flips that swap the "
        "labels of left and right organs)",
        default="samed",
        choices=tuple(AUGMENTATIONS),
        in_name=lambda args: (
            None if args.augment == "samed" else "noaug" if args.augment == "none" else args.augment
        ),
    ),
    Flag("no_augment", "the same as --augment none", type=bool, means=("augment", "none")),
    Flag(
        "prompt_prob",
        "probability that a slice trains with a box or 1 to 5 clicks for one organ, after which "
        "results can be corrected by them. Default: 0, as published, or that of --lora_ckpt",
        type=float,
        default=0.0,
        low=0,
        high=1,
        in_adapter=True,
        in_name=lambda args: f"prompts{args.prompt_prob:g}" if args.prompt_prob else None,
    ),
    Flag(
        "ema",
        "decay of a running average of the weights, for example 0.99; adapters and validations use "
        "the average. Default: no average",
        type=float,
        above=0,
        high=0.999999,
        hint="leave it out to train without an average",
        in_name=lambda args: f"ema{args.ema:g}" if args.ema else None,
    ),
    Flag(
        "fresh_heads",
        "start all mask heads at random. Default: from the base weights wherever shapes fit, as "
        "the published adapters did",
        type=bool,
        in_name=lambda args: "freshheads" if args.fresh_heads else None,
    ),
)


def check_recipe(args: argparse.Namespace) -> None:
    """Refuse flags that have no effect beside others.

    Raises:
        InputError: the first of them.
    """
    terms = args.loss.split("+")
    for name, default, needed, told in (
        ("dice_param", PUBLISHED_DICE, "dice" in terms and len(terms) > 1, f"--loss {args.loss}"),
        ("class_weights", "none", args.dice_param < 1, f"--dice_param {args.dice_param:g}"),
        ("boundary_param", None, "boundary" in terms, f"--loss {args.loss}"),
        ("class_weights", "none", {"ce", "focal"} & {*terms}, f"--loss {args.loss}"),
        ("lr_exp", PUBLISHED_LR_EXP, args.schedule == "poly", f"--schedule {args.schedule}"),
    ):
        value = getattr(args, name)
        if not needed and value != default:
            unset = "" if default is None else f", or pass --{name} {default} if --config sets it"
            raise InputError(
                f"--{name} {value} has no effect with {told}; leave out one of the two flags{unset}"
            )
    if args.train == "lora" and not args.lora_ckpt and (args.decoder_depth > 2 or args.logits > 1):
        name = "decoder_depth" if args.decoder_depth > 2 else "logits"
        raise InputError(
            f"--{name} {getattr(args, name)} adds layers to the decoder that --train lora would "
            "never train; leave one of them out, or start from an adapter by --lora_ckpt"
        )
