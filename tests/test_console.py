"""A terminal of any encoding, closed, full or unread, ends no program, and no text steers it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import NOTES, warn

REPOSITORY = Path(__file__).resolve().parent.parent
# A program that says much and then finishes its work.
PROGRAM = """
import sys
from pathlib import Path
from common.errors import InputError, exit_on_bad_input, warn
with exit_on_bad_input():
    with open(sys.argv[1], "w") as first:  # takes the lowest free number
        for line in range(20000):
            print("said …", line)
        warn("é")
        print("to the terminal …", file=sys.stderr)
        first.write("whole")
    Path(sys.argv[1] + "é").write_text("whole")
"""


def run(
    tmp_path: Path, redirection: str = "", program: str = PROGRAM, **variables: str
) -> subprocess.CompletedProcess:
    """Run a program in a shell; the exit code is the program's, whatever reads its output."""
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    command = f'set -o pipefail; "$PYTHON" {tmp_path}/program.py {tmp_path}/file {redirection}'
    given = {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"} | given | variables,
        timeout=60,
        check=False,
    )


def work_is_done(tmp_path: Path) -> bool:
    """Whether both files are there, with nothing in them that was meant for a terminal."""
    files = [(tmp_path / name).read_text() for name in ("file", "fileé")]
    return files == ["whole", "whole"]


@pytest.mark.parametrize(
    "redirection",
    ["| head -1", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2> /dev/full", "2>&1 | true"],
)
def test_output_that_nobody_reads_changes_neither_work_nor_exit_code(
    redirection: str, tmp_path: Path
):
    done = run(tmp_path, redirection)
    assert done.returncode == 0 and work_is_done(tmp_path)
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr


def test_a_full_disk_under_the_output_is_told_at_the_end_of_the_work(tmp_path: Path):
    done = run(tmp_path, "> /dev/full")
    assert done.returncode == 2 and work_is_done(tmp_path)
    *_, told = done.stderr.decode().splitlines()
    assert told.startswith("error: a part of the output could not be written (No space left")
    little = "from common.errors import exit_on_bad_input\nwith exit_on_bad_input():\n"
    for end in (" print('short')", " print('short'); raise SystemExit(0)"):
        done = run(tmp_path, "> /dev/full", little + end)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    done = run(tmp_path, "> /dev/full", little + " print('short'); raise SystemExit(3)")
    assert done.returncode == 3 and done.stderr == b""


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LANG": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_any_encoding_of_the_terminal_is_written_to(variables: dict[str, str], tmp_path: Path):
    done = run(tmp_path, **variables)
    assert done.returncode == 0 and work_is_done(tmp_path), done.stderr
    assert done.stdout.startswith((b"said \\u2026 0", "said … 0".encode()))


def test_no_text_steers_the_terminal_and_progress_bars_still_move(tmp_path: Path):
    program = """
import sys
from common.errors import InputError, exit_on_bad_input, warn
from tqdm import tqdm
with exit_on_bad_input():
    print("a\\x1b[2J\\r\\u202eb\\x9b\\udcff\\x85c\\td")
    for _ in tqdm(range(2), desc="outer"):
        for _ in tqdm(range(2), desc="inner"):
            pass
    warn("one\\nline\\x1b]0;title\\x07")
    raise InputError("two\\nlines")
"""
    done = run(tmp_path, "", program)
    out, said = done.stdout.decode(), done.stderr.decode()
    assert out == "a\\x1b[2J\\r\\u202eb\\x9b\\xff\\x85c\td\n"
    assert said.count("\r") > 3 and "\x1b" not in said.replace("\x1b[A", "")
    assert "warning: one\\nline\\x1b]0;title\\x07\n" in said
    assert done.returncode == 2 and said.endswith("error: two\\nlines\n")


def test_a_command_line_or_folder_that_is_not_utf_8_is_refused_at_once(tmp_path: Path):
    program = """
import os, sys
from common.arguments import ArgumentParser
os.chdir(sys.argv[1]) if len(sys.argv) > 2 else None
parser = ArgumentParser(prog="x")
parser.add_argument("path", nargs="*")
parser.parse_args()
"""
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/o\xff"))
    strange.mkdir()
    for words in ([strange], [strange, "x"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            capture_output=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            check=False,
        )
        assert done.returncode == 2
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith("error: the name b'") and "is not in UTF-8; rename it" in line
    strange.rmdir()


def test_a_log_line_is_utf_8_and_one_line_of_characters(tmp_path: Path):
    program = """
import logging, sys
from pathlib import Path
from common.errors import exit_on_bad_input
from utils import start_logging
with exit_on_bad_input():
    start_logging(Path(sys.argv[1]))
    for _ in range(2000):
        logging.info("%s\\n%s", "é\\x1b[2J\\udcff", "next …")
"""
    done = run(tmp_path, "| head -1", program, LC_ALL="C", PYTHONUTF8="0")
    assert done.returncode == 0 and done.stderr == b""
    lines = (tmp_path / "file").read_text("utf-8").splitlines()
    assert len(lines) == 4000
    assert lines[0].endswith("] é\\x1b[2J\\xff") and lines[1] == "next …"


@pytest.mark.parametrize("gone", [False, True])
def test_an_error_is_said_also_if_the_folder_of_notes_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], gone: bool
):
    monkeypatch.setenv(NOTES, str(tmp_path / "gone" if gone else tmp_path))
    warn("text")
    warn("text")
    assert capfd.readouterr().err == "warning: text\n" * (2 if gone else 1)
