"""Writing files completely or not at all, also if the process is killed or the power fails.

A file is written under a temporary name beside its own, flushed to the disk and renamed; then its
folder is flushed, which keeps the new name. No library is trusted to tell that the disk is full:
every finished file must still be able to grow, and texts, tensors and voxels are read back.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import NOT_WRITABLE, InputError, cannot_write

# Pattern of `.1234-5f0c.partial.`, which the name follows: process, start of a machine's hash.
PARTIAL = r"\.(\d+)-([0-9a-f]{4})\.partial\."
# Seconds after which an unfinished file of another machine counts as left by a dead process.
FORGOTTEN = 24 * 3600
BLOCK = 1 << 24  # bytes that are compared at once
# What file systems answer that cannot flush a folder; its names are then as safe as they can be.
NO_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}
# Called with the temporary and the final name of each file before it is renamed.
before_rename: list[Callable[[Path, Path], None]] = []


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success rename it there, on failure remove it.

    Raises:
        InputError: no room or no right to write there; an older file of the name is untouched.
    """
    path = Path(path)
    with unfinished(path) as temporary:
        yield temporary
        finish(temporary, path)


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, which is removed at the end if it still exists.

    Raises:
        InputError: no room or no right to write there.
    """
    temporary = partial_name(path)
    try:
        make_folders(path.parent)
        yield temporary
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise cannot_write(path, error) from None
    finally:
        with contextlib.suppress(OSError):  # It may not exist.
            temporary.unlink()


def finish(temporary: Path, path: Path) -> None:
    """Give a complete file its name, so that it is on the disk under it."""
    flush_file(temporary)
    for note in before_rename:
        note(temporary, path)
    temporary.replace(path)
    flush_folder(path.parent)


def flush_file(path: Path) -> None:
    """Make sure that the content of a file that was just written is on the disk.

    Raises:
        OSError: the disk is full, or refuses otherwise; maybe the file is not complete.
    """
    require_room(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def require_room(path: Path) -> None:
    """Raise the `OSError` of a disk on which a file that was just written cannot grow.

    Such a file may be cut short: some libraries do not tell.
    """
    with path.open("r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.write(b"\0")
        file.truncate(size)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file, completely or not at all, and read it back before it gets its name.

    A library that cannot tell of a full disk, as HDF5, writes into memory and this into the file.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
        same, view = temporary.stat().st_size == len(content), memoryview(content)
        with temporary.open("rb") as file:
            for start in range(0, len(content), BLOCK):
                # Comparing with the memoryview itself takes ten times as long as this copy.
                same = same and file.read(BLOCK) == bytes(view[start : start + BLOCK])
        require_same(path, same)


def require_same(path: str | Path, same: bool) -> None:
    """Raise an `InputError` if a file that was just written reads back differently."""
    if not same:
        raise InputError(
            f"cannot write {path}: what was written reads back differently, so the disk or its "
            "file system is at fault; check both, or choose another path"
        )


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, completely or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, completely or not at all; values of other types become texts."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, default=str) + "\n")


def make_folders(folder: Path) -> None:
    """Make a folder and those above it, so that a power cut does not undo them."""
    if folder.is_dir():
        return
    if not folder.parent.exists():
        make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    flush_folder(folder.parent)


def flush_folder(folder: Path) -> None:
    """Make sure that the names in a folder are on the disk, as far as its file system can."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise
        return
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise
    finally:
        os.close(number)


def partial_name(path: Path) -> Path:
    """Return the name of an unfinished file. It keeps the suffix, which writers look at."""
    return path.with_name(f".{os.getpid()}-{_machine()}.partial.{path.name}")


def remove_partials(folder: Path) -> None:
    """Delete the unfinished files that killed processes left in a folder of this project.

    A file of a process that lives is kept. Whether a process of another machine lives cannot be
    known, so its files are kept for a day.
    """
    for left in folder.glob(".*.partial.*"):
        match = re.match(PARTIAL, left.name)
        if match is None:
            continue
        with contextlib.suppress(OSError):  # Another process may remove it at the same moment.
            if match[2] == _machine():
                dead = not _lives(int(match[1]))
            else:
                dead = time.time() - left.stat().st_mtime > FORGOTTEN
            if dead:
                left.unlink()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:4]
