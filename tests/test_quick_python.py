"""A fork that stands for a new interpreter behaves as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest

REAL = sys.executable
REPOSITORY = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_python")]

# What a program can see of its interpreter.
SEEN = """
import json, logging, multiprocessing, os, signal, sys, threading
ignored = [n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN]
print(json.dumps({
    "argv": sys.argv, "name": __name__, "main": sys.modules["__main__"].__dict__ is globals(),
    "environment": dict(os.environ), "folder": os.getcwd(), "parent": os.getppid(),
    "path": sys.path, "files": sorted(os.listdir("/proc/self/fd"))[:3], "ignored": ignored,
    "handler": str(signal.getsignal(signal.SIGINT)), "umask": os.umask(0),
    "threads": [threading.active_count(), threading.current_thread().name],
    "logging": [len(logging.root.handlers), logging.root.level],
    "process": [multiprocessing.current_process().name, multiprocessing.parent_process() is None],
    "method": multiprocessing.get_start_method(allow_none=True), "input": sys.stdin.read(),
    "streams": [s.encoding + s.errors + str(s.line_buffering)
                for s in (sys.stdin, sys.stdout, sys.stderr)],
}))
"""


def seen(python: str, words: list[str], **options: object) -> dict:
    done = subprocess.run(
        [python, *words], capture_output=True, text=True, input="in", check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("how", ["script", "-c", "-m", "-u"])
def test_a_program_sees_a_new_interpreter(how: str, tmp_path: Path):
    (tmp_path / "seen_here.py").write_text(SEEN)
    script = str(tmp_path / "seen_here.py")
    words = {"-c": ["-c", SEEN], "-m": ["-m", "seen_here"], "-u": ["-u", script]}
    words = [*words.get(how, [script]), "a", "--b"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "A": "ä", "PYTHONPATH": "/nowhere"}
    # As under nohup in the background.
    ignoring = {
        "preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        "env": environment,
        "cwd": tmp_path,
    }
    assert seen(sys.executable, words, **ignoring) == seen(REAL, words, **ignoring)


def test_its_random_numbers_and_threads_are_its_own():
    code = (
        "import random, numpy, torch\nprint(torch.get_num_threads(), random.random(),"
        "numpy.random.rand(), torch.initial_seed())"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "3"}
    first, second = (
        subprocess.check_output([sys.executable, "-c", code], env=environment).split()
        for _ in range(2)
    )
    assert first[0] == second[0] == b"3"
    assert all(one != other for one, other in zip(first[1:], second[1:], strict=True))


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "sys.exit('told')", "1 / 0", "os._exit(300)"])
def test_its_exit_code_and_last_words(end: str):
    code = f"import atexit, os, sys\natexit.register(print, 'at exit')\nprint('said')\n{end}"
    done = [
        subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        for python in (sys.executable, REAL)
    ]
    assert done[0].returncode == done[1].returncode and done[0].stdout == done[1].stdout
    assert done[0].stderr.splitlines()[-1:] == done[1].stderr.splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_its_death_by_a_signal_is_that_of_the_process(number: signal.Signals):
    code = f"import os; os.kill(os.getpid(), {int(number)})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -number


def started(code: str, *, folder: Path, **options: object) -> tuple[subprocess.Popen, int]:
    """Start code that writes its number and then sleeps."""
    note = folder / "note"
    code = (
        f"import os, signal, time, pathlib\n{code}\npathlib.Path({str(note)!r} + '_')."
        f"write_text(str(os.getpid()))\nos.rename({str(note)!r} + '_', {str(note)!r})\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], **options)
    while not note.exists():
        time.sleep(0.01)
    return process, int(note.read_text())


def wait_for_end(process: int) -> None:
    deadline = time.monotonic() + 20
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_signal_to_the_process_reaches_it_and_sigkill_ends_it(tmp_path: Path):
    handler = "signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))"
    process, fork = started(handler, folder=tmp_path)
    assert processes.behind(process.pid) == fork != process.pid
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 75
    (tmp_path / "note").unlink()
    process, fork = started("", folder=tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM
    (tmp_path / "note").unlink()
    process, fork = started("", folder=tmp_path)
    process.kill()
    process.wait()
    wait_for_end(fork)


def test_it_ends_with_its_parent_if_it_asks_to(tmp_path: Path):
    asking = "from distributed.signals import end_with_parent; end_with_parent(os.getppid())"
    inner = (
        f"import os, time\n{asking}\nopen('inner', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )
    outer = (
        f"import subprocess, sys\ninner = subprocess.Popen([sys.executable, '-c', {inner!r}])\n"
        "while not os.path.exists('inner'): time.sleep(0.01)\n"
        f"assert {processes.__name__!r} in sys.modules  # it is a fork"
    )
    process, fork = started(
        outer, folder=tmp_path, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}
    )
    inner_fork = int((tmp_path / "inner").read_text())
    assert processes.children(process.pid) == [inner_fork]
    process.kill()
    process.wait()
    for one in (fork, inner_fork):
        wait_for_end(one)


def test_a_module_of_another_place_is_the_one_that_counts(tmp_path: Path):
    (tmp_path / "torch.py").write_text("word = 'another'")
    (tmp_path / "script.py").write_text("import torch; print(torch.word)")
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "another\n"
