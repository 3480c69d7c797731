"""Names of cases and classes, lists, tables of cells, and what is printed of any text."""

from __future__ import annotations

import csv
import unicodedata
from pathlib import Path

import pytest

from common.console import printable
from common.errors import InputError, MissingFileError
from common.names import lines_of, safe_label, safe_name, utf8_path, write_table
from datasets.dataset_synapse import read_list

STEERING = ["\n", "\r", "\0", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u2029", "\u202e", "\u2066"]
STEERING += ["\ufeff", "\u200b", "\udcff", "\ud800", "\x9b31m"]
GOOD = [
    "case0001",
    "M\u00fcller",
    "\u60a3\u8005 3",
    "a b",
    "a\u00a0b",
    "x=1",
    "-1",
    "\u0645\u06cc\u200c\u0634",
]


@pytest.mark.parametrize("part", STEERING)
def test_what_steers_a_terminal_is_refused_in_names_and_escaped_in_messages(part: str):
    for name in (f"a{part}b", part):
        shown = printable(name)
        assert shown.isascii() and shown.isprintable()
        for check in (safe_name, safe_label):
            with pytest.raises(InputError) as refused:
                check(name, source="list")
            assert str(refused.value).isprintable()
    for kind in (InputError, MissingFileError):
        assert str(kind(f"no {part}")).isprintable()


def test_printable_leaves_no_character_that_breaks_a_line_or_moves_the_cursor():
    for code in (*range(0x10000), *range(0xE0000, 0xE0200)):
        shown = printable(chr(code), lines=True)
        if shown != chr(code):
            assert shown.isascii() and printable(shown) == shown
        else:
            assert len(shown.splitlines()) == 1 and shown.encode()
            assert (
                shown in "\n\t\u200c\u200d"
                or unicodedata.category(shown)[0] != "C"
                or (unicodedata.category(shown) in ("Cn", "Co"))
            )


@pytest.mark.parametrize("name", GOOD)
def test_names_in_every_script_are_taken(name: str):
    assert safe_name(name, source="list") == safe_label(name, source="list") == printable(name)
    assert name == printable(name) == utf8_path(name)


@pytest.mark.parametrize("name", [" a", "a ", "\u3000a", "a\u00a0", ".a", ".", "a" * 201, None, 3])
def test_names_that_no_list_or_folder_could_hold_are_refused(name: object):
    with pytest.raises(InputError, match="expected a plain"):
        safe_name(name, source="list")


def test_a_list_has_one_name_a_line(tmp_path: Path):
    path = tmp_path / "train.txt"
    path.write_bytes("\ufeffa b\r\n\n  c\t\n\u60a3\u8005".encode())
    assert read_list(path) == ["a b", "c", "\u60a3\u8005"]
    assert lines_of("a\rb") == ["a", "b"]
    for bad in ("a\x85b", "a\u2028b", "a\x0bb", "a\x1cb"):
        path.write_text(f"{bad}\n", encoding="utf-8")
        with pytest.raises(InputError, match="cannot be printed"):
            read_list(path)
    path.write_bytes(b"M\xfcller\n")
    with pytest.raises(InputError, match=r"M\\\\?udcfcller"):
        read_list(path)


@pytest.mark.parametrize("text", ["=cmd()", "+1", "-1", "@a", "\ta", "\uff1da"])
def test_no_text_in_a_table_is_a_formula_and_numbers_stay_numbers(tmp_path: Path, text: str):
    write_table(tmp_path / "table.csv", [("case", text), (-1.5, 3), (None, f"a{text}")])
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        first, second, third = csv.reader(file)
    assert first == ["case", f"'{text}"]
    assert second == ["-1.5", "3"] and third == ["", f"a{text}"]
