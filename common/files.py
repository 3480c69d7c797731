"""Reading files without trusting them, and writing files completely or not at all.

Everything a user can get wrong is an `InputError`: its text is the one sentence that the
command-line programs print before they exit with code 2.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors
import torch

from common.errors import (
    NOT_WRITABLE,
    InputError,
    MissingFileError,
    cannot_make,
    cannot_write,
    first_line,
)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success rename it there, on failure remove it."""
    path = Path(path)
    temporary = partial_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise cannot_write(path, error) from None
    finally:
        with contextlib.suppress(OSError):  # It may not exist.
            temporary.unlink()


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
        raise cannot_make(path, error, flag=flag) from None
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
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} holds more than plain tensors or is damaged, so it was not opened; save it as "
            "a state dict of tensors, or fetch it again"
        ) from None
    except Exception as error:  # Damaged bytes make the parser raise nearly anything.
        raise InputError(
            f"{path} is not a readable PyTorch checkpoint ({first_line(error)}); "
            "it may be truncated: fetch or save it again"
        ) from None


def load_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Load the tensors of a `.safetensors` file onto the CPU, and the texts beside them.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is damaged.
    """
    path = require_file(path, what="checkpoint", remedy="check the path")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # Damaged bytes make the parser raise nearly anything.
        raise InputError(
            f"{path} is not a readable safetensors file ({first_line(error)}); it may be "
            "truncated: fetch or convert it again"
        ) from None


class _HashingFile:
    """A file opened for writing that computes the SHA-256 of its content."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:  # PyTorch would only report that writing failed.
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save_tensors(
    state: dict[str, Any], path: str | Path, *, hash_in_name: bool = False
) -> tuple[Path, str]:
    """Write a dict of tensors and plain containers as `.pth`, completely or not at all.

    Equal contents give equal files.

    Args:
        hash_in_name: put the first 16 digits of the hash into the name, before the suffix, so
            that damage shows by the name alone.

    Returns:
        The file and its SHA-256 in hexadecimal.

    Raises:
        InputError: no room or no right to write there; an older file of the name is untouched.
    """
    path = Path(path)
    temporary = partial_name(path)
    target = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = _HashingFile(temporary)
        with target.file:
            torch.save(state, target)
            target.flush()
            # Without this, a crash may leave the new name without content.
            os.fsync(target.file.fileno())
        digest = target.digest.hexdigest()
        if hash_in_name:
            path = path.with_name(f"{path.stem}-{digest[:16]}{path.suffix}")
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # Keep the new name as well.
        finally:
            os.close(folder)
        return path, digest
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else target.error if target else None
        if cause is None:
            raise
        raise cannot_write(path, cause) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def partial_name(path: Path) -> Path:
    """Return the name of an unfinished file. It keeps the suffix, which writers look at."""
    return path.with_name(f".{os.getpid()}.partial.{path.name}")


def remove_partials(folder: Path) -> None:
    """Delete the unfinished files that a killed process left in a folder of this project."""
    for left in folder.glob(".*.partial.*"):
        left.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_arrays(path: str | Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read the named arrays of an `.npz` file; pickled objects in it are refused.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is corrupt, or a key is missing, or an array holds objects.
    """
    path = require_file(path, what="slice file", remedy="check the path or run preprocess again")
    for again in (True, False):
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
        except Exception as error:  # Damaged bytes make the parser raise nearly anything.
            if isinstance(error, SystemError) and again:
                continue  # Before 3.11.9, CPython's parser failed when threads used it at once.
            raise InputError(
                f"{path} is not a readable npz file ({first_line(error)}); run preprocess again"
            ) from None
    raise AssertionError("the second attempt returns or raises")


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, completely or not at all; values of other types become texts."""
    text = json.dumps(content, indent=2, allow_nan=False, default=str)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
