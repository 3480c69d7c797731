"""The folder of one run: its name, its configuration, its adapters."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safe_io import InputError, atomic_path, make_folder

SCRATCH = "none"  # --ckpt none: no base weights, every weight is trained
CONFIG_FILE = "config.json"


def run_name(args: argparse.Namespace) -> str:
    """What tells two runs apart, e.g. `Synapse_512_vit_b_encoder_r4_adamw_lr0.005_wu250_…`."""
    variant = args.module.removeprefix("sam_lora_image_")
    parts = [
        f"{args.dataset}_{args.img_size}_{args.vit_name}_{variant}_r{args.rank}",
        "scratch" if args.ckpt == SCRATCH else None,
        "tuned" if args.lora_ckpt else None,
        "adamw" if args.AdamW else "sgd",
        f"lr{args.base_lr:g}",
        f"wu{args.warmup_period}" if args.warmup else None,
        f"exp{args.lr_exp:g}" if args.lr_exp != 0.9 else None,
        f"dice{args.dice_param:g}" if args.dice_param != 0.8 else None,
        f"bs{args.batch_size * args.n_gpu}",
        f"epo{args.stop_epoch}of{args.max_epochs}",
        f"it{args.max_iterations}" if args.max_iterations else None,
        f"clip{args.clip_grad:g}" if args.clip_grad else None,
        "noaug" if args.no_augment else None,
        "amp" if args.use_amp else None,
        f"s{args.seed}",
    ]
    return "_".join(part for part in parts if part)


def make_run_folder(args: argparse.Namespace) -> Path:
    """A new folder under `--output`; a second run of the same settings gets a number."""
    base = Path(args.output) / run_name(args)
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return make_folder(folder, flag="--output", exist_ok=False)


def save_config(args: argparse.Namespace, folder: Path) -> None:
    """Write `config.json`, which `--config` reads back unchanged."""
    values = {key: value for key, value in vars(args).items() if key != "config"}
    with atomic_path(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def newest_adapter(run: Path) -> Path:
    """The adapter of the last epoch that a run saved."""
    adapters = sorted(run.glob("epoch_*.pth"), key=lambda path: (len(path.name), path.name))
    if not adapters:
        raise InputError(f"{run} holds no adapter epoch_*.pth yet; pass one by --lora_ckpt")
    return adapters[-1]
