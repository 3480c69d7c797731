"""Names that become paths, lines of lists, labels or cells of tables: one rule for all programs."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.console import printable
from common.errors import InputError
from common.writing import write_text

# Bytes of a name of a case. A file system allows 255, of which an unfinished file needs 22 more,
# and the longest end (`_slice0123.npz`) 14.
LONGEST_NAME = 200
# Bytes of the name of a class, which becomes a part of a file's name.
LONGEST_LABEL = 80
# A cell that begins with one of these is a formula to a spreadsheet.
FORMULA = tuple("=+-@\t\r＝＋－＠")


def safe_name(name: Any, *, source: str | Path, longest: int = LONGEST_NAME) -> str:
    """Return a name that is one plain path component and one line, else refuse it.

    Args:
        name: of a case, slice, run or data set, from a file or a flag.
        source: what holds the name, for the message.
        longest: bytes that the name may have; 255 where no file gets it.

    Raises:
        InputError: it is no text, leaves its folder (`../`, `/`), is hidden (`.a`), begins or ends
            with a blank, is too long, or holds characters that `printable` escapes.
    """
    fault = _fault(name, longest)
    if fault is None and ("/" in name or "\\" in name or name in (".", "..")):
        fault = "leads to another folder"
    if fault is None and name.startswith("."):
        fault = "begins with a dot, like hidden files"
    if fault is not None:
        raise InputError(
            f"{source} names {_shown(name)}, which {fault}; expected a plain case or slice name "
            "without folders; rename it"
        )
    return name


def safe_label(name: Any, *, source: str | Path) -> str:
    """Return the name of a class if it fits into tables, colour files and names of files.

    Raises:
        InputError: it is no text, is empty or too long, begins or ends with a blank, or holds a
            quote or characters that `printable` escapes.
    """
    fault = _fault(name, LONGEST_LABEL)
    if fault is None and '"' in name:
        fault = "holds a quote"
    if fault is not None:
        raise InputError(
            f"{source} has the class name {_shown(name)}, which {fault}; expected "
            f"1…{LONGEST_LABEL} printable characters without quotes and without spaces at the "
            "ends; rename the class"
        )
    return name


def _fault(name: Any, longest: int) -> str | None:
    """Return what is wrong with a name, wherever it goes."""
    if not isinstance(name, str):
        return "is no text"
    if not name:
        return "is empty"
    if printable(name) != name:
        return "holds characters that cannot be printed"
    if name != name.strip():
        return "begins or ends with a blank"
    if len(name.encode()) > longest:
        return f"has {len(name.encode())} bytes, more than {longest}"
    return None


def _shown(name: Any) -> str:
    text = repr(name)
    return text if len(text) <= 90 else f"{text[:85]}…"


def utf8_path(path: str | Path) -> str:
    """Return a path as text, or refuse it if it is not UTF-8, which several libraries end on."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"the name {os.fsencode(path)!r} is not in UTF-8; rename it") from None
    return str(path)


def lines_of(text: str) -> list[str]:
    r"""Return the lines of a list, without blanks at their ends; empty lines are left out.

    Only `\n`, `\r\n` and `\r` end a line. `str.splitlines` also ends lines at characters that a
    name may hold by mistake, and would turn one name into two.
    """
    lines = text.replace("\r", "\n").split("\n")
    return [line.strip(" \t") for line in lines if line.strip(" \t")]


def write_table(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write rows as a CSV file, completely or not at all.

    A text that a spreadsheet would take for a formula gets a `'` before it. Numbers are written as
    they are.
    """
    text = io.StringIO(newline="")
    csv.writer(text).writerows([_cell(cell) for cell in row] for row in rows)
    write_text(path, text.getvalue())


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
