"""Locks, so that two programs never write into one folder, or do one piece of work."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path

from common.errors import InputError, cannot_write, warn


class TakenError(InputError):
    """Another process holds the lock."""


@contextlib.contextmanager
def only_user(lock_file: Path, *, taken: str) -> Iterator[None]:
    """Hold the lock on a folder; it ends with this process, however that ends.

    Args:
        lock_file: in the folder; it is made and stays there.
        taken: the error message if another process holds the lock.

    Raises:
        TakenError: it is taken.
        InputError: the file cannot be written.
    """
    try:
        lock = lock_file.open("a")
    except OSError as error:
        raise cannot_write(lock_file, error) from None
    with lock:
        try:  # This lock is not inherited: a worker may live longer than this process.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise TakenError(taken) from None
        except OSError as error:  # Some network file systems cannot lock.
            warn(
                f"{lock_file.parent} cannot be locked ({error.strerror}); start no second program "
                "that writes there"
            )
        yield


class Locks:
    """Locks with names, each on a byte of one file; they end with this process, however it ends.

    Args:
        path: the file; it is made and stays there. No other code of the process may open it, since
            closing it would end all of these locks. None: every lock is free.

    Raises:
        OSError: the file cannot be written, or its file system cannot lock.
    """

    def __init__(self, path: Path | None) -> None:
        self.file = None if path is None else path.open("ab")
        if self.file is None:
            return
        try:
            if self.take(""):
                self.leave("")
        except OSError:
            self.close()
            raise

    def take(self, name: str, *, wait: bool = False) -> bool:
        """Return whether this process has the lock now."""
        try:
            self._ask(fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB, name)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def leave(self, name: str) -> None:
        """Give a lock back."""
        with contextlib.suppress(OSError):  # the file server may be gone
            self._ask(fcntl.LOCK_UN, name)

    def close(self) -> None:
        """Give all locks back."""
        if self.file is not None:
            self.file.close()

    def _ask(self, what: int, name: str) -> None:
        if self.file is not None:  # 56 bits of a hash: names never meet
            place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
            fcntl.lockf(self.file, what, 1, place)
