"""Records of segmented scans: which cases are done, from which file and with which settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError, first_few
from common.writing import write_json
from datasets.scans.files import ScanFile, stamp
from datasets.scans.labels import label_suffix

RECORDS = ".done"


def finished(
    scans: Sequence[ScanFile], folder: Path, key: dict[str, Any], wanted: str | None
) -> dict[str, dict[str, Any]]:
    """Return the recorded results of unchanged scans that were segmented with these settings.

    Args:
        folder: output folder.
        key: see `config.settings.prediction_key`.
        wanted: `--format`.
    """
    found = recorded(folder, key)
    return {
        scan.name: found[scan.name][0]
        for scan in scans
        if scan.name in found
        and found[scan.name][1] == stamp(scan.path)
        and (folder / f"{scan.name}{label_suffix(scan, wanted)}").is_file()
    }


def recorded(folder: Path, key: dict[str, Any]) -> dict[str, tuple[dict[str, Any], list[Any]]]:
    """Return result and scan stamp of each case in a folder that has a record with this key."""
    found = {}
    for path in sorted((folder / RECORDS).glob("*.json")):
        try:
            record = json.loads(path.read_text("utf-8"))
            if record["key"] == key and (folder / record["result"]["file"]).is_file():
                found[record["result"]["case"]] = record["result"], record["source"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another program wrote this file
    return found


def refuse_foreign(scans: Sequence[ScanFile], folder: Path, wanted: str | None) -> None:
    """Raise an `InputError` if label files of other programs would be replaced."""
    foreign = [
        file
        for scan in scans
        if (folder / (file := f"{scan.name}{label_suffix(scan, wanted)}")).exists()
        and not record_path(folder, scan.name).exists()
    ]
    if foreign:
        raise InputError(
            f"--output {folder} holds {first_few(foreign)}, which predict.py has not written; "
            "choose another folder, or pass --overwrite to replace these files"
        )


def remove_earlier(folder: Path, name: str) -> None:
    """Delete the files of a case from an earlier run, so that none stays if this run fails."""
    record = record_path(folder, name)
    try:
        file = Path(json.loads(record.read_text("utf-8"))["result"]["file"]).name
    except (OSError, ValueError, KeyError, TypeError):
        return  # without a readable record, the files are not known to be ours
    for path in (
        folder / file,
        folder / "overlays" / f"{name}.png",
        *(folder / "probabilities" / name).glob("*"),
        record,  # last: without a record, files count as another program's
    ):
        path.unlink(missing_ok=True)


def record_path(folder: Path, name: str) -> Path:
    """Return the path of the record of a case."""
    return folder / RECORDS / f"{name}.json"


def write_record(
    folder: Path, key: dict[str, Any] | None, source: list[Any], result: dict[str, Any]
) -> None:
    """Write the record of a case; without a key it only marks the files as ours."""
    record = {"key": key, "source": source, "result": result}
    write_json(record_path(folder, result["case"]), record)
