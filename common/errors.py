"""Errors of the user's input: a sentence and an exit code; warnings."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.console import output_failure, prepare_console, printable

EXIT_BAD_INPUT = 2
# Some scans or runs failed, and all others are done.
EXIT_SOME_FAILED = 3
# The code that shells report for Ctrl-C.
EXIT_KEYBOARD = 130
# Environment variable: a folder that the processes of one launch share, for messages and markers.
NOTES = "SAMED_NOTES"
# End of the names of notes about warnings, which do not explain why a process ended.
WARNING = ".warning"
# The path cannot hold such a file or folder.
NO_PLACE = {errno.EISDIR, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENOTEMPTY}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_ALLOWED = {errno.EROFS, errno.EACCES, errno.EPERM}
# The folder was deleted meanwhile, or its disk or file server does not answer.
GONE = {
    errno.ENOENT,
    errno.EIO,
    errno.ESTALE,
    errno.ENODEV,
    errno.ENXIO,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.EHOSTDOWN,
    getattr(errno, "EREMOTEIO", errno.EIO),
    errno.ETIMEDOUT,
}
# What PyTorch says of an operator that deterministic mode refuses.
NOT_REPEATABLE = "does not have a deterministic implementation"
NOT_WRITABLE = NO_PLACE | FULL | NOT_ALLOWED | GONE

# Packages of requirements.txt that only some input or flags need; a function that needs one imports
# it, so that a machine without it trains on prepared slices and tests prepared volumes.
OPTIONAL = ("SimpleITK", "nibabel", "tensorboardX", "medpy", "icecream")


class InputError(ValueError):
    """The user's input is wrong; the message says what, where, what was expected, what to do.

    The message is one line, whatever names it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder that the user named does not exist."""


@contextlib.contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Run a program: an `InputError` is one line on stderr and exit code 2; a bug has a traceback.

    A file that the operating system refuses to read or write counts as wrong input too, and so do a
    full disk under standard output and an operator that deterministic mode refuses. If nobody reads
    the output any more (`| head`, a closed terminal), the program goes on to its end, and its exit
    code says how it ended.
    """
    prepare_console()
    try:
        yield
        _require_output()
    except InputError as error:
        _say_once(f"error: {error}")
        raise SystemExit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt as stop:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(exit_code_of(stop)) from None
    except SystemExit as stop:
        if not stop.code:
            _require_output()
        raise
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in OPTIONAL:
            raise
        _say_once(f"error: {_not_installed(error.name, error)}")
        raise SystemExit(EXIT_BAD_INPUT) from None
    except OSError as error:
        if error.errno not in NOT_WRITABLE or error.filename is None:
            raise
        _say_once(
            f"error: {error.filename} cannot be used ({error.strerror}); give the right to read "
            "and write there, make room, or choose another path"
        )
        raise SystemExit(EXIT_BAD_INPUT) from None
    except RuntimeError as error:  # The network of a user's own module may use such an operator.
        operator, found, _ = str(error).partition(f" {NOT_REPEATABLE}")
        if not found:
            raise
        _say_once(
            f"error: this device cannot repeat {operator[-80:]}, which the network uses, bit for "
            "bit; pass --deterministic 0, or use another operator in the network"
        )
        raise SystemExit(EXIT_BAD_INPUT) from None


def require_package(name: str, requirements: str = "requirements.txt") -> None:
    """Raise an `InputError` if a package is not installed, before work that needs it at its end.

    Args:
        requirements: the file that lists the package.
    """
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise InputError(_not_installed(name, error, requirements)) from None


def _not_installed(name: str, error: ImportError, requirements: str = "requirements.txt") -> str:
    missing = isinstance(error, ModuleNotFoundError)
    what = "is not installed" if missing else f"cannot be imported ({error})"
    return f"{name.split('.')[0]} {what}; run: {_command_to_install(requirements)}"


def _command_to_install(requirements: str) -> str:
    """Return the command for the packages of a file; an installed project has extras instead."""
    if (Path(__file__).parent.parent / requirements).is_file():
        return f"pip install -r {requirements}"
    extra = requirements.removeprefix("requirements").removesuffix(".txt").removeprefix("-")
    return f"pip install 'samed[{extra}]'" if extra else "pip install --force-reinstall samed"


def _require_output() -> None:
    """End with exit code 2 if a part of standard output could not be written."""
    if failure := output_failure():
        _say_once(
            f"error: a part of the output could not be written ({failure.strerror}); files are "
            "complete, so make room and look there, or redirect the output to another place"
        )
        raise SystemExit(EXIT_BAD_INPUT)


def exit_code_of(stop: KeyboardInterrupt) -> int:
    """Return the code that shells report for a program that a signal ended.

    Args:
        stop: from Ctrl-C, or with the number of another signal as its only argument.
    """
    return 128 + stop.args[0] if stop.args else EXIT_KEYBOARD


def _say_once(text: str, suffix: str = "") -> None:
    """Print a line on stderr, unless another process of the same launch has printed it."""
    text = printable(text)
    if folder := os.environ.get(NOTES):
        try:
            (Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()}{suffix}").touch(
                exist_ok=False
            )
        except FileExistsError:
            return
        except OSError:
            pass  # The folder is gone or its disk is full: said twice is better than not at all.
    with contextlib.suppress(OSError):  # A worker's, whose terminal is closed.
        print(text, file=sys.stderr)


def cannot_make(folder: str | Path, error: OSError, *, flag: str) -> InputError:
    """Return the error for a folder that cannot be made."""
    return InputError(f"cannot make the folder {folder} ({error.strerror}); pass another {flag}")


def cannot_write(path: Path, error: OSError) -> InputError:
    """Return the error for a disk that is full, read-only or gone, or a path that is taken."""
    if error.errno in NO_PLACE:
        return InputError(f"cannot write {path} ({error.strerror}); choose another path")
    if error.errno in GONE:
        return InputError(
            f"cannot write {path} ({error.strerror}): its folder was removed, or its disk or file "
            "server does not answer; check both and start again"
        )
    return InputError(
        f"cannot write {path} ({error.strerror}); make room or give the right to write there, and "
        "start again: what was saved before is intact"
    )


def warn(message: str) -> None:
    """Print a warning as one line on stderr."""
    _say_once(f"warning: {message}", WARNING)


def first_few(names: list[Any], count: int = 5) -> str:
    """Join names for an error message: `a, b, c, d, e and 7 more`."""
    shown = ", ".join(str(name) for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


def first_line(error: BaseException) -> str:
    """Return the type and the first sentence of an error."""
    text = str(error).strip()
    return (
        f"{type(error).__name__}: {text.splitlines()[0].split('. ')[0][:160]}"
        if text
        else type(error).__name__
    )
