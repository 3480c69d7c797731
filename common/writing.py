"""Writing files completely or not at all, also if the process is killed or the power fails.

A file is written under a temporary name beside its own, flushed to the disk and renamed; then its
folder is flushed, which keeps the new name. No library is trusted to tell that the disk is full:
every finished file must still be able to grow, and texts, tensors and voxels are read back.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.errors import NOT_WRITABLE, InputError, cannot_write

# Pattern of `.1234-5f0c.partial.`, which the name follows: process, start of a machine's hash.
PARTIAL = r"\.(\d+)-([0-9a-f]{4})\.partial\."
# Seconds after which an unfinished file of another machine counts as left by a dead process.
FORGOTTEN = 24 * 3600
BUFFER = 1 << 20  # bytes that are written at once
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
    temporary = partial_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        settle(temporary, path)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise cannot_write(path, error) from None
    finally:
        with contextlib.suppress(OSError):  # It may not exist.
            temporary.unlink()


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[io.BufferedRandom]:
    """Open a file for a library that writes bytes; it gets its name as in `atomic_path`.

    The library never sees an error of the disk, after which some cannot close their file: the
    error is raised when the library is done.

    Raises:
        InputError: no room or no right to write there; an older file of the name is untouched.
    """
    with atomic_path(path) as temporary:
        noting = NotingFile(temporary)
        try:
            with io.BufferedRandom(noting, BUFFER) as file:
                yield file
        finally:
            if noting.error is not None:
                raise noting.error


class NotingFile(io.FileIO):
    """A new file for writing and reading that notes the first error and then takes everything."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes, or drop them after an error."""
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def truncate(self, size: int | None = None) -> int:
        """Set the size, unless there was an error."""
        if self.error is None:
            try:
                return super().truncate(size)
            except OSError as error:
                self.error = error
        return self.tell() if size is None else size


def settle(temporary: Path, path: Path) -> None:
    """Give a finished file its name, and make sure that name and content are on the disk.

    Raises:
        OSError: the disk is full, or refuses otherwise; maybe the file is not complete.
    """
    require_room(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    for note in before_rename:
        note(temporary, path)
    temporary.replace(path)
    flush_folder(path.parent)


def require_room(path: Path) -> None:
    """Raise the `OSError` of a disk on which a file that was just written cannot grow.

    Such a file may be cut short: some libraries do not tell.
    """
    with path.open("r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.write(b"\0")
        file.truncate(size)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, completely or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
        require_same(path, temporary.read_bytes() == content)


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
