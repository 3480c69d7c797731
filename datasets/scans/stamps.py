"""Recognising scans that changed since they were read: of every file that belongs to a scan."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import sha256_of
from datasets.scans import stored_data
from datasets.scans.text_headers import META, NRRD, text_header


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
    """Return the other files that the text header of a scan names; none if it is not sound."""
    if path.suffix.lower() not in NRRD + META or not path.is_file():
        return []
    try:
        header = text_header(path)
        return [] if header is None else sorted({*stored_data.data_files(header)} - {path})
    except (InputError, OSError):  # reading it tells what is wrong
        return []
