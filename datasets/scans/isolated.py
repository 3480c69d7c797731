"""Reading of scans in a process of its own, so that a scan that kills its reader spares the others.

Parsers written in C++ may end the process on damaged bytes, or never return. The child is started
once and reads scan after scan. If it dies, the scan is named and the next scan gets a new child.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from common.errors import InputError

LIMIT_S = 1800  # seconds for one scan; a large scan on a slow disk needs far less
START = "import sys; sys.path[:] = sys.argv[1:]; from datasets.scans.isolated import serve; serve()"


class IsolatedReader:
    """A context in which functions run in a child process, one after the other.

    The child ends with the context, and with this process, however that ends.

    Args:
        limit_s: seconds after which a function is stopped and its scan refused.
    """

    def __init__(self, limit_s: int = LIMIT_S) -> None:
        self.limit_s = limit_s

    def __enter__(self) -> IsolatedReader:
        self.thread = ThreadPoolExecutor(1)
        self._start()  # now, because the imports of the child take a second
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)
        self.child.kill()  # it holds nothing that must be saved
        self.thread.shutdown()
        self.child.kill()  # of which a last scan may have started another
        self._end()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run `function(*args)` in the child, after what was submitted before.

        Args:
            function: a function of a module.
            args: the last one is the scan or its path, for messages.

        Returns:
            What the function returns or raises; an `InputError` if the child dies of it. What it
            writes to stderr is written here when it has ended.
        """
        return self.thread.submit(self._run, function, args)

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self.child.poll() is not None:
            self._end()
            self._start()
        try:
            _send(self.child.stdin, _packed((self.limit_s, function, args)))
            value, error, trace, text = _unpacked(_receive(self.child.stdout))
        except (EOFError, BrokenPipeError):
            raise self._death_by(getattr(args[-1], "path", args[-1])) from None
        print(text, end="", file=sys.stderr)
        if error is not None:
            raise error from (RuntimeError(trace) if trace else None)
        return value

    def _start(self) -> None:
        self.words = tempfile.TemporaryFile()  # noqa: SIM115 - what libraries write to stderr
        self.child = subprocess.Popen(
            [sys.executable, "-c", START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
        )

    def _end(self) -> tuple[int, str]:
        """Wait for the child; return its exit code and what its libraries wrote to stderr."""
        code = self.child.wait()
        with contextlib.suppress(OSError):
            self.child.stdin.close()
        with self.child.stdout, self.words:
            self.words.seek(0)
            return code, self.words.read().decode("utf-8", "replace").strip()

    def _death_by(self, scan: object) -> InputError:
        """Return the error for a scan of which the child died, and start another child."""
        code, words = self._end()
        self._start()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if name == "SIGALRM":
            what = f"was not read within {self.limit_s} s"
        elif name == "SIGKILL":
            what = "was not read: the system ended the reader, as it does when memory is short"
        else:
            last = words.splitlines()[-1:]
            what = f"ended the process that read it ({': '.join([name, *last])[:200]})"
        return InputError(
            f"{scan} {what}; fetch or export the scan again, or take it out of the input"
        )


def serve() -> None:
    """Answer the requests of stdin on stdout until stdin ends; the whole life of the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(OSError):  # where memory is short, Linux ends this process first
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    requests: queue.Queue[list[Any]] = queue.Queue()

    def listen() -> None:
        with contextlib.suppress(EOFError):
            while True:
                requests.put(_receive(sys.stdin.buffer))
        os._exit(0)  # the parent has ended: nobody waits for the scan that is being read

    threading.Thread(target=listen, daemon=True).start()
    while True:
        _send(answers, _answer(requests.get()))


def _answer(request: list[Any]) -> list[Any]:
    """Return the packed result of a request, or its error and trace, and its text for stderr."""
    value, error, trace = None, None, ""
    with contextlib.redirect_stderr(io.StringIO()) as text:
        try:
            limit_s, function, args = _unpacked(request)
            signal.alarm(limit_s)  # unhandled, it ends the process even within a library
            value = function(*args)
        except Exception as raised:
            error = raised
            if not isinstance(error, InputError):
                trace = traceback.format_exc()
        finally:
            signal.alarm(0)
    try:
        if error is not None:
            pickle.loads(pickle.dumps(error))
        return _packed((value, error, trace, text.getvalue()))
    except Exception as odd:  # an error of another library may not survive this
        error = RuntimeError(f"{type(error or odd).__name__}: {error or odd}")
        return _packed((None, error, trace, text.getvalue()))


class _Pickler(pickle.Pickler):
    """Keeps the voxels of arrays apart, so that they are not copied once more."""

    def reducer_override(self, value: object) -> Any:
        if type(value) is np.ndarray and not value.flags.forc:
            return np.ascontiguousarray(value).__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def _packed(content: object) -> list[Any]:
    """Return an object as bytes: its pickle, then the contents of its arrays."""
    head, arrays = io.BytesIO(), []
    _Pickler(head, pickle.HIGHEST_PROTOCOL, buffer_callback=arrays.append).dump(content)
    return [head.getbuffer(), *[array.raw() for array in arrays]]


def _unpacked(parts: list[Any]) -> Any:
    """Undo `_packed`. Both ends are this program, so that unpickling is safe."""
    return pickle.loads(parts[0], buffers=parts[1:])


def _send(stream: IO[bytes], parts: list[Any]) -> None:
    stream.write(struct.pack(f"{len(parts) + 1}Q", len(parts), *map(len, parts)))
    for part in parts:
        stream.write(part)
    stream.flush()


def _receive(stream: IO[bytes]) -> list[Any]:
    """Return the parts of the next message; raises `EOFError` if the other process has ended."""
    (count,) = struct.unpack("Q", _exactly(stream, 8))
    sizes = struct.unpack(f"{count}Q", _exactly(stream, 8 * count))
    return [_exactly(stream, size) for size in sizes]


def _exactly(stream: IO[bytes], size: int) -> np.ndarray:  # uint8
    part = np.empty(size, np.uint8)
    if stream.readinto(part) < size:
        raise EOFError
    return part
