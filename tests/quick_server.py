"""The server of `quick_python.py`: its forks are as new interpreters that have imported much."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import io
import json
import logging
import marshal
import multiprocessing
import os
import runpy
import select
import signal
import site
import socket
import subprocess
import sys
import threading
import traceback
from multiprocessing import resource_tracker
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from distributed import signals

REPOSITORY = Path(__file__).resolve().parent.parent
ADDED = {"", str(REPOSITORY), str(REPOSITORY / "tests")}
# What a new interpreter searches behind its first place and PYTHONPATH. The server's own list has
# more: that of the process that started it, and what packages add when they are imported.
SEARCHED = json.loads(
    subprocess.check_output(
        [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
)
# As of a process that `multiprocessing` did not start: where this is imported, it did not yet.
MAIN = multiprocessing.current_process()
ERRORS = [stream.errors for stream in (sys.__stdin__, sys.__stdout__, sys.__stderr__)]
# Of the server's own files, none has a number as large.
SPARE = 300


def serve(address: str) -> None:
    """Fork for every client until the process that started this one ends."""
    assert threading.active_count() == 1 and not logging.root.handlers
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen(64)
    Path(address + ".new").rename(address)
    ended, note = os.pipe()
    os.set_blocking(note, False)
    signal.set_wakeup_fd(note)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    parent = multiprocessing.parent_process().sentinel
    clients: dict[int, socket.socket] = {}
    gone: set[int] = set()  # forks whose client was killed
    while True:
        waiting = {client: fork for fork, client in clients.items() if fork not in gone}
        ready, _, _ = select.select([listener, ended, parent, *waiting], [], [])
        if parent in ready:
            for fork in clients:
                os.kill(fork, signal.SIGKILL)
            return
        if ended in ready:
            os.read(ended, 4096)
            _tell_ends(clients)
        for client in waiting.keys() & set(ready):
            fork = waiting[client]
            if fork in clients:
                gone.add(fork)
                os.kill(fork, signal.SIGKILL)
        gone &= clients.keys()
        if listener in ready:
            client, _ = listener.accept()
            with contextlib.suppress(ConnectionError):
                fork = _fork(client)
                if fork:
                    clients[fork] = client
                client.sendall(fork.to_bytes(8, "little"))


def _tell_ends(clients: dict[int, socket.socket]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            fork, status = found
            with clients.pop(fork) as client, contextlib.suppress(OSError):
                client.sendall(status.to_bytes(8, "little"))


def _fork(client: socket.socket) -> int:
    """Fork for the request of a client; return the number of the fork, or 0: refused."""
    size, files, _, _ = socket.recv_fds(client, 8, 253)
    try:
        text = b""
        while len(text) < int.from_bytes(size, "little"):
            part = client.recv(1 << 20)
            if not part:
                raise ConnectionResetError
            text += part
        request = marshal.loads(text)
        path = _path_of(request)
        if _hides_modules(path):
            return 0
        fork = os.fork()
        if not fork:
            _end(_run, request, files, path)
        return fork
    finally:
        for number in files:
            os.close(number)


def _path_of(request: dict[str, Any]) -> list[str]:
    """Return what the interpreter would look for modules in, before its own folders."""
    first = request["command"][0]
    environment = request["environment"]
    if first == "-c":
        start = [""]
    elif first == "-m":
        start = [request["folder"]]
    else:
        start = [str(Path(request["folder"], first).resolve().parent)]
    if environment.get("PYTHONSAFEPATH"):
        start = []
    given = environment.get("PYTHONPATH")
    return start + (given.split(os.pathsep) if given else [])


def _hides_modules(path: list[str]) -> bool:
    """Return whether a folder has a module that the server imported from elsewhere."""
    loaded = {name.partition(".")[0] for name in sys.modules}
    for folder in {*path} - ADDED:
        with contextlib.suppress(OSError):
            for entry in os.scandir(folder):
                is_module = entry.name.endswith((".py", ".so")) or os.path.exists(  # noqa: PTH110
                    f"{entry.path}/__init__.py"
                )
                if is_module and entry.name.partition(".")[0] in loaded - {"sitecustomize"}:
                    return True
    return False


def _run(request: dict[str, Any], files: list[int], path: list[str]) -> None:
    """Run the command as a new interpreter would."""
    os.setsid()
    talk, *given = (fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, SPARE) for number in files)
    os.closerange(0, SPARE)
    for number, copy in zip(request["files"], given, strict=True):
        os.dup2(copy, number)
        os.close(copy)
    os.umask(request["umask"])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    _open_streams(unbuffered=request["unbuffered"])
    _stand_for(request["client"], socket.socket(fileno=talk))
    sys.executable = request["shim"]
    sys.orig_argv = [sys.executable, *request["command"]]
    sys.dont_write_bytecode = bool(request["environment"].get("PYTHONDONTWRITEBYTECODE"))
    sys.path[:] = [*path, *SEARCHED]
    importlib.invalidate_caches()
    _forget_multiprocessing()
    np.random.seed()
    torch.seed()
    threads = request["environment"].get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    torch.set_num_threads(int(threads))
    sys.modules.pop("sitecustomize", None)
    site.execsitecustomize()
    first, *rest = request["command"]
    if first == "-m":
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    module = sys.modules["__main__"] = ModuleType("__main__")
    if first == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        code = compile(rest[0], "<string>", "exec")
    else:
        sys.argv[:] = [first, *rest]
        module.__file__ = first
        code = compile(Path(first).read_bytes(), first, "exec")
    exec(code, module.__dict__)


def _open_streams(*, unbuffered: bool) -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            stream = None
        else:
            raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
            if number == 0:
                buffer = io.BufferedReader(raw)
            else:
                buffer = raw if unbuffered else io.BufferedWriter(raw)
            stream = io.TextIOWrapper(
                buffer,
                encoding="utf-8",
                errors=ERRORS[number],
                line_buffering=not unbuffered and (number == 2 or raw.isatty()),
                write_through=unbuffered,
            )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _stand_for(client: int, talk: socket.socket) -> None:
    """Let this process see the client's parent as its own, and end with it where it asks to."""
    this, libc, getppid = os.getpid(), signals.ctypes.CDLL(None), os.getppid

    def parent() -> int:
        if os.getpid() != this:  # a fork of this process has a real parent
            return getppid()
        try:
            return int(Path(f"/proc/{client}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return 0

    def prctl(option: int, number: int) -> int:
        if os.getpid() != this or option != signals.PR_SET_PDEATHSIG:
            return libc.prctl(option, number)
        talk.sendall(bytes([number]))
        talk.recv(1)
        return 0

    os.getppid = parent
    signals.ctypes = SimpleNamespace(CDLL=lambda name: SimpleNamespace(prctl=prctl))


def _forget_multiprocessing() -> None:
    """Forget that `multiprocessing` started the server."""
    process = multiprocessing.process
    MAIN.name = "MainProcess"
    process._current_process, process._parent_process = MAIN, None
    process._children = set()
    resource_tracker._resource_tracker = resource_tracker.ResourceTracker()
    for name in ("ensure_running", "register", "unregister", "getfd"):
        setattr(resource_tracker, name, getattr(resource_tracker._resource_tracker, name))
    multiprocessing.set_start_method(None, force=True)
    multiprocessing.set_executable(sys.executable)


def _end(function: Any, *arguments: Any) -> None:
    """Call a function in a fork and end as an interpreter ends."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) not in (signal.SIG_IGN, signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        function(*arguments)
    except SystemExit as stop:
        code = stop.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except BaseException:
        traceback.print_exc()
        code = 120
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((code or 0) & 0xFF)
