"""Locks, so that two programs never write into one folder."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from common.errors import InputError, cannot_write, warn


@contextlib.contextmanager
def only_user(lock_file: Path, *, taken: str) -> Iterator[None]:
    """Hold the lock on a folder; it ends with this process, however that ends.

    Args:
        lock_file: in the folder; it is made and stays there.
        taken: the error message if another process holds the lock.

    Raises:
        InputError: it is taken, or the file cannot be written.
    """
    try:
        lock = lock_file.open("a")
    except OSError as error:
        raise cannot_write(lock_file, error) from None
    with lock:
        try:  # This lock is not inherited: a worker may live longer than this process.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(taken) from None
        except OSError as error:  # Some network file systems cannot lock.
            warn(
                f"{lock_file.parent} cannot be locked ({error.strerror}); start no second program "
                "that writes there"
            )
        yield
