"""The flags that several programs have, one row each."""

from __future__ import annotations

from config.parser import Flag
from datasets.registry import DATASETS

# `--ckpt none`: start without base weights and train every weight.
SCRATCH = "none"
# `--resume auto`: continue the newest run with the same settings.
AUTO = "auto"

CONFIG = Flag(
    "config",
    "run folder, or its config.json, to read settings from; of a folder of runs the newest; flags "
    "on the command line win",
    in_config=False,
    changes_numbers=False,
)
DATASET = Flag(
    "dataset",
    f"name of a known data set ({', '.join(DATASETS)}); default: what the adapter or the prepared "
    "data record, else Synapse",
    in_name=lambda args: args.dataset,
)
LIST_DIR = Flag(
    "list_dir",
    "folder of train.txt and test_vol.txt; default: lists/ beside the data, else the published "
    "lists",
    changes_numbers=False,
)
NUM_CLASSES = Flag(
    "num_classes",
    "number of foreground classes; default: that of the data set",
    type=int,
    low=1,
    high=255,
    hint="labels are stored with 8 bits",
    in_adapter=True,
)
SAME_CODE = Flag(
    "same_code",
    "accept a run or an adapter although the source code has changed since it was trained",
    type=bool,
    changes_numbers=False,
    in_config=False,
)
PRECISION = (
    Flag(
        "use_amp",
        "compute in bf16 where the device supports it, else in fp16",
        type=bool,
        in_name=lambda args: "amp" if args.use_amp else None,
    ),
    Flag("tf32", "allow TF32 matrix products on NVIDIA GPUs", type=bool),
)
PROCESSES = Flag(
    "processes",
    "number of processes to start on this machine; default: one for each GPU in use",
    type=int,
    low=1,
    high=256,
    changes_numbers=False,
)
REPEATABILITY = (
    Flag(
        "seed",
        "seed of every random choice",
        type=int,
        default=1234,
        low=0,
        high=2**32 - 1,
        in_name=lambda args: f"s{args.seed}",
    ),
    Flag(
        "deterministic",
        "1: use repeatable GPU kernels; 0: allow faster ones",
        type=int,
        default=1,
        choices=(0, 1),
    ),
)
