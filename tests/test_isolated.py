"""Scans are read in a child process: a scan that kills it, or never ends, spares the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import InputError, MissingFileError, warn
from datasets.scans.isolated import IsolatedReader

SCAN = SimpleNamespace(path=Path("/scans/p1.mha"))


def pid_of(scan: object) -> int:
    return os.getpid()


def volume(shape: tuple[int, ...], scan: object) -> dict[str, np.ndarray]:
    values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    return {"as is": values, "turned": values[::-1, :, ::-1].transpose(1, 0, 2)}


def die(number: int, scan: object) -> None:
    os.write(2, b"double free or corruption\n")
    os.kill(os.getpid(), number)


def leave(scan: object) -> None:
    os._exit(3)


def wait(scan: object) -> None:
    time.sleep(60)


def refuse(kind: type[Exception], scan: object) -> None:
    warn("the header says two things")
    raise kind("cut short")


class OddError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def raise_odd(scan: object) -> None:
    raise OddError(1, 2)


def unsendable(scan: object) -> object:
    return lambda: None


def print_much(scan: object) -> int:
    os.write(1, b"noise of a library\n" * 1000)
    print("noise")
    return 7


@pytest.fixture(scope="module")
def reader():
    with IsolatedReader() as reader:
        yield reader


def test_arrays_arrive_equal_and_writable(reader: IsolatedReader):
    shape = (5, 6, 7)
    found = reader.submit(volume, shape, SCAN).result()
    for name, values in volume(shape, SCAN).items():
        assert found[name].dtype == np.int16
        np.testing.assert_array_equal(found[name], values)
        found[name][:] = 0


def test_one_child_reads_all(reader: IsolatedReader):
    pids = {reader.submit(pid_of, SCAN).result() for _ in range(3)}
    assert len(pids) == 1
    assert os.getpid() not in pids


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_scan_that_kills_its_reader_is_named(reader: IsolatedReader, number: signal.Signals):
    before = reader.submit(pid_of, SCAN)
    bad = reader.submit(die, number, SCAN)
    after = reader.submit(pid_of, SCAN)
    with pytest.raises(InputError, match=f"/scans/p1.mha .*{number.name}: double free") as told:
        bad.result()
    assert "\n" not in str(told.value)
    assert before.result() != after.result()


@pytest.mark.parametrize(
    ("function", "words"),
    [((die, signal.SIGKILL), "memory is short"), ((leave,), "exit code 3")],
)
def test_other_ends_of_the_reader_are_told(reader: IsolatedReader, function, words: str):
    with pytest.raises(InputError, match=words):
        reader.submit(*function, SCAN).result()
    assert reader.submit(pid_of, SCAN).result()


def test_a_reader_that_never_returns_is_ended():
    with IsolatedReader(limit_s=1) as reader:
        reader.submit(pid_of, SCAN).result()
        with pytest.raises(InputError, match=r"p1\.mha was not read within 1 s"):
            reader.submit(wait, SCAN).result(30)
        assert reader.submit(pid_of, SCAN).result()


@pytest.mark.parametrize("kind", [InputError, MissingFileError, ValueError])
def test_errors_and_warnings_pass_unchanged(reader: IsolatedReader, kind: type, capsys):
    with pytest.raises(kind) as told:
        reader.submit(refuse, kind, SCAN).result()
    assert (type(told.value), str(told.value)) == (kind, "cut short")
    assert capsys.readouterr().err == "warning: the header says two things\n"
    has_trace = "in refuse" in str(told.value.__cause__)
    assert has_trace == (kind is ValueError)


def test_what_cannot_be_sent_is_an_error_and_no_hang(reader: IsolatedReader):
    with pytest.raises(RuntimeError, match=r"OddError: 1 and 2"):
        reader.submit(raise_odd, SCAN).result(30)
    with pytest.raises(RuntimeError, match=r"pickle|local object"):
        reader.submit(unsendable, SCAN).result(30)


def test_what_libraries_print_is_not_taken_for_an_answer(reader: IsolatedReader):
    assert reader.submit(print_much, SCAN).result(30) == 7


def test_the_context_ends_a_read_in_progress():
    start = time.monotonic()
    with IsolatedReader() as reader:
        reader.submit(pid_of, SCAN).result()
        late = [reader.submit(wait, SCAN) for _ in range(2)]
        pid = reader.child.pid
    assert time.monotonic() - start < 20
    assert all(one.cancelled() or one.exception() for one in late)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_ends_with_its_parent(number: signal.Signals):
    code = (
        "import sys; sys.path[:] = sys.argv[1:]\n"
        "from test_isolated import *\n"
        "with IsolatedReader() as reader:\n"
        "    print(reader.submit(pid_of, SCAN).result(), flush=True)\n"
        "    reader.submit(wait, SCAN).result()\n"
    )
    root = str(Path(__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", code, root, *sys.path], stdout=subprocess.PIPE, text=True
    ) as parent:
        child = Path(f"/proc/{int(parent.stdout.readline())}")
        assert child.exists()
        parent.send_signal(number)
        parent.wait()
    for _ in range(100):
        if not child.exists():
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")
