"""Files of tensors: read without running code from them, written completely or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import safetensors
import torch

from common.errors import InputError, cannot_write, first_line
from common.files import require_file
from common.writing import flush_folder, partial_name


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
        flush_folder(path.parent)
        return path, digest
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else target.error if target else None
        if cause is None:
            raise
        raise cannot_write(path, cause) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
