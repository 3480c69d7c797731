"""Which process segments which scan, and which scans ended the process that segmented them.

All processes that write into one output folder take its scans one at a time: the ranks of one call,
calls in several terminals, jobs of an array. A claim is a lock on a byte of one file. The system
ends it together with its process, also at `kill -9`, so no claim is ever stale. Locks of this kind
(POSIX) also hold between machines, on NFS with a lock service and on Lustre mounted with `flock`;
where an NFS mount locks only locally (`nolock`, `local_lock`), give every machine its own `--part`.
Another machine may see a finished case as late as its NFS cache allows (a minute), so there a scan
may be segmented a second time after the first, with the same result; never twice at a time.

An attempt is a line in a file of the scan, written before it is read and removed after its files
are written, it failed with a message, or the process was asked to stop (Ctrl-C, SIGTERM). A line
that is left tells that its process ended without a word. Nothing tells a crash from the `kill -9`
of a user or scheduler, and the process had up to three scans in work: so such a scan is tried once
more, after all others and alone in its process. If that ends the process too, it is marked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import NOTES, InputError, first_few, warn
from common.files import read_json
from common.locks import Locks
from common.writing import flush_folder, write_json
from common.written import Written
from datasets.scans.files import ScanFile
from datasets.scans.stamps import stamp
from prediction.records import RECORDS, read_record, record_path, remove_earlier

LOCK = "lock"  # a file in the folder of records
ATTEMPTS, FAILED = ".attempts", ".failed"  # ends of names there
DEATHS = 2  # processes that a scan may end before it is marked
POLL_S = 0.1  # seconds between looks at the scans that other processes hold
SUMMARY_LOCK = "/summary"  # no name of a case holds a slash


def states(folder: Path, scans: Iterable[ScanFile], *, retry: bool) -> dict[str, list[Any]]:
    """Return what the folder knows of each scan now: what differs later, another process did.

    Args:
        retry: forgive the attempts that ended their process until now.
    """
    return {
        scan.name: [
            _sign(record_path(folder, scan.name)),
            _sign(failure_path(folder, scan.name)),
            len(_lines(attempts_path(folder, scan.name))) if retry else 0,
        ]
        for scan in scans
    }


def forget(folder: Path, done: Container[str]) -> None:
    """Remove what a killed process left of attempts at cases that are done."""
    for path in (folder / RECORDS).glob("*.*"):
        if path.suffix in (ATTEMPTS, FAILED) and path.stem in done:
            _shorten(path, 0)


class Claims:
    """A context in which this process takes scans, and learns what others did with the rest.

    Args:
        scans: all scans of the call that are not done, in the same order in every process.
        before: see `states`; the same in all ranks of the call.
        progress: called with the number of scans that others have finished.

    Raises:
        InputError: the folder cannot be locked, and ranks on several machines write there.
    """

    def __init__(
        self,
        scans: Sequence[ScanFile],
        written: Written,
        key: dict[str, Any],
        num_classes: int,
        before: dict[str, list[Any]],
        progress: Callable[[float], object],
    ) -> None:
        self.written, self.folder, self.key = written, written.folder, key
        self.num_classes, self.before, self.progress = num_classes, before, progress
        self.queue, self.later = deque(scans), deque[ScanFile]()
        self.begun: dict[str, int] = {}  # bytes of the file of attempts before this one
        self.outcomes: dict[str, dict[str, Any] | str] = {}  # a result, or why it failed
        self.alone = False  # whether the scan that was taken last must be alone in its process
        self.told: list[str] = []
        self.waited_s = 0.0  # for scans of other processes, with nothing else to do

    def __enter__(self) -> Claims:
        self.locks = open_locks(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        for name, size in list(self.begun.items()):  # stopped for a reason that is known
            _shorten(attempts_path(self.folder, name), size)
        self.locks.close()

    def take(self, *, idle: bool = False) -> ScanFile | None:
        """Claim the next scan that nobody works on; None: there is none.

        Args:
            idle: this process has no other scan in work. Then it waits for the scans of other
                processes, goes on with those that were left, and returns None if all are settled.
        """
        self.alone = False
        while self.queue:
            scan = self.queue.popleft()
            if self._claim(scan, suspects=False):
                return scan
        while idle and self.later:
            for _ in range(len(self.later)):
                scan = self.later.popleft()
                if self._claim(scan, suspects=True):
                    return scan
            if self.later:
                self._wait()
        return None

    def settle(self, name: str, outcome: dict[str, Any] | str) -> None:
        """Note the result of a claimed scan, or why it failed, and end the claim."""
        self.outcomes[name] = outcome
        if isinstance(outcome, str):
            self._note_failure(name, outcome)
        else:
            _shorten(failure_path(self.folder, name), 0)
        _shorten(attempts_path(self.folder, name), 0)
        self.begun.pop(name, None)
        self.locks.leave(name)

    def _claim(self, scan: ScanFile, *, suspects: bool) -> bool:
        """Return whether this process has the scan now; else it is settled, or tried later."""
        name, file = scan.name, attempts_path(self.folder, scan.name)
        if not self.locks.take(name):
            self.later.append(scan)
            return False
        outcome, deaths = self._outcome(scan), []
        if outcome is None:
            source, forgiven = _digest(scan), self.before[name][2]
            deaths = [date for digest, date in _lines(file) if digest == source]
        if deaths and len(deaths) - forgiven >= DEATHS:
            outcome = (
                f"it ended the process that segmented it on {deaths[-1]}, and one before; --retry "
                "tries again, and fewer --processes or a smaller --batch_size need less memory"
            )
            remove_earlier(self.written, name, self.num_classes)
            self._note_failure(name, outcome)
        if outcome is not None:
            self.outcomes[name] = outcome
            self.progress(1)
        elif deaths and not suspects:
            self.later.append(scan)
        else:
            self.alone = bool(deaths)
            self.begun[name] = file.stat().st_size if file.exists() else 0
            _begin(file, f"{source} {time.strftime('%Y-%m-%d %H:%M')}\n")
            return True
        self.locks.leave(name)
        return False

    def _note_failure(self, name: str, message: str) -> None:
        path = failure_path(self.folder, name)
        if path.parent.is_dir():  # else the whole output folder is gone
            content = {"key": self.key, "message": message, "at": time.time_ns()}
            with contextlib.suppress(InputError):  # on a full disk, only this process knows it
                write_json(path, content)

    def _outcome(self, scan: ScanFile) -> dict[str, Any] | str | None:
        """Return what another process made of a scan since this call began."""
        name, (record, failure, _) = scan.name, self.before[scan.name]
        if _sign(record_path(self.folder, name)) not in (None, record):
            found = read_record(self.folder, name, self.num_classes)
            is_there = found and (self.folder / found.result["file"]).is_file()
            if is_there and found.key == self.key and _is_of(found.source, scan):
                return found.result
        if _sign(failure_path(self.folder, name)) not in (None, failure):
            return _failure(failure_path(self.folder, name), self.key)
        return None

    def _wait(self) -> None:
        names = [scan.name for scan in self.later]
        if names != self.told:
            self.told = names
            logging.info("waiting for other processes that segment %s", first_few(names))
        if not (self.folder / RECORDS).is_dir():
            gone = f"the output folder {self.folder} was removed or cannot be reached any more"
            self.outcomes |= dict.fromkeys(names, f"{gone}; run the same command again")
            self.later.clear()
        time.sleep(POLL_S)
        self.waited_s += POLL_S


def open_locks(folder: Path) -> Locks:
    """Return the locks of an output folder; where it cannot lock, those of this launch."""
    file = folder / RECORDS / LOCK
    try:
        return Locks(file)
    except OSError as error:
        launch = os.environ.get(NOTES)
        if launch is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError(
                f"{folder} is on a file system that cannot lock files ({error.strerror}), which "
                "several processes need; start them one by one, each with its own --part, or pass "
                "another --output"
            ) from None
        warn(
            f"{folder} cannot be locked ({error.strerror}); start no second program that writes "
            "there, or give each its own --part"
        )
        return Locks(Path(launch) / LOCK if launch else None)


@contextlib.contextmanager
def only_writer_of_summary(folder: Path) -> Iterator[None]:
    """Wait until no other process writes the tables of all cases, and hold the lock on them."""
    locks = open_locks(folder)
    try:
        locks.take(SUMMARY_LOCK, wait=True)
        yield
    finally:
        locks.close()


def failures(folder: Path, key: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return why each of these scans failed that failed last with these settings."""
    found = {name: _failure(failure_path(folder, name), key) for name in names}
    return {name: message for name, message in found.items() if message is not None}


def attempts_path(folder: Path, name: str) -> Path:
    """Return the file of the attempts of a case: lines of its scan's digest and a date."""
    return folder / RECORDS / f"{name}{ATTEMPTS}"


def failure_path(folder: Path, name: str) -> Path:
    """Return the file that says why a case failed."""
    return folder / RECORDS / f"{name}{FAILED}"


def _failure(path: Path, key: dict[str, Any]) -> str | None:
    try:
        content = read_json(path, remedy="")
    except InputError:  # there is none, or it is damaged
        return None
    if not isinstance(content, dict) or content.get("key") != key:
        return None
    message = content.get("message")
    return message if isinstance(message, str) else None


def _sign(path: Path) -> list[int] | None:
    """Return what changes with every new file of a name; None: there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return [facts.st_mtime_ns, facts.st_ino % 2**63]


def _is_of(source: list[Any], scan: ScanFile) -> bool:
    """Return whether a record is of this scan, and not of one of its name in another input.

    Names, sizes and times of content count; inodes may differ between machines.
    """
    try:
        now = stamp(scan.path)
    except OSError:
        return False
    return [one[:3] for one in source if isinstance(one, list)] == [one[:3] for one in now]


def _digest(scan: ScanFile) -> str:
    """Return what changes if a scan is replaced."""
    try:
        return hashlib.sha256(json.dumps(stamp(scan.path)).encode()).hexdigest()[:16]
    except OSError:  # reading it tells what is wrong
        return "unreadable"


def _lines(path: Path) -> list[list[str]]:
    """Return digest and date of each attempt; a line that a power cut left half is none."""
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError:
        return []
    parts = [line.split(" ", 1) for line in text.split("\n")[:-1]]
    return [part for part in parts if len(part) == 2]


def _begin(path: Path, line: str) -> None:
    """Add an attempt to the file of a scan. If there is no room, writing the result will say so."""
    with contextlib.suppress(OSError), path.open("ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
        flush_folder(path.parent)


def _shorten(path: Path, size: int) -> None:
    """Cut a file to a size in bytes; remove it if nothing stays."""
    with contextlib.suppress(OSError):
        if size:
            os.truncate(path, size)
        else:
            path.unlink()
