"""Many scans: processes that share them, parts, scans that end their process, tables of scans."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from test_predict import SPEC, Bands, make_adapter, marked, run
from test_predict_again import write_scans
from test_scans import placed, write_dicom

import predict
from common.arguments import share_of
from common.errors import EXIT_SOME_FAILED, InputError
from common.locks import Locks
from datasets.scans.manifest import is_manifest, listed_scans
from datasets.scans.volumes import write_volume
from distributed.launch import launch
from distributed.ranks import EXIT_LOST_RANK
from prediction import segmenting
from prediction.claims import attempts_path, failure_path

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_adapter(tmp_path, SPEC, monkeypatch)


def segment_here(
    source: str, output: str, adapter: str, flags: list[str], fatal: str, pause: float
) -> None:
    """Segment with a stand-in for the network, and note each scan; one kills the process."""
    torch.set_num_threads(1)
    predict.build_model = lambda args, device: (Bands(), 16)
    predict.pack_encoder = lambda model: None
    segment = segmenting.segment

    def watched(args: Any, spec: Any, model: Any, case: Any, progress: Any) -> Any:
        with Path(f"{output}.begun").open("a") as file:
            file.write(f"{case.scan.name} {os.getpid()}\n")
        time.sleep(pause)
        if case.scan.name == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return segment(args, spec, model, case, progress)

    segmenting.segment = watched
    os._exit(run(Path(source), Path(output), Path(adapter), *flags))


def start(
    source: Path, output: Path, adapter: Path, *flags: str, fatal: str = "", pause: float = 0
) -> BaseProcess:
    arguments = (str(source), str(output), str(adapter), list(flags), fatal, pause)
    process = processes.CONTEXT.Process(target=segment_here, args=arguments)
    process.start()
    return process


def ended(*started: BaseProcess) -> list[int | None]:
    for process in started:
        process.join(timeout=120)
    return [process.exitcode for process in started]


def begun(output: Path) -> list[str]:
    """The scans in the order in which processes began to segment them."""
    return [line.split()[0] for line in Path(f"{output}.begun").read_text().splitlines()]


def listed(output: Path) -> tuple[list[str], dict[str, str]]:
    """The cases of `predictions.json` and what failed."""
    content = json.loads((output / "predictions.json").read_text())
    return [case["case"] for case in content["cases"]], content["failed"]


def labels_of(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.nii.gz")}


def attempts(output: Path) -> dict[str, int]:
    """The lines of attempts that were left, by scan."""
    paths = (output / ".done").glob("*.attempts")
    return {path.stem: len(path.read_text().splitlines()) for path in paths}


def hold(path: str, name: str) -> None:
    """Take a lock and live on."""
    locks = Locks(Path(path))
    assert locks.take(name)
    Path(f"{path}.{name}").touch()
    time.sleep(600)


def test_a_lock_ends_with_its_process_and_holds_for_one_name(tmp_path: Path):
    path = tmp_path / "lock"
    other = processes.CONTEXT.Process(target=hold, args=(str(path), "a"))
    other.start()
    while not Path(f"{path}.a").exists():
        time.sleep(0.01)
    locks = Locks(path)
    assert locks.take("b") and not locks.take("a")
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert locks.take("a")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_are_a_partition(count: int):
    items = list(range(11))
    parts = [share_of(items, f"{number}/{count}") for number in range(1, count + 1)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= (11 % count > 0)
    assert parts[0] == items[::count] and share_of(items, None) == items


@pytest.mark.slow
def test_calls_into_one_folder_share_the_scans(tmp_path: Path, adapter: Path):
    scans, out = write_scans(tmp_path / "in", "abcdefgh"), tmp_path / "out"
    assert run(scans, tmp_path / "whole", adapter) == 0
    calls = [start(scans, out, adapter, pause=0.3) for _ in range(3)]
    assert ended(*calls) == [0, 0, 0]
    assert sorted(begun(out)) == list("abcdefgh")  # none twice
    assert len({line.split()[1] for line in Path(f"{out}.begun").read_text().splitlines()}) > 1
    assert listed(out) == (list("abcdefgh"), {}) and not attempts(out)
    assert labels_of(out) == labels_of(tmp_path / "whole")
    assert (out / "volumes.csv").read_bytes() == (tmp_path / "whole/volumes.csv").read_bytes()


@pytest.mark.slow
def test_the_scan_of_a_killed_call_is_done_by_the_other(tmp_path: Path, adapter: Path):
    scans, out = write_scans(tmp_path / "in", "abcdef"), tmp_path / "out"
    first = start(scans, out, adapter, fatal="a", pause=0.5)
    second = start(scans, out, adapter, pause=0.5)
    codes = ended(first, second)
    assert codes[1] == 0 and listed(out) == (list("abcdef"), {}) and not attempts(out)
    if codes[0]:  # the second may have got `a` first
        assert codes[0] == -signal.SIGKILL and begun(out).count("a") == 2


@pytest.mark.slow
def test_parts_write_one_table_and_failures_of_others_stay(
    tmp_path: Path, adapter: Path, capfd: Capture
):
    scans, out = write_scans(tmp_path / "in", "abcdef"), tmp_path / "out"
    (scans / "b.nii.gz").write_bytes(b"junk")
    assert run(scans, tmp_path / "whole", adapter) == EXIT_SOME_FAILED
    assert run(scans, out, adapter, "--part", "2/3") == EXIT_SOME_FAILED  # b, e
    capfd.readouterr()
    assert run(scans, out, adapter, "--part", "1/3") == 0  # a, d
    told = capfd.readouterr()
    assert "part 1/3 of 6 scans: 2 scans" in told.out and "error" not in told.err
    assert "2 of 6 scans of the input are left to other parts: c, f" in told.out
    assert listed(out)[0] == list("ade") and list(listed(out)[1]) == ["b"]
    calls = [start(scans, out, adapter, "--part", f"{part}/3") for part in (1, 2, 3)]
    assert ended(*calls) == [0, EXIT_SOME_FAILED, 0]
    assert listed(out) == listed(tmp_path / "whole") and listed(out)[0] == list("acdef")
    assert (out / "volumes.csv").read_bytes() == (tmp_path / "whole/volumes.csv").read_bytes()
    write_scans(scans, "b")
    assert run(scans, out, adapter, "--part", "2/3") == 0
    assert listed(out) == (list("abcdef"), {}) and not failure_path(out, "b").exists()


@pytest.mark.slow
def test_a_scan_that_ends_its_process_twice_is_marked(
    tmp_path: Path, adapter: Path, capfd: Capture
):
    """The others are done, also those that were in work beside it; no later call tries it."""
    scans, out = write_scans(tmp_path / "in", "abcdef"), tmp_path / "out"
    for deaths in (1, 2):
        assert ended(start(scans, out, adapter, fatal="c")) == [-signal.SIGKILL]
        assert attempts(out)["c"] == deaths
    # d, which was read when c died first, was not tried again yet; c came after those in no doubt.
    assert begun(out)[-1] == "c" and attempts(out) == {"c": 2, "d": 1}
    assert sorted(path.stem for path in (out / ".done").glob("*.json")) == list("abef")
    for _ in range(2):
        capfd.readouterr()
        assert run(scans, out, adapter) == EXIT_SOME_FAILED
        told = capfd.readouterr().err
        assert "error: c: it ended the process that segmented it on 20" in told
        assert "--retry tries again" in told and "Traceback" not in told
        cases, failed = listed(out)
        assert cases == list("abdef") and list(failed) == ["c"]
    # A call that retries gives it two processes again, and a good end clears it.
    assert ended(start(scans, out, adapter, "--retry", fatal="c")) == [-signal.SIGKILL]
    assert run(scans, out, adapter) == EXIT_SOME_FAILED
    assert run(scans, out, adapter, "--retry") == 0
    assert listed(out) == (list("abcdef"), {}) and not attempts(out)
    assert run(scans, out, adapter, "--overwrite") == 0


@pytest.mark.slow
def test_a_scan_that_was_replaced_is_not_marked(tmp_path: Path, adapter: Path):
    scans, out = write_scans(tmp_path / "in", "ab"), tmp_path / "out"
    for _ in range(2):
        assert ended(start(scans, out, adapter, fatal="b")) == [-signal.SIGKILL]
    write_volume(scans / "b.nii.gz", marked((5, 20, 20))[0], placed("LPS"))
    assert run(scans, out, adapter) == 0 and not attempts(out)


@pytest.mark.slow
def test_a_marked_scan_keeps_no_result_of_other_settings(tmp_path: Path, adapter: Path):
    scans, out = write_scans(tmp_path / "in", "ab"), tmp_path / "out"
    assert run(scans, out, adapter) == 0
    for _ in range(2):
        flags = ("--flips", "rows")
        assert ended(start(scans, out, adapter, *flags, fatal="b")) == [-signal.SIGKILL]
    assert run(scans, out, adapter, "--flips", "rows") == EXIT_SOME_FAILED
    assert set(labels_of(out)) == {"a.nii.gz"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_call_that_is_asked_to_stop_marks_nothing(
    tmp_path: Path, adapter: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
):
    scans, out = write_scans(tmp_path / "in", "abcd"), tmp_path / "out"
    attempts_path(out, "c").parent.mkdir(parents=True)
    before, segment, seen = "0 2026-01-01 00:00\n", segmenting.segment, []
    attempts_path(out, "c").write_text(before)  # of a scan that was replaced since

    def stopped(args: Any, spec: Any, model: Any, case: Any, progress: Any) -> Any:
        if case.scan.name == "b":
            seen.append(attempts(out))
            raise KeyboardInterrupt(number)
        return segment(args, spec, model, case, progress)

    monkeypatch.setattr(segmenting, "segment", stopped)
    assert run(scans, out, adapter) == 128 + number
    assert seen[0].keys() >= {"b", "c"} and seen[0]["c"] == 2
    assert attempts(out) == {"c": 1} and attempts_path(out, "c").read_text() == before


def test_a_folder_that_cannot_be_locked(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
):
    def refused(*args: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refused)
    scans, out = write_scans(tmp_path / "in", "ab"), tmp_path / "out"
    assert run(scans, out, adapter) == 0
    assert "cannot be locked (Function not implemented); start no second" in capfd.readouterr().err
    assert set(labels_of(out)) == {"a.nii.gz", "b.nii.gz"}


@pytest.mark.parametrize(("dead", "code"), [(1, 0), (0, EXIT_LOST_RANK)])
def test_ranks_go_on_without_one_that_was_killed(
    tmp_path: Path, dead: int, code: int, capfd: Capture
):
    (tmp_path / "work.py").write_text(
        "import os, signal, sys, time\n"
        f"if os.environ['RANK'] == '{dead}': os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(0.5)\nopen(sys.argv[1] + os.environ['RANK'], 'w').close()\n"
    )
    words = [str(tmp_path / "done")]
    assert launch(str(tmp_path / "work.py"), words, 3, go_on=True) == code
    assert len(list(tmp_path.glob("done*"))) == 2
    assert f"rank {dead} of 3 was killed by signal 9" in capfd.readouterr().err


TABLES = {
    "commas": b"path,case\nin/a.nii.gz,first\nin/s,\n",
    "Excel in Europe": b'\xef\xbb\xbfPath;Case\r\n"in/a.nii.gz";first\r\n;\r\nin/s;\r\n',
    "tabs, other order": b"case\tage\tpath\nfirst\t50\tin/a.nii.gz\n\t60\tin/s\n",
    "absolute": b"path,case\n%s/in/a.nii.gz,first\n%s/in/s,\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_scans(tmp_path: Path, name: str, capfd: Capture):
    write_scans(tmp_path / "in", "a")
    write_dicom(tmp_path / "in" / "s", marked((4, 20, 20))[0], placed("LPS"))
    text = TABLES[name].replace(b"%s", os.fsencode(tmp_path))
    (tmp_path / "cases.csv").write_bytes(text)
    scans = listed_scans(tmp_path / "cases.csv", keep_names=True)
    assert [(scan.name, scan.path.name) for scan in scans] == [("first", "a.nii.gz"), ("s", "s")]
    assert ("columns that are not used: age" in capfd.readouterr().err) == (b"age" in text)


@pytest.mark.slow
def test_the_scans_of_a_table_are_segmented(tmp_path: Path, adapter: Path):
    for folder in ("x", "y"):
        write_scans(tmp_path / "in" / folder, "s")
    table = tmp_path / "in" / "cases.csv"
    table.write_text("path,case\nx/s.nii.gz,p1\ny/s.nii.gz,p2\n")
    assert run(table, tmp_path / "out", adapter) == 0
    assert set(labels_of(tmp_path / "out")) == {"p1.nii.gz", "p2.nii.gz"}
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [case["input"] for case in content["cases"]] == ["x/s.nii.gz", "y/s.nii.gz"]
    # A name that now means another scan is segmented again.
    write_volume(tmp_path / "in/z/s.nii.gz", marked((6, 20, 20))[0], placed("LPS"))
    table.write_text("path,case\nz/s.nii.gz,p1\ny/s.nii.gz,p2\n")
    before = labels_of(tmp_path / "out")
    assert run(table, tmp_path / "out", adapter) == 0
    after = labels_of(tmp_path / "out")
    assert after["p1.nii.gz"] != before["p1.nii.gz"] and after["p2.nii.gz"] == before["p2.nii.gz"]


WRONG = {
    "absent": (None, "cases.csv does not exist; pass another by --input"),
    "not UTF-8": ("path\nä.nii.gz\n".encode("latin-1"), "not in UTF-8"),
    "empty": (b"", "has no text, expected 'path'"),
    "no row": (b"path\n\n", "lists no scan"),
    "no path": (b"path,case\n,a\n", "no path in line 2"),
    "listed twice": (b"path,case\na.nii.gz,a\n./a.nii.gz,b\n", "in line 2 and line 3"),
    "a folder": (b"path\nempty\n", "a folder without DICOM slices"),
    "one name": (b"path\na.nii.gz\na.nrrd\n", "a name of its own in the column 'case'"),
    "a text": (b"path\nnote.txt\n", "no scan or picture by its suffix"),
    "a column twice": (b"path,path\na.nii.gz,a\n", "'path' more than once"),
    "a segmentation": (b"path\nlabel.seg.nrrd\n", "line 2, which is a segmentation of 3D Slicer"),
    "a path too long": (b"path\n" + b"a" * 300 + b"\n", "a" * 300),
    "a channel": (b"path,channel\na.nii.gz,1\n", "pass --channel"),
    "an open quote": (b'path\n"a.nii.gz\n', "no CSV table"),
    "more cells": (b"path,case\na,b.nii.gz,c\n", "has 3 cells in line 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_table_is_refused(tmp_path: Path, name: str):
    write_scans(tmp_path, "a")
    (tmp_path / "empty").mkdir()
    [(tmp_path / other).touch() for other in ("note.txt", "label.seg.nrrd", "a.nrrd")]
    text, told = WRONG[name]
    assert is_manifest(tmp_path / "cases.csv")
    if text is not None:
        (tmp_path / "cases.csv").write_bytes(text)
    with pytest.raises(InputError) as raised:
        listed_scans(tmp_path / "cases.csv", keep_names=True)
    assert told in str(raised.value)
    assert name == "a path too long" or "cases.csv" in str(raised.value)


def test_every_missing_path_is_counted(tmp_path: Path):
    (tmp_path / "cases.csv").write_text("path\n" + "".join(f"{n}.mha\n" for n in range(9)))
    told = r"9 of 9 paths that do not exist: 0\.mha \(line 2\), .* and 4 more"
    with pytest.raises(InputError, match=told):
        listed_scans(tmp_path / "cases.csv", keep_names=True)
