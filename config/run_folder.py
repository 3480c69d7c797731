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

from common.errors import InputError, cannot_make, cannot_write, first_few, warn
from common.files import make_folder, require_folder, sha256_of
from common.writing import write_json
from config.parser import by_name, that_change_numbers
from config.shared_flags import AUTO, SCRATCH
from config.source_code import changed_files
from config.train_flags import TRAIN, slices_of_update
from datasets.prepared_files import SampleFacts
from segment_anything.base_weights import same_base

CONFIG_FILE = "config.json"
LOCK_FILE = "lock"
# Entries of config.json that are no flags: what is known of the files that a run started from.
CONTENT = ("data", "trained_on", "weights", "code")


def run_name(args: argparse.Namespace) -> str:
    """Return `--name`, else the settings that tell runs apart: `Synapse_512_vit_b_encoder_r4_…`."""
    if args.name is not None:
        return args.name
    parts = [flag.in_name(args) for flag in by_name(TRAIN).values() if flag.in_name]
    return "_".join(part for part in parts if part)


def make_run_folder(args: argparse.Namespace) -> Path:
    """Make a new folder under `--output`; a second run of the same settings gets a number."""
    base = Path(args.output) / run_name(args)
    make_folder(base.parent, flag="--output")
    folder, number = base, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:  # Another run may have started at the same moment.
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
        except OSError as error:
            raise cannot_make(folder, error, flag="--output") from None


def find_run(args: argparse.Namespace) -> Path | None:
    """Return the run that `--resume` means; None if a new one has to be started.

    Args:
        args: the flags, and the fingerprints of `CONTENT` as far as they are known.

    Raises:
        InputError: `--resume` names no run folder, or its settings differ.
    """
    if args.resume == AUTO:
        return _newest_that_fits(args)
    folder = require_folder(
        args.resume, what="run folder", remedy="pass one that train.py made, or 'auto'"
    )
    found = differences(read_config_file(folder / CONFIG_FILE), args)
    if found:
        schedule = (
            " (the learning rate's schedule depends on --max_epochs; --stop_epoch may be raised)"
            if any(text.startswith("--max_epochs ") for text in found)
            else ""
        )
        raise InputError(
            f"{folder} cannot be continued with other settings: {', '.join(found)}{schedule}; "
            "restore them, or start a new run without --resume"
        )
    return folder


def _newest_that_fits(args: argparse.Namespace) -> Path | None:
    runs = sorted(
        Path(args.output).glob(f"*/{CONFIG_FILE}"), key=lambda path: path.stat().st_mtime_ns
    )
    nearest = None
    for config in reversed(runs):
        try:
            found = differences(read_config_file(config), args)
        except (InputError, KeyError, TypeError):
            continue  # Another program wrote this file.
        if not found:
            return config.parent
        nearest = nearest or f"the newest run, {config.parent.name}, differs in {', '.join(found)}"
    if nearest:
        warn(f"no run in {args.output} has these settings, so a new run starts: {nearest}")
    return None


def differences(saved: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """List the settings of a saved run that differ now, e.g. `--base_lr 0.005 → 0.001`.

    A setting that only the saved run or only `args` has is no difference.
    """
    now = _settings_to_keep(vars(args))
    before = _settings_to_keep(vars(args) | saved)
    names = sorted(name for name in now if before[name] != now[name] and name != "code")
    if "weights" in names and _same_weights(str(before["weights"]), str(now["weights"])):
        names.remove("weights")
    found = [
        f"{name if name in CONTENT else f'--{name}'} {before[name]} → {now[name]}" for name in names
    ]
    edited = changed_files(saved.get("code"), args.code)
    if edited and not args.same_code:
        found.append(f"source code ({first_few(edited)}; if the change means nothing, --same_code)")
    return found


def _settings_to_keep(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a run must keep when it is continued.

    The fingerprint of the data stands for what was measured in them: `trained_on`, and the size in
    their description.
    """
    kept = that_change_numbers(values, by_name(TRAIN)) | {"global_batch": slices_of_update(values)}
    kept.pop("trained_on", None)
    if isinstance(kept.get("spec"), dict):
        kept["spec"] = kept["spec"] | {"size": None}
    return kept


def fingerprint_data(facts: Sequence[SampleFacts]) -> str:
    """Return the number of training slices and a hash of their content."""
    ordered = sorted((fact.name, fact.digest, fact.voxels) for fact in facts)
    return f"{len(facts)} slices {hashlib.sha256(repr(ordered).encode()).hexdigest()[:12]}"


def fingerprint_weights(base: str | None, adapter: str | None) -> str:
    """Return a fingerprint of the weights that a run starts from: base weights and adapter."""
    return f"{base or SCRATCH}" + (f" and {sha256_of(Path(adapter))[:12]}" if adapter else "")


def _same_weights(before: str, now: str) -> bool:
    """Compare two fingerprints; earlier versions recorded half of that of the base weights."""
    old, new = before.split(" and "), now.split(" and ")
    return same_base(old[0], new[0]) and old[1:] == new[1:]


def read_config_file(path: Path) -> dict[str, Any]:
    """Read the flags in a `config.json`.

    Raises:
        InputError: the file does not hold a JSON object.
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
    """Lock a run folder, so that no second run writes into it; the lock ends with the process.

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
        try:  # This lock is not inherited: a loader's worker may live longer than this process.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(
                f"another process is training in {folder}; wait for it, or start a new run "
                "without --resume"
            ) from None
        except OSError as error:  # Some network file systems cannot lock.
            warn(f"{folder} cannot be locked ({error.strerror}); start no second run in it")
        yield


def save_config(args: argparse.Namespace, folder: Path) -> None:
    """Write `config.json`, which `--config` reads back unchanged."""
    once = {name for name, flag in by_name(TRAIN).items() if not flag.in_config}
    values = {name: value for name, value in vars(args).items() if name not in once}
    write_json(folder / CONFIG_FILE, values)


def newest_adapter(run: Path) -> Path:
    """Return the adapter of the last epoch that a run saved."""
    adapters = sorted(run.glob("epoch_*.pth"), key=lambda path: (len(path.name), path.name))
    if not adapters:
        raise InputError(f"{run} holds no adapter epoch_*.pth yet; pass one by --lora_ckpt")
    return adapters[-1]
