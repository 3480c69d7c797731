"""A power cut at a chosen moment: what was never flushed to the disk is lost, the process dies.

`cut_at` counts the calls that change a folder: opening a file to write, `fsync`, renaming,
deleting, making a folder. At the chosen call it leaves in the folder what a disk may hold after the
power failed, and kills the process. It cannot be undone, so it needs a process of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

# What the disk holds after the cut. `killed`: everything, as if only the process had died.
# `unflushed lost`: only flushed names and flushed content. `torn`: all names, but only flushed
# content, as on file systems that write names first.
KILLED, LOST, TORN = "killed", "unflushed lost", "torn"
MODES = (KILLED, LOST, TORN)
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Disk:
    """What of a folder is on the disk for certain, updated at every flush.

    Args:
        root: the folder; its content at the start counts as flushed.
        kept: a folder on the same file system, where replaced files stay readable.
    """

    def __init__(self, root: Path, kept: Path) -> None:
        self.root, self.kept = root, kept
        self.names: dict[str, dict[str, int]] = {}  # folder -> name -> inode
        self.sizes: dict[int, int] = {}  # inode -> flushed bytes
        kept.mkdir(parents=True)
        for folder, _, files in os.walk(root):
            self.flush_folder(folder)
            for name in files:
                self.flush_file(Path(folder, name).stat())

    def flush_folder(self, folder: str) -> None:
        """Note the names in a folder."""
        found = {}
        for entry in os.scandir(folder):
            found[entry.name] = entry.inode()
            self.keep(entry.path)
        self.names[folder] = found

    def flush_file(self, status: os.stat_result) -> None:
        """Note the size of a file."""
        self.sizes[status.st_ino] = status.st_size

    def keep(self, path: str) -> None:
        """Keep a file readable that may be replaced or deleted."""
        if os.path.isfile(path):  # noqa: PTH113
            link = self.kept / f"{Path(path).stat().st_ino}"
            if not link.exists():
                os.link(path, link)

    def lose(self, mode: str) -> None:
        """Leave in the folder what the disk may hold."""
        if mode == TORN:
            for path in [path for path in self.root.rglob("*") if path.is_file()]:
                content = path.read_bytes()[: self.sizes.get(path.stat().st_ino, 0)]
                path.unlink()
                path.write_bytes(content)
        if mode == LOST:
            shutil.rmtree(self.root)
            self._restore(str(self.root))

    def _restore(self, folder: str) -> None:
        Path(folder).mkdir()
        for name, inode in self.names.get(folder, {}).items():
            path, link = os.path.join(folder, name), self.kept / f"{inode}"  # noqa: PTH118
            if link.exists():
                Path(path).write_bytes(link.read_bytes()[: self.sizes.get(inode, 0)])
            else:
                self._restore(path)


def cut_at(number: int, mode: str, root: str, count: str) -> None:
    """Cut the power at a call from now on.

    Args:
        number: of the call, from 1; 0: never.
        mode: one of `MODES`.
        root: the folder that loses what was not flushed; it exists.
        count: a file that gets a line for each call.
    """
    root = os.path.realpath(root)
    disk = Disk(Path(root), Path(f"{root}.kept"))
    told = os.open(count, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    owner, lock, own = os.getpid(), threading.RLock(), threading.local()
    calls = [0]

    def call(what: str, path: str) -> None:
        calls[0] += 1
        os.write(told, f"{what} {path.removeprefix(root)}\n".encode())
        if calls[0] == number:
            disk.lose(mode)
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    def inside(path: Any) -> str | None:
        if isinstance(path, int) or path is None:
            return None
        path = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
        return path if path == root or path.startswith(root + os.sep) else None

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES or getattr(own, "busy", False) or os.getpid() != owner:
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & WRITES):
            return
        path = inside(args[0])
        if path is None:
            return
        with lock:
            own.busy = True
            try:
                call(event, path)
                for name in args[: 2 if event == "os.rename" else 1]:
                    if event != "open" and os.path.exists(name):  # noqa: PTH110
                        disk.keep(os.fsdecode(name))
            finally:
                own.busy = False

    fsync = os.fsync

    def flush(descriptor: int) -> None:
        path = inside(Path(f"/proc/self/fd/{descriptor}").readlink())
        with lock:
            own.busy = True
            try:
                if path is not None:
                    call("fsync", path)
                fsync(descriptor)
                if path is not None:
                    status = os.fstat(descriptor)
                    if stat.S_ISDIR(status.st_mode):
                        disk.flush_folder(path)
                    else:
                        disk.flush_file(status)
            finally:
                own.busy = False

    os.fsync = flush
    sys.addaudithook(watch)
