"""The flags that several programs have, one row each."""

from __future__ import annotations

from config.parser import Flag
from datasets.registry import DATASETS
from segment_anything import ENCODERS

# `--ckpt none`: start without base weights and train every weight.
SCRATCH = "none"
# Side of the network's input. At 4096 the attention of one block has 4 billion weights a head.
LARGEST_IMAGE = 4096
# No layer is wider than 5120, and a larger rank than its width adds nothing.
LARGEST_RANK = 4096
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
NETWORK = (
    Flag(
        "img_size",
        "side of the network's input in pixels",
        type=int,
        default=512,
        low=1,
        high=LARGEST_IMAGE,
        multiple_of=16,
        hint="16 is the patch size of the encoder",
        in_adapter=True,
        in_name=lambda args: str(args.img_size),
    ),
    Flag(
        "vit_name",
        "image encoder",
        default="vit_b",
        choices=tuple(ENCODERS),
        in_adapter=True,
        in_name=lambda args: args.vit_name,
    ),
    Flag(
        "module",
        "LoRA variant: sam_lora_image_encoder (SAMed), sam_lora_image_encoder_mask_decoder "
        "(SAMed_s), or a module of your own beside them",
        default="sam_lora_image_encoder",
        in_adapter=True,
        in_name=lambda args: args.module.removeprefix("sam_lora_image_"),
    ),
    Flag(
        "rank",
        "rank of the LoRA updates",
        type=int,
        default=4,
        low=1,
        high=LARGEST_RANK,
        in_adapter=True,
        in_name=lambda args: f"r{args.rank}",
    ),
    Flag(
        "ckpt",
        "file of SAM's base weights; default: the encoder's public file in checkpoints/; 'none': "
        "no base weights, so every weight is trained, and stands in the adapter",
        changes_numbers=False,
        in_name=lambda args: "scratch" if args.ckpt == SCRATCH else None,
    ),
    Flag(
        "lora_ckpt",
        "adapter file to start from",
        changes_numbers=False,
        in_name=lambda args: "tuned" if args.lora_ckpt else None,
    ),
    Flag("device", "auto, cpu, cuda or cuda:N", default="auto", changes_numbers=False),
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
