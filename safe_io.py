"""Reading what a user was given without trusting it, writing so that nothing is half-written.

Everything a user can get wrong is an `InputError`: its text is the one sentence that the
command-line programs print before they exit with code 2.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

EXIT_BAD_INPUT = 2


class InputError(ValueError):
    """The user's input is wrong; the message says what, where, what was expected, what to do."""


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder that the user named does not exist."""


@contextlib.contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Turn an `InputError` into one line on stderr and exit code 2; a bug keeps its traceback."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success rename it there, on failure remove it.

    The temporary name keeps the suffixes of `path`, because writers choose a format by them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def require_file(path: str | Path, *, what: str, remedy: str) -> Path:
    """Return `path` if it is a file, else raise a `MissingFileError` that says what to do."""
    path = Path(path)
    if not path.is_file():
        problem = "is a folder, expected a file" if path.is_dir() else "does not exist"
        raise MissingFileError(f"{what} {path} {problem}; {remedy}")
    return path


def require_folder(path: str | Path, *, what: str, remedy: str) -> Path:
    """Return `path` if it is a folder, else raise a `MissingFileError` that says what to do."""
    path = Path(path)
    if not path.is_dir():
        problem = "is a file, expected a folder" if path.exists() else "does not exist"
        raise MissingFileError(f"{what} {path} {problem}; {remedy}")
    return path


def make_folder(path: str | Path, *, flag: str, exist_ok: bool = True) -> Path:
    """Make a folder and those above it, or raise an `InputError` that names the flag to change."""
    try:
        Path(path).mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise InputError(
            f"cannot make the folder {path} ({error.strerror}); pass another {flag}"
        ) from None
    return Path(path)


def safe_name(name: str, *, source: str | Path) -> str:
    """Return `name` if it is one plain path component, else refuse it (`../`, `/`, empty)."""
    if not name or name in (".", "..") or "\\" in name or PurePosixPath(name).name != name:
        raise InputError(
            f"{source} names {name!r}, expected a plain case or slice name without folders; "
            "correct that line"
        )
    return name


def load_tensors(path: str | Path) -> Any:
    """Load a `.pth` file onto the CPU as tensors and plain containers; never runs code from it.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is truncated, or a pickle of anything but tensors and plain containers.
    """
    path = require_file(path, what="checkpoint", remedy="check the path")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than plain tensors or is damaged, so it was not opened "
            f"({_first_line(error)}); save it as a state dict of tensors, or fetch it again"
        ) from None
    except Exception as error:  # on damaged bytes the parser raises nearly anything
        raise InputError(
            f"{path} is not a readable PyTorch checkpoint ({_first_line(error)}); "
            "it may be truncated: fetch or save it again"
        ) from None


def save_tensors(state: dict[str, Any], path: str | Path) -> None:
    """Write a dict of tensors and plain containers as `.pth`, whole or not at all."""
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_arrays(path: str | Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read the named arrays of an `.npz` file; pickled objects in it are refused.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is corrupt, or a key is missing, or an array holds objects.
    """
    path = require_file(path, what="slice file", remedy="check the path or run preprocess again")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in keys if key not in archive.files]
            if missing:
                raise InputError(
                    f"{path} has no array named {', '.join(missing)} (it holds "
                    f"{', '.join(archive.files) or 'nothing'}); write it by preprocess"
                )
            return {key: archive[key] for key in keys}
    except InputError:
        raise
    except Exception as error:  # on damaged bytes the parser raises nearly anything
        raise InputError(
            f"{path} is not a readable npz file ({_first_line(error)}); run preprocess again"
        ) from None


def first_few(names: list[Any], count: int = 5) -> str:
    """`a, b, c, d, e and 7 more`: the names of an error message."""
    shown = ", ".join(str(name) for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__
