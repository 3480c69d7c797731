"""Files of tensors: read without running code from them, written completely or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from common.errors import InputError, first_line
from common.files import require_file, sha256_of
from common.writing import finish, require_same, unfinished

WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Weights are computed with in this type.
LARGEST_WEIGHT = torch.finfo(torch.float32).max
LONGEST_KEY = 200
# The bytes of all tensors of a file, over the bytes that it holds. Two names may mean one tensor.
MOST_USES = 2
ZIP_START = b"PK\x03\x04"


def load_tensors(path: str | Path) -> Any:
    """Load a `.pth` file onto the CPU as tensors and plain containers; never runs code from it.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is truncated, or a pickle of anything but tensors and plain containers.
    """
    path = require_file(path, what="checkpoint", remedy="check the path")
    try:
        _require_plain_zip(path)
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


def _require_plain_zip(path: Path) -> None:
    """Refuse an archive that would take more memory than its file: PyTorch never compresses.

    Raises:
        ValueError: its records are larger than the file.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP_START)) != ZIP_START:
            return  # the format before PyTorch 1.6, or no checkpoint at all
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError(f"its records would take {unpacked:,} bytes, more than the file has")


def plain_tensors(state: Mapping[Any, Any], path: str | Path) -> dict[str, torch.Tensor]:
    """Return the weights that a file holds: dense, contiguous, finite, on the CPU.

    A file that PyTorch opens may hold tensors of many other kinds, or one value that claims to be
    a matrix of terabytes.

    Raises:
        InputError: an entry is no weight; the message names it.
    """
    for key, value in state.items():
        if problem := _problem_of_key(key) or _problem_of_kind(value):
            raise _no_weights(path, key, problem)
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage() for v in state.values()}
    held = sum(storage.nbytes() for storage in storages.values())
    claimed = sum(value.numel() * value.element_size() for value in state.values())
    if claimed > MOST_USES * held:
        raise InputError(
            f"{path} holds {held:,} bytes that claim to be tensors of {claimed:,} bytes; save it "
            "as a state dict of ordinary tensors"
        )
    for key, value in state.items():
        low, high = map(float, torch.aminmax(value.detach()))  # NaN is in both
        if not -LARGEST_WEIGHT <= low <= high <= LARGEST_WEIGHT:
            raise _no_weights(path, key, "holds NaN, infinite values, or values beyond 32 bits")
    return {key: value.detach().contiguous() for key, value in state.items()}


def _no_weights(path: str | Path, key: Any, problem: str) -> InputError:
    name = ascii(key)[:LONGEST_KEY] if isinstance(key, str) else f"a {type(key).__name__} as key"
    return InputError(
        f"{path}: {name} {problem}, expected dense tensors of finite floating-point numbers; fetch "
        "or save it again"
    )


def _problem_of_key(key: Any) -> str | None:
    if isinstance(key, str) and key.isprintable() and len(key) <= LONGEST_KEY:
        return None
    return "is no name of a tensor"


def _problem_of_kind(value: Any) -> str | None:
    """Say why a value is no weight, without reading its numbers; None if it may be one."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"is a {type(value).__name__}"
    if value.is_nested:  # its layout says that it is an ordinary one
        return "is a nested tensor"
    if value.layout != torch.strided:
        return f"is a tensor of layout {value.layout}"
    if value.device.type != "cpu":
        return f"is a tensor without values, on the device {value.device.type}"
    if value.dtype not in WEIGHT_TYPES:
        return f"is a tensor of type {value.dtype}"
    return None if value.numel() else "is an empty tensor"


class _HashingFile:
    """A file opened for writing that computes the SHA-256 of its content.

    PyTorch would only report that writing failed. So the first error is noted, and what follows is
    dropped.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self._noting(self.file.write, data)
        return len(data)

    def flush(self) -> None:
        self._noting(self.file.flush)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # It is closed in any case.
            self.file.close()

    def _noting(self, call: Callable[..., object], *values: bytes) -> None:
        try:
            if self.error is None:
                call(*values)
        except OSError as error:
            self.error = error


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
    with unfinished(path) as temporary:
        with contextlib.closing(_HashingFile(temporary)) as target:
            torch.save(state, target)
            target.flush()
        if target.error is not None:
            raise target.error
        digest = target.digest.hexdigest()
        require_same(path, sha256_of(temporary) == digest)
        if hash_in_name:
            path = path.with_name(f"{path.stem}-{digest[:16]}{path.suffix}")
        finish(temporary, path)
    return path, digest
