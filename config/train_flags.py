"""The flags of train.py, one row each: default, limits, and where else the value counts.

A row says whether the value belongs into the name of the run folder, into the adapter file and into
the check of `--resume`. To add a flag, add a row. The rows stand in the order in which they appear
in the name of a run folder.
"""

from __future__ import annotations

from config.network_flags import NETWORK
from config.parser import Flag
from config.recipe_flags import RECIPE
from config.shared_flags import (
    CONFIG,
    DATASET,
    LIST_DIR,
    NUM_CLASSES,
    PRECISION,
    PROCESSES,
    REPEATABILITY,
    SAME_CODE,
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
            "cuda_graph",
            "record the kernels of a training step and replay them together: the same numbers, "
            "faster where the GPU waits for the program, as with --use_amp; one process, CUDA only",
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
