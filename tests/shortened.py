"""What the programs do in tests in less time; every other line of them is the one of users.

Importing this module changes this process, and the forks of a process that imported it.

Left out are three things that take most of the time of a run of a few steps and that no other part
of a run reads. The tests of each use the real one: memory, `test_memory.py` and
`test_memory_of_odd_networks.py`; curves, `test_run_folders.py` and `test_validation.py`; flushes,
`power_cut.py`, which also knows what a disk loses without them. And `predict.py` does not start a
child for its scans if an earlier call has left one; `test_isolated.py` starts its own. Programs
that tests start by a command line do everything.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, ClassVar

import prediction.segmenting
import training.data_check
import training.run
from common.writing import atomic_path
from datasets.scans.isolated import IsolatedReader
from training.curves import PICTURE

# The files of a test need not survive a power cut of this machine.
os.fsync = lambda descriptor: None
# "Unknown", as for a network whose memory cannot be counted.
training.data_check.memory_of_step = lambda *args: {}


def no_curves(folder: Path, class_names: Sequence[str]) -> Path:
    """Write an empty picture at the moment and in the way of `draw_curves`."""
    with atomic_path(folder / PICTURE) as temporary:
        temporary.touch()
    return folder / PICTURE


training.run.draw_curves = no_curves


class KeptReader(IsolatedReader):
    """Leaves its child to the next reader, if it is idle and well."""

    left: ClassVar[list[tuple[subprocess.Popen[bytes], IO[bytes], list[str]]]] = []
    last: Future[Any] | None = None

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        self.last = super().submit(function, *args)
        return self.last

    def __exit__(self, *exception: object) -> None:
        busy = self.last is not None and not self.last.done()
        if busy or self.child.poll() is not None:
            super().__exit__(*exception)
        else:
            self.thread.shutdown()
            self.left.append((self.child, self.words, [*sys.path]))

    def _start(self) -> None:
        while self.left:
            self.child, self.words, path = self.left.pop()
            if path == sys.path and self.child.poll() is None:
                self.words.seek(0)
                self.words.truncate()
                self._run(os.chdir, (Path.cwd(),))
                return
            self.child.kill()
            self._end()
        super()._start()


os.register_at_fork(after_in_child=KeptReader.left.clear)
prediction.segmenting.IsolatedReader = KeptReader
