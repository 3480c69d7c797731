"""What a folder of segmented scans holds: records of the cases that are done, and whose files are.

Each case has a record of its scan, of the settings and of the result. `common.written` knows which
files predict.py wrote. A label file that the user corrected since counts as done and is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from common.errors import InputError, MissingFileError, first_few, warn
from common.files import read_json, sha256_of
from common.writing import write_json
from common.written import Written
from datasets.scans.errors import reporting_os_errors
from datasets.scans.files import ScanFile
from datasets.scans.labels import label_suffix
from datasets.scans.stamps import stamp

RECORDS, OVERLAYS, PROBABILITIES = ".done", "overlays", "probabilities"
DICOM_SEG = ".seg.dcm"  # suffix
CORRECTED = "its label file was changed after it was written; the volumes are those before"
# The fields of a result that `predictions.json` and `volumes.csv` are written from.
FIELDS = {
    "case": str,
    "file": str,
    "input": str,
    "shape": list,
    "voxels": list,
    "ml": list | None,
    "cut_by_edge": list,
    "warnings": list,
    "not_used": list,
}
# Of each class, in the scan's own values (HU for CT); version 1.0 did not record them.
INTENSITIES = ("intensity_mean", "intensity_sd")


@dataclass(frozen=True)
class Record:
    """What is recorded of a case."""

    key: dict[str, Any]  # see `config.settings.prediction_key`
    source: list[Any]  # stamp of the scan
    result: dict[str, Any]
    label: list[Any]  # SHA-256, size and time of the label file


def finished(
    scans: Sequence[ScanFile],
    written: Written,
    key: dict[str, Any],
    num_classes: int,
    wanted: str | None,
) -> dict[str, dict[str, Any]]:
    """Return the recorded results of unchanged scans that were segmented with these settings.

    Labels that were corrected since are kept: their cases count as segmented, with a warning.

    Args:
        written: the output folder.
        key: see `config.settings.prediction_key`.
        wanted: `--format`.
    """
    records, found, corrected = recorded(written, key, num_classes), {}, []
    for scan in scans:
        file, record = f"{scan.name}{label_suffix(scan, wanted)}", records.get(scan.name)
        if record is None or record.result["file"] != file or record.source != _stamp(scan):
            continue
        found[scan.name] = record.result
        if not is_as_recorded(written.folder / file, record):
            corrected.append(file)
            warnings = [*record.result["warnings"], CORRECTED]
            found[scan.name] = record.result | {"warnings": warnings}
    if corrected:
        warn(
            f"{written.folder} holds label files that were changed after predict.py wrote them, so "
            f"they are kept: {first_few(corrected)}; move them away to segment their scans again"
        )
    return found


def _stamp(scan: ScanFile) -> list[Any]:
    with reporting_os_errors(scan.path):
        return stamp(scan.path)


def is_as_recorded(path: Path, record: Record) -> bool:
    """Return whether a label file is the recorded one; a copy with another time also is."""
    given = path.stat()
    return record.label[1:] == [given.st_size, given.st_mtime_ns] or record.label[0] == sha256_of(
        path
    )


def recorded(written: Written, key: dict[str, Any], num_classes: int) -> dict[str, Record]:
    """Return the record of each case in a folder that has its label file and this key.

    A process that was killed between a label file and its record leaves a record of other labels,
    which does not count.
    """
    folder, found = written.folder, {}
    for path in sorted((folder / RECORDS).glob("[!.]*.json")):
        record = read_record(folder, path.stem, num_classes)
        if not record or record.key != key or not (folder / record.result["file"]).is_file():
            continue
        file = record.result["file"]
        if is_as_recorded(folder / file, record) or not written.wrote(file):
            found[path.stem] = record
    return found


def read_record(folder: Path, name: str, num_classes: int) -> Record | None:
    """Return the record of a case; None: there is none, or it is damaged, which is told."""
    path = record_path(folder, name)
    remedy = "so its case counts as not segmented"
    try:
        content = read_json(path, remedy=remedy)
        if not _is_record(content, name, num_classes):
            raise InputError(f"{path} is not a record of a segmented scan; {remedy}")
    except MissingFileError:
        return None
    except InputError as error:
        warn(str(error))
        return None
    return Record(content["key"], content["source"], content["result"], content["label"])


def _is_record(content: Any, name: str, num_classes: int) -> bool:
    """Return whether the content of a JSON file has the form of the record of a case."""
    kinds = {"key": dict, "source": list, "result": dict, "label": list}
    if not _has(content, kinds) or not _has(content["result"], FIELDS):
        return False
    result, label = content["result"], content["label"]
    counts = [result["voxels"], result["cut_by_edge"], result["ml"] or result["voxels"]]
    given = [result[name] for name in INTENSITIES if name in result]
    return (
        result["case"] == name
        and PurePosixPath(result["file"]).name == result["file"]
        and all(len(values) == num_classes for values in counts)
        and all(isinstance(value, int | float) for values in counts for value in values)
        and all(isinstance(values, list) and len(values) == num_classes for values in given)
        and all(isinstance(value, int | float | None) for values in given for value in values)
        and all(isinstance(text, str) for text in result["warnings"])
        and all(_has(one, {"path": str, "reason": str}, only=True) for one in result["not_used"])
        and len(label) == 3
    )


def _has(content: Any, kinds: dict[str, Any], *, only: bool = False) -> bool:
    """Return whether a dict has values of these types (and no others)."""
    return (
        isinstance(content, dict)
        and all(name in content and isinstance(content[name], kinds[name]) for name in kinds)
        and not (only and content.keys() - kinds.keys())
    )


def write_record(
    folder: Path, key: dict[str, Any], source: list[Any], result: dict[str, Any]
) -> None:
    """Write the record of a case whose label file is there."""
    path = folder / result["file"]
    label = [sha256_of(path), path.stat().st_size, path.stat().st_mtime_ns]
    write_json(record_path(folder, result["case"]), asdict(Record(key, source, result, label)))


def record_path(folder: Path, name: str) -> Path:
    """Return the path of the record of a case."""
    return folder / RECORDS / f"{name}.json"


def view_name(name: str) -> str:
    """Return the name of the file with what `viewer.html` shows of a case."""
    return f"{RECORDS}/{name}.view"


def require_output(folder: Path) -> None:
    """Raise an `InputError` if the output folder was removed while the program runs."""
    if not (folder / RECORDS).is_dir():
        raise InputError(
            f"the output folder {folder} was removed or cannot be reached any more; run the same "
            "command again"
        )


def earlier_files(folder: Path, name: str, num_classes: int) -> list[str]:
    """Return the names of the files that an earlier run may have written for a case."""
    record = read_record(folder, name, num_classes)
    found = sorted((folder / PROBABILITIES / name).glob("[!.]*"))
    return [
        *([] if record is None else [record.result["file"]]),
        f"{name}{DICOM_SEG}",
        f"{OVERLAYS}/{name}.png",
        view_name(name),
        *[path.relative_to(folder).as_posix() for path in found],
    ]


def remove_earlier(written: Written, name: str, num_classes: int) -> None:
    """Delete the files of a case that an earlier run wrote, and its record."""
    remove_own(written, earlier_files(written.folder, name, num_classes))
    record_path(written.folder, name).unlink(missing_ok=True)


def remove_own(written: Written, names: Iterable[str]) -> None:
    """Delete those of these files that are as predict.py wrote them."""
    for name in names:
        if written.wrote(name):
            (written.folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a folder that is not empty stays
                if name.count("/") > 1:
                    (written.folder / name).parent.rmdir()
