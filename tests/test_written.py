"""Files of an output folder are known by their content, and no other is replaced."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.errors import InputError
from common.files import sha256_of
from common.writing import write_text
from common.written import JOURNAL, Written


def write(folder: Path, **texts: str) -> None:
    """Write files, from another thread as the writers of test.py do."""
    written = Written(folder)
    with written.noting(), ThreadPoolExecutor(1) as pool:
        list(pool.map(lambda item: write_text(folder / item[0], item[1]), texts.items()))


def test_own_files_may_be_replaced_and_others_not(tmp_path: Path):
    write(tmp_path, a="one", b="two")
    Written(tmp_path).refuse_foreign(["a", "b", "absent"], flag="--output")
    (tmp_path / "b").write_text("corrected by hand")
    (tmp_path / "c").write_text("of the user")
    (tmp_path / "d").symlink_to("nowhere")
    (tmp_path / "e").mkdir()
    assert Written(tmp_path).foreign("abcdef") == ["b", "c", "d", "e"]
    with pytest.raises(InputError, match=r"--output .* holds b, c, which .* --overwrite"):
        Written(tmp_path).refuse_foreign("abc", flag="--output")


def test_a_file_is_known_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run killed at the renaming leaves the older file or the new one, and knows both."""
    write(tmp_path, a="one")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", killed)
        write(tmp_path, a="two")
    assert Written(tmp_path).wrote("a")
    (tmp_path / "a").write_text("two")
    assert Written(tmp_path).wrote("a")


def test_files_outside_the_folder_and_after_the_run_are_not_noted(tmp_path: Path):
    written = Written(tmp_path / "in")
    with written.noting():
        write_text(tmp_path / "out", "text")
    write_text(tmp_path / "in" / "late", "text")
    assert not (tmp_path / "in" / JOURNAL).exists() and not written.wrote("late")


def test_a_damaged_journal_makes_files_foreign_and_is_continued(tmp_path: Path):
    write(tmp_path, a="one")
    journal = tmp_path / JOURNAL
    journal.write_bytes(b'\xff\xfe\n[1]\n{"a": 1}\n[[],{}]\n123\n' + journal.read_bytes()[:-9])
    assert Written(tmp_path).foreign("a") == ["a"]
    write(tmp_path, b="two")
    assert Written(tmp_path).foreign("ab") == ["a"]


def test_a_journal_names_no_file_outside_its_folder(tmp_path: Path):
    """The programs delete files of an earlier run that are as its journal says."""
    outside = tmp_path / "outside"
    outside.write_text("text")
    digest = sha256_of(outside)
    (tmp_path / "in" / "slices").mkdir(parents=True)
    names = ["slices/../../outside", "../outside", str(outside)]
    lines = [json.dumps([name, digest]) for name in names]
    (tmp_path / "in" / JOURNAL).write_text("\n".join(lines))
    assert not any(Written(tmp_path / "in").wrote(name) for name in names)
