"""A table of scans as the input of `predict.py`: a CSV file with the columns `path` and `case`.

Spreadsheets write commas, or semicolons where the comma is the decimal mark; UTF-8 with a mark at
its start or without; and lines of Windows. All are read, and tabs too.
"""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

from common.errors import InputError, first_few, warn
from common.files import require_file
from common.names import safe_name, utf8_path
from datasets.scans.dicom import holds_dicom
from datasets.scans.errors import reporting_os_errors
from datasets.scans.files import (
    DICOM,
    ScanFile,
    refuse_equal_names,
    require_readers,
    scan_file,
    suffix_of,
    without_patient,
)
from datasets.scans.text_headers import SEGMENTATION
from datasets.scans.unused import LABELS

SUFFIX = ".csv"
PATH, CASE = "path", "case"
LARGEST = 1 << 26  # bytes; a million scans need about as many


def is_manifest(path: Path) -> bool:
    """Return whether an input is a table of scans by its suffix, also of one that is not there."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def listed_scans(table: Path, *, keep_names: bool) -> list[ScanFile]:
    """Return the scans that a table lists, sorted by the names of their results.

    Paths are relative to the folder of the table, or absolute: scans are only read, so they may
    lie anywhere. Without a name in `case`, a result is called as the scan.

    Args:
        keep_names: as in `datasets.scans.files.search`; names in the table are always kept.

    Raises:
        MissingFileError: there is no such table.
        InputError: the table has no column `path` or no row, a path is missing or no scan, a name
            leads out of the output folder, or a scan or name is listed twice.
    """
    rows = _rows(require_file(table, what="table of scans", remedy="pass another by --input"))
    places = {line: table.parent / row[PATH] for line, row in rows.items()}
    with reporting_os_errors(table):
        absent = [line for line, place in places.items() if not place.exists()]
    missing = [f"{rows[line][PATH]} (line {line})" for line in absent]
    if missing:
        raise InputError(
            f"{table} lists {len(missing)} of {len(rows)} paths that do not exist: "
            f"{first_few(missing)}; paths are relative to its folder, or absolute"
        )
    scans, lines = [], {}
    for line, place in places.items():
        with reporting_os_errors(place):
            scan = _scan(table, line, place)
        if name := rows[line].get(CASE, ""):
            scan = replace(scan, name=safe_name(name, source=f"{table}, line {line},"))
        elif not keep_names:
            scan = without_patient(scan, table.parent)
        if (first := lines.setdefault(place.resolve(), line)) != line:
            raise InputError(
                f"{table} lists {rows[line][PATH]} in line {first} and line {line}; remove one"
            )
        scans.append(scan)
    refuse_equal_names(scans, table, f"give each a name of its own in the column {CASE!r}")
    require_readers(scans)
    return sorted(scans, key=lambda scan: scan.name)


def _scan(table: Path, line: int, place: Path) -> ScanFile:
    if place.is_dir() and holds_dicom([p for p in place.iterdir() if not p.name.startswith(".")]):
        return scan_file(place.resolve(), DICOM)
    suffix = suffix_of(place) if place.is_file() else None
    if suffix is not None and suffix != SEGMENTATION:
        return scan_file(place, suffix)
    what = "a folder without DICOM slices" if place.is_dir() else "no scan or picture by its suffix"
    what = what if suffix is None else LABELS
    raise InputError(
        f"{table} lists {place} in line {line}, which is {what}; list one scan, picture or folder "
        "of one DICOM series in each line"
    )


def _rows(table: Path) -> dict[int, dict[str, str]]:
    """Return the columns that are used of each row that is not empty, by its number from 1."""
    with reporting_os_errors(table):
        if table.stat().st_size > LARGEST:
            raise InputError(
                f"{table} is larger than {LARGEST >> 20} MB, so it is no table of scans"
            )
        content = table.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{table} is not in UTF-8 (byte {error.start}); save it as “CSV UTF-8”"
        ) from None
    head = text.split("\n", 1)[0]
    mark = max(",;\t", key=head.count)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True))
    except csv.Error as error:
        raise InputError(f"{table} is no CSV table ({error}); write it again") from None
    names = [name.strip().lower() for name in lines[0]] if lines else []
    _check_columns(table, names)
    rows = {}
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(names) and any(cell.strip() for cell in cells[len(names) :]):
            raise InputError(
                f"{table} has {len(cells)} cells in line {number}, but {len(names)} columns; put "
                "quotes around a path that holds the separator"
            )
        row = dict(zip(names, (cell.strip() for cell in cells), strict=False))
        rows[number] = {name: row[name] for name in (PATH, CASE) if name in row}
        if not rows[number].get(PATH):
            raise InputError(
                f"{table} has no path in line {number}; fill it in, or remove the line"
            )
        utf8_path(rows[number][PATH])
    if not rows:
        raise InputError(f"{table} lists no scan; expected a path in each line")
    return rows


def _check_columns(table: Path, names: list[str]) -> None:
    """Refuse a table without a column of paths; tell which columns are not used."""
    if PATH not in names:
        columns = f"the columns {first_few([repr(name) for name in names])}" if names else "no text"
        raise InputError(
            f"{table} has {columns}, expected {PATH!r}, and if wanted {CASE!r} for the name of the "
            "result, in its first line"
        )
    twice = [name for name in (PATH, CASE) if names.count(name) > 1]
    if twice:
        raise InputError(f"{table} has the column {twice[0]!r} more than once; remove all but one")
    if "channel" in names:
        raise InputError(
            f"{table} has a column 'channel', which cannot differ between scans; remove it, and "
            "pass --channel"
        )
    if other := [name for name in names if name not in (PATH, CASE, "")]:
        warn(f"{table} has columns that are not used: {first_few(other)}")
