"""What programs say: characters that a terminal may get, and output that never ends a program.

A terminal may be of any encoding, closed, full, or a pipe whose reader is gone; and names from
files may hold characters that steer a terminal. Neither may end or falsify a run.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import unicodedata
from typing import Any

# Joiners inside words of Persian and of Indian languages, and inside emoji.
JOINERS = "\u200c\u200d"
# Unicode's categories of control characters, of marks without a form of their own, of halves of
# characters, and of breaks of lines and paragraphs.
STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")
# What moves a progress bar: to the start of its line, or up by lines.
MOVES = re.compile(r"\r|(?:\x1b\[A)+\Z")
# Nobody reads any more: the reader of a pipe has ended, or the terminal is closed.
UNREAD = (errno.EPIPE, errno.EIO)


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return a text with every character escaped that steers a terminal or is no character.

    These are control characters, all line breaks, marks that change the direction of writing, and
    bytes of names that are not UTF-8: `\x1b`, `\u2028`, `\xff`.

    Args:
        lines: keep ordinary line breaks and tabs.
    """
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(c if c in kept or _is_shown(c) else _escaped(c) for c in text)


def _is_shown(character: str) -> bool:
    return character in JOINERS or unicodedata.category(character) not in STEERING


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


class Terminal:
    """Standard output or standard error, safe to write to.

    Characters that steer the terminal, or that its encoding lacks, are escaped. When a write fails,
    all later ones go nowhere, and the program goes on: its work does not depend on a reader.

    Args:
        stream: the stream of the interpreter.
    """

    def __init__(self, stream: Any) -> None:
        stream.reconfigure(errors="backslashreplace")
        self._stream = stream
        self.failure: OSError | None = None  # why what was written is lost, but for lack of readers

    def write(self, text: str) -> int:
        """Write a text; return its length."""
        move = match[0] if (match := MOVES.match(text)) else ""
        try:
            self._stream.write(move + printable(text[len(move) :], lines=True))
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Write what waits in memory."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if error.errno not in UNREAD:
            self.failure = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # also what still waits in memory goes there
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare_console() -> None:
    """Make standard output and error safe to write to; a second call does nothing.

    Where names of files are not UTF-8 (as with LC_ALL=C and PYTHONUTF8=0), the program starts again
    with names in UTF-8: other programs write them so, and the libraries expect it.
    """
    if isinstance(sys.stdout, Terminal) or not _is_interpreters(sys.stdout, sys.stderr):
        return  # a test, or another program, reads what is written
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ.setdefault("PYTHONIOENCODING", getattr(sys.stdout, "encoding", "ascii"))
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    os.environ["PYTHON_COLORS"] = "0"  # Python 3.13 colours tracebacks with escapes
    # A file opened later must not become number 1 or 2, which libraries write messages to.
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(free, True)
    os.close(free)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        setattr(sys, name, Terminal(stream))


def output_failure() -> OSError | None:
    """Return why a part of standard output is lost, e.g. a full disk; None: nothing is."""
    if not isinstance(sys.stdout, Terminal):
        return None
    sys.stdout.flush()
    return sys.stdout.failure


def _is_interpreters(*streams: Any) -> bool:
    return streams == (sys.__stdout__, sys.__stderr__)
