"""Preparing data while processes are killed, files change, records are damaged or room is short."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_ends import end_oddly
from test_preprocess import add_case, files_of, prepare, scan

from common import writing
from common.errors import InputError
from common.locks import only_user
from common.writing import partial_name
from distributed.signals import ended_by_signals
from distributed.workers import Killed, in_processes
from preprocess import convert
from preprocess.records import LOCK_FILE

REPOSITORY = Path(__file__).resolve().parent.parent
FLAGS = ("--test_cases", 1)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for number in (1, 5):
        add_case(tmp_path / "raw", number)
    return tmp_path / "raw"


def contents(output: Path) -> dict[str, bytes]:
    """Every file that training and tests read."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.suffix in (".npz", ".h5", ".txt")
    }


@pytest.mark.slow
def test_a_killed_process_loses_its_own_task_only():
    tasks = [1, -int(signal.SIGKILL), 2, -int(signal.SIGSEGV), 3]
    found = dict(in_processes(end_oddly, tasks, 2))
    assert [found[index] for index in (0, 2, 4)] == [1, 2, 3]
    assert found[1] == Killed(-signal.SIGKILL) and "SIGKILL" in str(found[1])
    assert "SIGSEGV" in str(found[3])


@pytest.mark.slow
def test_an_error_in_a_process_is_raised_with_its_traceback():
    with pytest.raises(RuntimeError, match="sleep length must be non-negative"):
        list(in_processes(time.sleep, [-1.0], 1))


def children_of(session: int) -> list[int]:
    """The processes of a session that are not only waited for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own, *_ = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(own) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


WAITING = """
from time import sleep
from common.errors import exit_on_bad_input
from distributed.signals import ended_by_signals
from distributed.workers import in_processes
if __name__ == "__main__":
    with exit_on_bad_input(), ended_by_signals():
        for index, _ in in_processes(sleep, [0.0, 600.0, 600.0], 2):
            print(index, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
def test_processes_end_with_their_parent(tmp_path: Path, name: str):
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    number = getattr(signal, name)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "0\n"
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert told.split() == ["interrupted"]
    end = time.monotonic() + 5
    while children_of(process.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert children_of(process.pid) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_as_ctrl_c_and_a_second_one_waits(number: signal.Signals):
    before = signal.getsignal(number)
    cleaned = []
    with pytest.raises(KeyboardInterrupt) as stop, ended_by_signals():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)
            cleaned.append(True)
    assert cleaned and stop.value.args == (number,) and signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_keeps_finished_cases_and_leaves_no_unfinished_file(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
):
    output, fsync, calls = tmp_path / "out", os.fsync, []

    def ask(descriptor: int) -> None:
        fsync(descriptor)
        calls.append(descriptor)
        if (output / ".done" / "case0001.json").exists():
            signal.raise_signal(number)

    monkeypatch.setattr(os, "fsync", ask)
    assert prepare(raw, output, *FLAGS) == 128 + number
    monkeypatch.undo()
    left = files_of(output)
    assert ".done/case0001.json" in left and not [name for name in left if "partial" in name]
    assert prepare(raw, output, *FLAGS) == 0
    assert prepare(raw, tmp_path / "whole", *FLAGS) == 0
    assert contents(output) == contents(tmp_path / "whole")


class _Lost:
    """A worker pool whose first process was killed."""

    @staticmethod
    def run(function: Any, tasks: list[Any], workers: int) -> Iterator[tuple[int, Any]]:
        yield 0, Killed(-signal.SIGKILL)
        for index, task in list(enumerate(tasks))[1:]:
            yield index, function(task)


def test_the_case_of_a_killed_worker_is_named(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("preprocess.prepare.in_processes", _Lost.run)
    assert prepare(raw, tmp_path / "out", *FLAGS, "--workers", 2) == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "case0001" in told[0] and "img0001.nii.gz" in told[0]
    assert "SIGKILL" in told[0]
    assert (tmp_path / "out" / ".done" / "case0005.json").exists()


def test_two_programs_never_prepare_one_folder(
    raw: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    assert prepare(raw, output, *FLAGS) == 0
    before = files_of(output)
    child = os.fork()
    if child == 0:  # Locks count between processes.
        with only_user(output / ".done" / LOCK_FILE, taken="taken"):
            time.sleep(60)
    try:
        time.sleep(0.2)
        assert prepare(raw, output, *FLAGS, "--overwrite") == 2
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert "another process is preparing" in capfd.readouterr().err
    assert files_of(output) == before
    assert prepare(raw, output, *FLAGS) == 0


def test_unfinished_files_of_dead_processes_go_and_others_stay(raw: Path, tmp_path: Path):
    output = tmp_path / "out"
    assert prepare(raw, output, *FLAGS) == 0
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)

    def of_process(number: int, path: Path) -> Path:
        return path.with_name(partial_name(path).name.replace(str(os.getpid()), str(number), 1))

    gone = [
        of_process(int(dead.stdout), output / folder / name)
        for folder, name in (
            ("train_npz", "other_slice000.npz"),
            ("test_vol_h5", "other.npy.h5"),
            (".done", "other.json"),
            ("lists", "train.txt"),
            (".", "preprocess.json"),
        )
    ]
    stays = of_process(os.getppid(), output / "train_npz" / "other_slice000.npz")
    for path in (*gone, stays):
        path.touch()
    assert prepare(raw, output, *FLAGS) == 0
    assert stays.exists() and not [path for path in gone if path.exists()]


DAMAGE = {
    "text": lambda record: "x",
    "list": lambda record: [record],
    "no result": lambda record: {**record, "result": None},
    "slices": lambda record: {**record, "result": record["result"] | {"slices": "4"}},
    "huge": lambda record: {**record, "result": record["result"] | {"slices": 10**15}},
    "voxels": lambda record: {**record, "result": record["result"] | {"voxels": 7}},
    "case": lambda record: {**record, "result": record["result"] | {"case": "../../x"}},
    "roles": lambda record: {**record, "result": record["result"] | {"roles": [["train"]]}},
}


@pytest.mark.parametrize("name", [*DAMAGE, "cut", "number", "deep", "empty"])
def test_a_damaged_record_is_made_again(raw: Path, tmp_path: Path, name: str):
    output = tmp_path / "out"
    assert prepare(raw, output, *FLAGS) == 0
    before, path = contents(output), output / ".done" / "case0005.json"
    text = path.read_text()
    raw_texts = {"cut": text[: len(text) // 2], "deep": "[" * 10**5, "empty": ""}
    raw_texts["number"] = text.replace('"slices": 4', f'"slices": {"9" * 5000}')
    damaged = raw_texts[name] if name in raw_texts else json.dumps(DAMAGE[name](json.loads(text)))
    path.write_text(damaged)
    assert prepare(raw, output, *FLAGS) == 0
    assert contents(output) == before and path.read_text() != damaged
    assert json.loads(path.read_text())["result"] == json.loads(text)["result"]


def test_an_output_that_was_cut_short_is_made_again(raw: Path, tmp_path: Path):
    output = tmp_path / "out"
    assert prepare(raw, output) == 0
    before = contents(output)
    cut = next((output / "train_npz").iterdir())
    cut.write_bytes(cut.read_bytes()[:50])
    assert prepare(raw, output) == 0
    assert contents(output) == before


def test_a_scan_replaced_while_it_is_read_is_not_recorded(
    raw: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    output, read = tmp_path / "out", convert.read_label

    def replacing(label: Any, threshold: float | None) -> Any:
        values = read(label, threshold)
        if "0005" in label.name:
            add_case(raw, 5, scan(6)[0])
        return values

    monkeypatch.setattr(convert, "read_label", replacing)
    assert prepare(raw, output, *FLAGS) == 2
    told = capfd.readouterr().err
    assert "img0005.nii.gz or " in told and "changed while it was read" in told
    left = files_of(output)
    assert ".done/case0001.json" in left and not [name for name in left if "0005" in name]
    monkeypatch.undo()
    assert prepare(raw, output, *FLAGS) == 0
    assert prepare(raw, tmp_path / "whole", *FLAGS) == 0
    assert contents(output) == contents(tmp_path / "whole")


def test_an_edit_that_keeps_size_and_time_is_seen(raw: Path, tmp_path: Path):
    output = tmp_path / "out"
    label = add_case(raw, 5)[1]
    assert prepare(raw, output, *FLAGS) == 0
    before, times = contents(output), label.stat()
    values = scan(5)[1]
    for change in range(1, 50):  # until the compressed sizes are equal
        values.flat[change] = (values.flat[change] + 1) % 5
        add_case(raw, 5, label=values)
        if label.stat().st_size == times.st_size:
            break
    else:
        pytest.skip("no edit has the same compressed size")
    os.utime(label, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert prepare(raw, output, *FLAGS) == 0
    assert contents(output) != before


@pytest.mark.parametrize("years", [-50, 0, 100, 400])
def test_other_times_of_equal_files_convert_nothing_again(raw: Path, tmp_path: Path, years: int):
    """Copying the raw data to another disk or a wrong clock costs no conversion."""
    output = tmp_path / "out"
    assert prepare(raw, output, *FLAGS) == 0
    before = files_of(output / "train_npz")
    for path in raw.rglob("*.nii.gz"):
        moment = int((time.time() + years * 365.25 * 86400) * 1e9) if years != 400 else 2**63 - 1
        os.utime(path, ns=(moment, moment))
    for _ in range(2):
        assert prepare(raw, output, *FLAGS) == 0
        assert files_of(output / "train_npz") == before


@pytest.mark.parametrize("folder", ["train_npz", "test_vol_h5", ".done"])
def test_output_that_is_deleted_meanwhile_is_missed(
    raw: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    folder: str,
):
    output = tmp_path / "out"

    def deleting(problems: list[str], total: int, consequence: str) -> None:
        if "lists" in consequence:
            for path in (output / folder).iterdir():
                path.unlink()

    monkeypatch.setattr("preprocess.prepare._stop_on", deleting)
    assert prepare(raw, output, *FLAGS) == 2
    assert "was written but is gone" in capfd.readouterr().err
    assert not (output / "lists" / "train.txt").exists()
    monkeypatch.undo()
    assert prepare(raw, output, *FLAGS) == 0
    assert prepare(raw, tmp_path / "whole", *FLAGS) == 0
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.parametrize("limit", [1000, 1500, 4000])
def test_a_full_disk_is_told_and_the_next_run_completes(
    raw: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    limit: int,
):
    """A bound on the size of files stands for a full disk: writing fails in the middle."""
    output = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code = prepare(raw, output, *FLAGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = capfd.readouterr().err
    assert code == 2 and told.count("error: cannot write") == told.count("error: ") == 1
    assert "Traceback" not in told
    assert not [name for name in files_of(output) if "partial" in name]
    assert prepare(raw, output, *FLAGS) == 0
    assert prepare(raw, tmp_path / "whole", *FLAGS) == 0
    assert contents(output) == contents(tmp_path / "whole")


def test_bytes_that_a_disk_returns_otherwise_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(writing, "BLOCK", 4)
    writing.write_bytes(tmp_path / "a", memoryview(b"123456789"))
    assert (tmp_path / "a").read_bytes() == b"123456789"
    opened = Path.open

    def dropping(path: Path, mode: str = "r", **how: Any) -> Any:
        if mode == "rb":
            os.truncate(path, 6)
        return opened(path, mode, **how)

    monkeypatch.setattr(Path, "open", dropping)
    with pytest.raises(InputError, match="reads back different"):
        writing.write_bytes(tmp_path / "a", memoryview(b"other bytes"))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"123456789"


@pytest.mark.parametrize(("size", "told"), [(10**6, "1…16,384"), (8192, "GiB of memory")])
def test_a_size_that_exhausts_memory_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], size: int, told: str
):
    image, label = (np.repeat(array, 5, axis=0) for array in scan(5))
    add_case(tmp_path / "raw", 5, image, label)
    flags = ("--train_cases", 5, "--test_cases", 5, "--size", size)
    assert prepare(tmp_path / "raw", tmp_path / "out", *flags) == 2
    assert told in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_records_come_after_their_files_and_lists_last(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of every renamed file, its own name and folder are flushed before the next is written."""
    output, replace, order = tmp_path / "out", Path.replace, []

    def noted(path: Path, target: Path) -> Path:
        order.append(str(target.relative_to(output)))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", noted)
    assert prepare(raw, output, *FLAGS) == 0
    assert order[-4:] == [
        "preprocess.json",
        "dataset_spec.json",
        "lists/train.txt",
        "lists/test_vol.txt",
    ]
    records = [index for index, name in enumerate(order) if ".done" in name]
    for record in records:
        case = Path(order[record]).stem
        own = [index for index, name in enumerate(order) if case in name and ".done" not in name]
        assert own and max(own) < record


def test_a_table_of_groups_that_never_closes_its_quotes(
    raw: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    table = tmp_path / "groups.csv"
    table.write_text('file,group\n"' + "a" * 200_000)
    assert prepare(raw, tmp_path / "out", "--group", table) == 2
    told = capfd.readouterr().err
    assert f"{table} is not a CSV table" in told and "Traceback" not in told


@pytest.mark.parametrize("name", ["lists/train.txt", "dataset_spec.json", "preprocess.json"])
def test_a_list_that_the_user_edited_is_kept(
    raw: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
):
    output = tmp_path / "out"
    assert prepare(raw, output, *FLAGS) == 0
    assert prepare(raw, output, *FLAGS) == 0
    before = (output / name).read_text()
    (output / name).write_text(f"{before}\n")
    (raw / "Training" / "img" / "img0001.nii.gz").touch()
    capfd.readouterr()
    assert prepare(raw, output, *FLAGS) == 2
    assert f"holds {name}, which" in capfd.readouterr().err
    assert (output / name).read_text() == f"{before}\n"
    assert prepare(raw, output, *FLAGS, "--overwrite") == 0
    assert (output / name).read_text() != f"{before}\n"


def test_a_list_of_another_program_is_kept_and_one_of_an_earlier_version_replaced(
    raw: Path, tmp_path: Path
):
    output = tmp_path / "out"
    (output / "lists").mkdir(parents=True)
    (output / "lists" / "train.txt").write_text("mine\n")
    assert prepare(raw, output, *FLAGS) == 2
    assert (output / "lists" / "train.txt").read_text() == "mine\n"
    assert [path.name for path in output.iterdir()] == ["lists"]
    (output / ".done").mkdir()
    assert prepare(raw, output, *FLAGS) == 0
    assert (output / "lists" / "train.txt").read_text() != "mine\n"
