"""The folder of one run: its name, its configuration, its adapters."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError, cannot_make, cannot_write, warn
from common.files import make_folder, require_folder, sha256_of, write_json
from datasets.samples import SampleFacts

SCRATCH = "none"  # --ckpt none: no base weights, every weight is trained
CONFIG_FILE = "config.json"
LOCK_FILE = "lock"
AUTO = "auto"  # --resume auto
CONTENT = ("data", "weights")  # in config.json, no flags: what is in the files that were given
# What a run may be continued with: nothing here changes what is computed, but for rounding. Files
# may have moved: their content counts.
FREE = {
    *("config", "resume", "check", "output", "root_path", "list_dir", "device", "num_workers"),
    *("ckpt", "lora_ckpt", "processes", "batch_size", "n_gpu", "log_every"),
    *("compile", "checkpoint_blocks"),
    *("save_minutes", "save_steps", "keep_states", "skip_nan", "patience"),
    *("stop_epoch", "max_iterations"),  # the rate's schedule does not depend on them
}


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
        f"bs{args.global_batch or args.batch_size * args.n_gpu}",
        f"epo{args.stop_epoch}of{args.max_epochs}",
        f"it{args.max_iterations}" if args.max_iterations else None,
        f"clip{args.clip_grad:g}" if args.clip_grad else None,
        "noaug" if args.no_augment else None,
        "amp" if args.use_amp else None,
        f"val{args.val_every}" if args.val_every else None,
        f"s{args.seed}",
    ]
    return "_".join(part for part in parts if part)


def make_run_folder(args: argparse.Namespace) -> Path:
    """A new folder under `--output`; a second run of the same settings gets a number."""
    base = Path(args.output) / run_name(args)
    make_folder(base.parent, flag="--output")
    folder, number = base, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:  # perhaps of a run that started in the same moment
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
        except OSError as error:
            raise cannot_make(folder, error, flag="--output") from None


def settings_that_matter(values: dict[str, Any]) -> dict[str, Any]:
    """Of the flags' values, what has to stay the same for a run to go on."""
    batch = values.get("global_batch") or values["batch_size"] * values["n_gpu"]
    return {key: value for key, value in values.items() if key not in FREE} | {
        "global_batch": batch
    }


def find_run(args: argparse.Namespace) -> Path | None:
    """The run that `--resume` means; None: start a new one.

    Args:
        args: with what `CONTENT` names once it is known.

    Raises:
        InputError: no run folder is given, or its settings differ.
    """
    if args.resume == AUTO:
        return _newest_that_fits(args)
    folder = require_folder(
        args.resume, what="run folder", remedy="pass one that train.py made, or 'auto'"
    )
    found = _unlike(read_config_file(folder / CONFIG_FILE), args)
    if found:
        schedule = (
            " (the learning rate's schedule depends on --max_epochs; --stop_epoch may be raised)"
            if any(text.startswith("--max_epochs ") for text in found)
            else ""
        )
        raise InputError(
            f"{folder} cannot go on with other settings: {', '.join(found)}{schedule}; leave them "
            "as they were, or start a new run without --resume"
        )
    return folder


def _newest_that_fits(args: argparse.Namespace) -> Path | None:
    runs = sorted(
        Path(args.output).glob(f"*/{CONFIG_FILE}"), key=lambda path: path.stat().st_mtime_ns
    )
    nearest = None
    for config in reversed(runs):
        try:
            found = _unlike(read_config_file(config), args)
        except (InputError, KeyError, TypeError):
            continue  # of another program
        if not found:
            return config.parent
        nearest = nearest or f"the newest, {config.parent.name}, differs in {', '.join(found)}"
    if nearest:
        warn(f"no run in {args.output} fits, so a new one is started: {nearest}")
    return None


def _unlike(saved: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """`--base_lr 0.005 → 0.001` for every setting of a saved run that is another now.

    What only one of them says is no difference.
    """
    now = settings_that_matter(vars(args))
    before = settings_that_matter(vars(args) | saved)
    return [
        f"{key if key in CONTENT else f'--{key}'} {before[key]} → {now[key]}"
        for key in sorted(now)
        if before[key] != now[key]
    ]


def fingerprint_data(facts: Sequence[SampleFacts]) -> str:
    """What tells one set of training slices from another: their number, and a hash of all."""
    ordered = sorted((one.name, one.digest, one.voxels) for one in facts)
    return f"{len(facts)} slices {hashlib.sha256(repr(ordered).encode()).hexdigest()[:12]}"


def fingerprint_weights(base: str | None, adapter: str | None) -> str:
    """What tells the weights that a run starts from: base weights and adapter, if any."""
    return f"{base or SCRATCH}" + (f" and {sha256_of(Path(adapter))[:12]}" if adapter else "")


def read_config_file(path: Path) -> dict[str, Any]:
    """The flags in a `config.json`.

    Raises:
        InputError: no JSON object.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not JSON ({error}); pass the {CONFIG_FILE} that train.py wrote"
        ) from None
    if not isinstance(saved, dict):
        raise InputError(f"{path} holds a {type(saved).__name__}, expected a JSON object of flags")
    return saved


@contextlib.contextmanager
def only_writer(folder: Path, first: bool = True) -> Iterator[None]:
    """Hold a run folder, so that two runs cannot write into one; a killed process lets it go.

    Args:
        first: whether this is the rank that writes.
    """
    if not first:
        yield
        return
    try:
        lock = (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise cannot_write(folder / LOCK_FILE, error) from None
    with lock:
        try:  # of this process alone: a loader's worker that outlives it must not hold the lock
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(
                f"another process is training in {folder}; wait for it, or start a new run "
                "without --resume"
            ) from None
        except OSError as error:  # a file system that cannot lock, as some network ones
            warn(f"{folder} cannot be locked ({error.strerror}); start no second run in it")
        yield


def save_config(args: argparse.Namespace, folder: Path) -> None:
    """Write `config.json`, which `--config` reads back unchanged."""
    values = {k: v for k, v in vars(args).items() if k not in ("config", "resume", "check")}
    write_json(folder / CONFIG_FILE, values)


def newest_adapter(run: Path) -> Path:
    """The adapter of the last epoch that a run saved."""
    adapters = sorted(run.glob("epoch_*.pth"), key=lambda path: (len(path.name), path.name))
    if not adapters:
        raise InputError(f"{run} holds no adapter epoch_*.pth yet; pass one by --lora_ckpt")
    return adapters[-1]
