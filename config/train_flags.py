"""The flags of train.py, one row each: default, limits, and where else the value counts.

A row says whether the value belongs into the name of the run folder, into the adapter file and into
the check of `--resume`. To add a flag, add a row. The rows stand in the order in which they appear
in the name of a run folder.
"""

from __future__ import annotations

from typing import Any

from config.parser import Flag
from config.shared_flags import (
    CONFIG,
    DATASET,
    LIST_DIR,
    NETWORK,
    NUM_CLASSES,
    PRECISION,
    PROCESSES,
    REPEATABILITY,
    SAME_CODE,
)

PUBLISHED_LR_EXP, PUBLISHED_DICE = 0.9, 0.8


def slices_of_update(values: dict[str, Any]) -> int:
    """Return the number of slices of one update, on all GPUs together."""
    return values.get("global_batch") or values["batch_size"] * values["n_gpu"]


RECIPE = (
    Flag(
        "AdamW",
        "optimise with AdamW instead of SGD",
        type=bool,
        in_name=lambda args: "adamw" if args.AdamW else "sgd",
    ),
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
        "lr_exp",
        "exponent of the learning rate's polynomial decay",
        type=float,
        default=PUBLISHED_LR_EXP,
        low=0,
        high=100,
        in_name=lambda args: f"exp{args.lr_exp:g}" if args.lr_exp != PUBLISHED_LR_EXP else None,
    ),
    Flag(
        "dice_param",
        "weight of the Dice loss; cross entropy gets the rest",
        type=float,
        default=PUBLISHED_DICE,
        low=0,
        high=1,
        in_name=lambda args: (
            f"dice{args.dice_param:g}" if args.dice_param != PUBLISHED_DICE else None
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
        "no_augment",
        "train on the slices without augmentation",
        type=bool,
        in_name=lambda args: "noaug" if args.no_augment else None,
    ),
    Flag(
        "fresh_heads",
        "start all mask heads at random. Default: from the base weights wherever shapes fit, as "
        "the published adapters did",
        type=bool,
        in_name=lambda args: "freshheads" if args.fresh_heads else None,
    ),
)
TRAIN = {
    "data": (
        Flag(
            "root_path",
            "folder that holds train_npz/, or that folder itself (required)",
            changes_numbers=False,
        ),
        Flag(
            "output",
            "folder in which run folders are made",
            default="output",
            changes_numbers=False,
        ),
        Flag(
            "name",
            "name of the run folder (letters, digits, '_', '.', '-'); default: its settings",
            changes_numbers=False,
        ),
        Flag(
            "num_workers",
            "processes that load slices; default: with a GPU the cores of each process but one, "
            "from 1 to 8; on a CPU 0",
            type=int,
            low=0,
            high=256,
            changes_numbers=False,
        ),
        Flag(
            "check",
            "read all data, print one page of facts and warnings, and stop",
            type=bool,
            changes_numbers=False,
            in_config=False,
        ),
        CONFIG,
        DATASET,
        LIST_DIR,
        NUM_CLASSES,
    ),
    "network": NETWORK,
    "recipe": RECIPE,
    "saving and resuming": (
        Flag(
            "resume",
            "run folder to continue, or 'auto': the newest run under --output with the same "
            "settings and source code, or a new run if there is none",
            changes_numbers=False,
            in_config=False,
        ),
        Flag(
            "restart",
            "begin the run that --resume names anew; what its folder holds is kept there, in "
            "before-1/, before-2/, …",
            type=bool,
            changes_numbers=False,
            in_config=False,
        ),
        SAME_CODE,
        Flag(
            "save_minutes",
            "minutes between saves of the full state",
            type=float,
            default=10,
            low=0,
            high=10_000,
            changes_numbers=False,
        ),
        Flag(
            "save_steps",
            "steps between saves of the full state",
            type=int,
            low=1,
            high=10**9,
            changes_numbers=False,
        ),
        Flag(
            "keep_states",
            "number of full states to keep",
            type=int,
            default=2,
            low=1,
            high=10**6,
            changes_numbers=False,
        ),
        Flag(
            "skip_nan",
            "number of updates that may be skipped because their loss is NaN or infinite. The run "
            "stops when there are more. Every step then waits for the GPU",
            type=int,
            default=0,
            low=0,
            high=1_000_000,
            changes_numbers=False,
        ),
    ),
    "speed": (
        *PRECISION,
        PROCESSES,
        Flag(
            "at_once",
            "slices that a process computes at once; the other parts of its batch follow, with one "
            "more forward pass. Default: on a GPU as many as fit into its memory, on a CPU "
            "batch_size",
            type=int,
            low=1,
            high=100_000,
            changes_numbers=False,
            # A matter of the machine: environment.json records what every start used.
            in_config=False,
        ),
        Flag(
            "compile",
            "compile the blocks of the encoder with torch.compile; only worth it on a GPU",
            type=bool,
            changes_numbers=False,
        ),
        Flag(
            "checkpoint_blocks",
            "compute the encoder's blocks again in the backward pass: the same numbers with less "
            "memory and more time",
            type=bool,
            changes_numbers=False,
        ),
    ),
    "validation": (
        Flag(
            "val_every",
            "epochs between validations on training cases that are held out; default: no case is "
            "held out, as published",
            type=int,
            low=1,
            high=10**9,
            in_name=lambda args: f"val{args.val_every}" if args.val_every else None,
        ),
        Flag(
            "val_cases",
            "number of cases to hold out; default: a sixth",
            type=int,
            low=1,
            high=10**9,
        ),
        Flag(
            "patience",
            "stop after this many validations in a row without a better score",
            type=int,
            low=1,
            high=10**9,
            changes_numbers=False,
        ),
    ),
    "repeatability and logging": (
        *REPEATABILITY,
        Flag(
            "note",
            "a word for the run folder's name, for example what you changed in the code (letters, "
            "digits, '_', '.', '-')",
            in_name=lambda args: args.note,
        ),
        Flag(
            "log_every",
            "steps between writes of the scalars",
            type=int,
            default=20,
            low=1,
            high=10**9,
            changes_numbers=False,
        ),
    ),
}
