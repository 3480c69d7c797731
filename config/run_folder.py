"""The folder of one run: its name, its configuration, its adapters."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError, cannot_make, first_few, warn
from common.files import make_folder, read_json, require_folder, sha256_of
from common.locks import only_user
from common.writing import flush_folder, write_json
from config.parser import by_name, that_change_numbers, without_second_names
from config.recipe_flags import slices_of_update
from config.shared_flags import AUTO, SCRATCH
from config.source_code import changed_files
from config.train_flags import TRAIN
from datasets.prepared_files import SampleFacts
from segment_anything.base_weights import same_base

CONFIG_FILE = "config.json"
# Of runs that do not record it: all their heads started at random.
HEADS_OF_OLDER_RUNS = {"fresh_heads": True}
LOCK_FILE = "lock"
LONGEST_RUN_NAME = 200  # bytes; file systems allow 255, and a second run gets a number
# Value of the entry `program` of config.json, which tells a run from the folders of other programs.
PROGRAM = "SAMed"
# Entries that the config.json of older runs has, which do not name their program.
OLDER_RUN = {"root_path", "vit_name", "rank", "max_epochs", "data", "weights"}
# Entries of config.json that are no flags: the program, how many runs were started in the folder
# of runs before, and what is known of the files that a run started from.
CONTENT = ("program", "start", "data", "trained_on", "weights", "code")


def run_name(args: argparse.Namespace) -> str:
    """Return `--name`, else the settings that tell runs apart: `Synapse_512_vit_b_encoder_r4_…`."""
    if args.name is not None:
        return args.name
    parts = [flag.in_name(args) for flag in by_name(TRAIN).values() if flag.in_name]
    name = "_".join(part for part in parts if part)
    if len(name.encode()) <= LONGEST_RUN_NAME:
        return name
    start = name.encode()[: LONGEST_RUN_NAME - 9].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def make_run_folder(args: argparse.Namespace) -> Path:
    """Make a new folder under `--output`; a second run of the same settings gets a number."""
    base = Path(args.output) / run_name(args)
    make_folder(base.parent, flag="--output")
    folder, number = base, 1
    while True:
        try:
            folder.mkdir()
            flush_folder(folder.parent)
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
    found = differences(read_run(folder), args)
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
    nearest = None
    for folder in reversed(runs_in(Path(args.output))):
        try:
            found = differences(read_run(folder), args)
        except (InputError, KeyError, TypeError, AttributeError):
            warn(f"{folder} cannot be continued, because its {CONFIG_FILE} was edited or damaged")
            continue
        if not found:
            return folder
        nearest = nearest or f"the newest run, {folder.name}, differs in {', '.join(found)}"
    if nearest:
        warn(f"no run in {args.output} has these settings, so a new run starts: {nearest}")
    return None


def runs_in(folder: Path) -> list[Path]:
    """Return the runs in a folder of runs, the newest last, whatever the clock said meanwhile."""
    return [run for _, _, run in _started_runs(folder)]


def _started_runs(folder: Path) -> list[tuple[int, int, Path]]:
    """Return number of start, time of `config.json` and folder of each run, the newest last."""
    found = []
    for path in folder.glob(f"*/{CONFIG_FILE}"):
        try:
            values = read_config_file(path)
        except InputError as error:
            if (path.parent / LOCK_FILE).is_file():
                warn(f"the run in {path.parent} is left out: {error}")
            continue
        if _is_run(values):
            found.append((_start(values), path.stat().st_mtime_ns, path.parent))
    return sorted(found)


def read_run(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a run folder.

    Raises:
        InputError: there is none, or it is not that of a run of this program.
    """
    values = read_config_file(folder / CONFIG_FILE)
    if not _is_run(values):
        raise InputError(
            f"{folder} is no run of train.py, because another program wrote its {CONFIG_FILE}; "
            "pass a run folder"
        )
    return values


def _is_run(values: Mapping[str, Any]) -> bool:
    return values.get("program") == PROGRAM or values.keys() >= OLDER_RUN


def _start(values: Mapping[str, Any]) -> int:
    start = values.get("start")
    return start if isinstance(start, int) and 0 <= start < 2**53 else 0


def differences(saved: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """List the settings of a saved run that differ now, e.g. `--base_lr 0.005 → 0.001`.

    A setting that only the saved run has is no difference. One that it lacks had its default.
    """
    defaults = {name: flag.default for name, flag in by_name(TRAIN).items() if not flag.means}
    now = settings_to_keep(vars(args))
    before = settings_to_keep(vars(args) | defaults | HEADS_OF_OLDER_RUNS | saved)
    names = sorted(name for name in now if before[name] != now[name])
    found = [
        f"--{name} {before[name]!s:.80} → {now[name]!s:.80}" for name in names if name != "spec"
    ]
    if "spec" in names:
        found.append("the description of the data")
    found += _other_data(saved.get("data"), vars(args).get("data"))
    found += _other_weights(saved.get("weights"), vars(args).get("weights"))
    edited = changed_files(saved.get("code"), args.code)
    if edited and not args.same_code:
        found.append(f"source code ({first_few(edited)}; if the change means nothing, --same_code)")
    return found


def _other_data(before: object, now: dict[str, str] | None) -> list[str]:
    """Return a text about the first hash of the data that differs, of those that both runs know."""
    if before is None or now is None:
        return []
    # Version 1.0 recorded the first hash alone.
    known = before if isinstance(before, dict) else {"slices": before}
    for part, digest in now.items():
        if part in known and known[part] != digest:
            which = "data" if part == "slices" else f"data ({part})"
            return [f"{which} {known[part]!s:.80} → {digest}"]
    return []


def _other_weights(before: object, now: str | None) -> list[str]:
    """Compare two fingerprints; earlier versions recorded half of that of the base weights."""
    if before is None or now is None:
        return []
    old, new = str(before).split(" and "), now.split(" and ")
    same = same_base(old[0], new[0]) and old[1:] == new[1:]
    return [] if same else [f"weights {before!s:.80} → {now}"]


def settings_to_keep(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a run must keep when it is continued.

    Fingerprints are compared by themselves. That of the data stands for what was measured in them:
    `trained_on`, and the size in their description.
    """
    kept = that_change_numbers(values, by_name(TRAIN)) | {"global_batch": slices_of_update(values)}
    for name in CONTENT:
        kept.pop(name, None)
    if isinstance(kept.get("spec"), dict):
        kept["spec"] = kept["spec"] | {"size": None}
    return kept


def fingerprint_data(
    facts: Sequence[SampleFacts], order: Sequence[str], held_out: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Return hashes of the training data that decide the numbers of a run.

    Args:
        facts: about all slices.
        order: names of the slices that are trained on. Their places decide how they are shuffled.
        held_out: names of the slices of each case that is held out for validation.

    Returns:
        `slices`, as version 1.0 recorded it, which hashes images and sizes of classes; `labels`;
        `order`; `held out`.
    """
    ordered = sorted(facts, key=lambda fact: fact.name)
    images = sorted((fact.name, fact.digest, fact.voxels) for fact in facts)
    return {
        "slices": f"{len(facts)} slices {_digest(images)}",
        "labels": _digest([(fact.name, fact.shape, fact.label_digest) for fact in ordered]),
        "order": _digest(list(order)),
        "held out": _digest([(case, list(names)) for case, names in held_out.items()]),
    }


def _digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def fingerprint_weights(base: str | None, adapter: str | None) -> str:
    """Return a fingerprint of the weights that a run starts from: base weights and adapter."""
    return f"{base or SCRATCH}" + (f" and {sha256_of(Path(adapter))[:12]}" if adapter else "")


def read_config_file(path: Path) -> dict[str, Any]:
    """Read the flags in a `config.json`.

    Raises:
        InputError: the file does not hold a JSON object, or none of the flags of train.py.
    """
    saved = read_json(path, remedy=f"pass the {CONFIG_FILE} that train.py wrote")
    if not isinstance(saved, dict):
        raise InputError(f"{path} holds a {type(saved).__name__}, expected a JSON object of flags")
    if not saved.keys() & by_name(TRAIN).keys():
        raise InputError(
            f"{path} holds no flag of train.py, so another program wrote it; pass the "
            f"{CONFIG_FILE} that train.py wrote"
        )
    return without_second_names(saved, by_name(TRAIN), path)


@contextlib.contextmanager
def only_writer(folder: Path, first: bool = True) -> Iterator[None]:
    """Lock a run folder, so that no second run writes into it; the lock ends with the process.

    Args:
        first: whether this is the rank that writes.
    """
    if not first:
        yield
        return
    taken = (
        f"another process is training in {folder}; wait for it, or start a new run without --resume"
    )
    with only_user(folder / LOCK_FILE, taken=taken):
        yield


def save_config(args: argparse.Namespace, folder: Path) -> None:
    """Write `config.json`, which `--config` reads back unchanged."""
    once = {name for name, flag in by_name(TRAIN).items() if not flag.in_config}
    values = {name: value for name, value in vars(args).items() if name not in once}
    before = (start for start, _, _ in _started_runs(folder.parent))
    entries = {"program": PROGRAM, "start": max(before, default=0) + 1}
    write_json(folder / CONFIG_FILE, values | entries)


def newest_adapter(run: Path) -> Path:
    """Return the adapter of the last epoch that a run saved."""
    adapters = sorted(run.glob("epoch_*.pth"), key=lambda path: (len(path.name), path.name))
    if not adapters:
        raise InputError(f"{run} holds no adapter epoch_*.pth yet; pass one by --lora_ckpt")
    return adapters[-1]
