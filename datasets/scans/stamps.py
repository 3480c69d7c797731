"""Recognising scans that changed since they were read: of every file that belongs to a scan."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Any

from common.files import sha256_of
from datasets.scans.text_headers import META, NRRD

# Bytes in which the names of data files are searched; a list may name thousands.
LONGEST_LIST = 1 << 20
NAMES_DATA = re.compile(r"^[ \t]*(?:ElementDataFile[ \t]*=|data ?file:=?)(.*)$", re.M | re.I)


def stamp(path: Path) -> list[list[Any]]:
    """Return what the file system says of each file of a scan, as plain JSON.

    Returns:
        Name, size in bytes, times of the last change of content and of anything in ns, and inode
        of each file, modulo 2**63 as JSON needs it; links are followed. -1 for a missing file.
    """
    stamps = []
    for file in files_of(path):
        name = file.name if path.is_dir() or file == path else os.path.relpath(file, path.parent)
        try:
            facts = file.stat()
        except OSError:  # a link to nothing
            stamps.append([name, -1, -1, -1, -1])
            continue
        numbers = facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino
        stamps.append([name, facts.st_size, *(number % 2**63 for number in numbers)])
    return stamps


def digest(path: Path) -> str:
    """Return a hash of the content of all files of a scan, and of their names."""
    found = hashlib.sha256()
    for file in files_of(path):
        if file.is_file():  # Reading a pipe would wait for ever.
            name = hashlib.sha256(os.fsencode(file.name)).hexdigest()
            found.update(f"{name} {sha256_of(file)}\n".encode())
    return found.hexdigest()


def files_of(path: Path) -> list[Path]:
    """Return every file that belongs to a scan: of a series, or of a header and its data."""
    return sorted(path.iterdir()) if path.is_dir() else [path, *data_files(path)]


def data_files(path: Path) -> list[Path]:
    """Return the files with the voxels of a text header: a file, a list, or a numbered pattern."""
    if path.suffix.lower() not in NRRD + META or not stat.S_ISREG(path.stat().st_mode):
        return []
    with path.open("rb") as file:
        text = os.fsdecode(file.read(LONGEST_LIST))
    if path.suffix.lower() in NRRD:  # an empty line ends the header
        text = re.split(r"\n\r?\n", text, maxsplit=1)[0]
    match = NAMES_DATA.search(text)
    named = match[1].strip() if match else "LOCAL"
    if named.upper() == "LOCAL":
        return []
    names = [named]
    if named.upper().split()[:1] == ["LIST"]:
        names = [line.strip() for line in text[match.end() :].splitlines() if line.strip()]
    found: list[Path] = []
    for name in names:
        with contextlib.suppress(OSError, ValueError):  # no name that a file could have
            if (path.parent / name).is_file():
                found.append(path.parent / name)
            elif "%" in name:
                found += _numbered(path.parent, name)
    return sorted(set(found) - {path})


def _numbered(folder: Path, text: str) -> list[Path]:
    """Return the files that a pattern with numbers names: `slices/s%03d.raw 1 20 1`."""
    match = re.match(r"(.*/)?([^/]*)%\d*[di](\S*)", text)
    if match is None:
        return []
    name = re.compile(rf"{re.escape(match[2])}\d+{re.escape(match[3])}")
    return [p for p in (folder / (match[1] or "")).iterdir() if name.fullmatch(p.name)]
