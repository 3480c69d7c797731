"""What earlier runs left in the output folder: records of finished cases, outdated files."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import make_folder, read_json
from common.writing import PARTIAL, flush_folder, remove_partials, write_json
from common.written import Written
from datasets.scans.stamps import digest, stamp
from preprocess.jobs import LISTS, RECORDS, SLICES, VOLUMES, Job
from preprocess.raw_cases import RawCase
from preprocess.summary import DESCRIPTION

LOCK_FILE = "lock"  # in RECORDS
ENDINGS = {SLICES: ".npz", VOLUMES: ".npy.h5", RECORDS: ".json"}
# File systems store times in steps of up to 2 s. A file that changed so shortly before its stamp
# may change again without another time.
STEP = 2e9  # ns


def open_output(output: Path, overwrite: bool) -> Written:
    """Make the output folder and its subfolders; return what is known of its files.

    Raises:
        InputError: a folder cannot be made, or the output holds data that this program did not
            write, or lists or a description that were edited since, and `overwrite` is off.
    """
    foreign = [name for name in (SLICES, VOLUMES) if (output / name).exists()]
    is_ours, written = (output / RECORDS).is_dir(), Written(output)
    if foreign and not is_ours and not overwrite:
        raise InputError(
            f"{output} already holds {' and '.join(foreign)} that were made elsewhere; choose "
            "another --output, or pass --overwrite to replace the cases of this run"
        )
    if not overwrite:  # Earlier versions did not note which lists they wrote.
        names = [name for name in DESCRIPTION if not is_ours or name in written.known]
        written.refuse_foreign(names, flag="--output")
    for name in (RECORDS, SLICES, VOLUMES, LISTS):  # first what tells that the others are ours
        make_folder(output / name, flag="--output")
    return written


def remove_unfinished(output: Path) -> None:
    """Remove the unfinished files of dead processes, of all cases."""
    for folder in (output, *(output / name for name in (SLICES, VOLUMES, LISTS, RECORDS))):
        remove_partials(folder)


def facts_of_sources(case: RawCase) -> dict[str, Any]:
    """Return, as plain JSON, what tells later whether image and label are still the same."""
    paths = (case.image.path, case.label.path)
    stamps = [stamp(path) for path in paths]
    newest = max((time for files in stamps for _, _, *times, _ in files for time in times))
    settled = newest < time.time_ns() - STEP  # False too if a clock was set back
    return {"stamps": stamps if settled else None, "digests": [digest(path) for path in paths]}


def are_current(facts: dict[str, Any], case: RawCase) -> bool:
    """Return whether image and label are what they were when `facts_of_sources` looked at them.

    Their content decides. It is read only if the file system does not say that nothing changed.
    """
    paths = (case.image.path, case.label.path)
    same = facts["stamps"] is not None and facts["stamps"] == [stamp(path) for path in paths]
    return same or facts["digests"] == [digest(path) for path in paths]


def write_record(job: Job, sources: dict[str, Any], result: dict[str, Any]) -> None:
    """Record that a case is finished. Its other files must be on the disk before."""
    sizes = _sizes(job, result)
    record = {"key": job.key(), "sources": sources, "result": result, "sizes": sizes}
    write_json(job.record_path, record | {"sha256": _digest(record)})


def finished_results(jobs: Sequence[Job]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the recorded results of cases whose settings, sources and outputs are unchanged.

    A record that is damaged or was edited counts as none: its case is converted again.
    """
    for job in jobs:
        try:
            record = read_json(job.record_path, remedy="it is made again")
        except InputError:
            continue
        if not isinstance(record, dict) or record.pop("sha256", None) != _digest(record):
            continue
        result = record["result"]
        try:
            current = (
                record["key"] == job.key()
                and record.get("sizes") == _sizes(job, result)
                and are_current(record["sources"], job.case)
            )
        except OSError:  # An output is gone, or the conversion tells why a scan cannot be read.
            current = False
        if current:
            result["group"] = job.case.group  # The outputs do not depend on it.
            yield job.name, result


def _sizes(job: Job, result: dict[str, Any]) -> list[int]:
    """Return the bytes of each output; a file that was cut short since shows by them."""
    return [path.stat().st_size for path in job.outputs(result["slices"])]


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def remove_outdated(output: Path, jobs: Sequence[Job]) -> None:
    """Remove the files that earlier runs left of the cases to convert, unfinished ones as well."""
    names = {job.name: job for job in jobs}
    for folder in (RECORDS, VOLUMES, SLICES):
        ending = ENDINGS[folder]
        for path in list((output / folder).iterdir()):
            name = re.sub(rf"^{PARTIAL}", "", path.name).removesuffix(ending)
            if folder == SLICES and not (name in names and names[name].case.is_slice):
                name = re.sub(r"_slice\d+$", "", name)
            if path.name.endswith(ending) and name in names:
                path.unlink(missing_ok=True)
        flush_folder(output / folder)


def refuse_lost(jobs: Sequence[Job], results: dict[str, dict[str, Any]]) -> None:
    """Raise an `InputError` if files that this run wrote or kept are gone before it ends."""
    for job in jobs:
        for path in (*job.outputs(results[job.name]["slices"]), job.record_path):
            if not path.is_file():
                raise InputError(
                    f"{path} was written but is gone, so something deletes or moves files in "
                    f"{job.output}; run the same command again when that has ended"
                )
