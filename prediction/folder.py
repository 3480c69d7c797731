"""The output folder of `predict.py` before any work: what is done, what must not be replaced."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError, first_few
from common.files import make_folder
from common.writing import remove_partials
from common.written import Written
from datasets.registry import DatasetSpec
from datasets.scans.files import ScanFile
from prediction.records import OVERLAYS, PROBABILITIES, RECORDS, finished
from prediction.results import case_files
from prediction.summary import SUMMARY

LOG = "log.txt"


def refuse_folder_of(scans: Sequence[ScanFile], source: Path, folder: Path) -> None:
    """Raise an `InputError` if results would lie beside the scans or replace them."""
    taken = {source.resolve()}
    for scan in scans:
        path = scan.path.resolve()
        taken.add(path if path.is_dir() else path.parent)
    if folder.resolve() in taken:
        raise InputError(
            f"--output {folder} is a folder of scans that are read; choose another folder"
        )


def look_into_folder(
    args: argparse.Namespace,
    spec: DatasetSpec,
    scans: Sequence[ScanFile],
    key: dict[str, Any],
    written: Written,
) -> dict[str, dict[str, Any]]:
    """Return the results that the output folder holds already; nothing is written.

    Raises:
        InputError: files would be replaced that predict.py has not written.
    """
    folder = written.folder
    done = {}
    if not args.overwrite:
        done = finished(scans, written, key, spec.num_classes, args.format)
    names = [name for s in scans if s.name not in done for name in case_files(args, spec, s)]
    # Several processes add lines to the log, and another may have made it a moment ago.
    logs = [] if LOG in written.known or LOG in Written(folder).known else [LOG]
    names += [*SUMMARY, *logs]
    refuse_folders(folder, names)
    if not args.overwrite:
        if written.foreign(names):  # --overwrite would replace corrected labels of cases done too
            names += [name for s in scans if s.name in done for name in case_files(args, spec, s)]
        written.refuse_foreign(names, flag="--output")
    return done


def open_folder(written: Written, *, first: bool) -> Path | None:
    """Make the output folder; remove the unfinished files of killed runs.

    Args:
        first: whether this is the first rank.

    Returns:
        On the first rank, the log file. Lines are only added to it, and it is noted as written.
    """
    folder = written.folder
    for part in (RECORDS, OVERLAYS):
        make_folder(folder / part, flag="--output")
    if not first:
        return None
    for place in (folder, folder / RECORDS, folder / OVERLAYS, *folder.glob(f"{PROBABILITIES}/*")):
        remove_partials(place)
    return written.log_file(LOG)


def refuse_folders(folder: Path, names: Iterable[str]) -> None:
    """Raise an `InputError` if a folder lies where a file will be written."""
    taken = [name for name in names if (folder / name).is_dir()]
    if taken:
        raise InputError(
            f"--output {folder} holds folders where files would be written: {first_few(taken)}; "
            "move them away, or choose another folder"
        )
