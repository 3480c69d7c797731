"""Finding and reading files without trusting them.

Everything a user can get wrong is an `InputError`: its text is the one sentence that the
command-line programs print before they exit with code 2.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile

from common.errors import InputError, MissingFileError, cannot_make, first_line
from common.writing import make_folders

# Readers of the header of an array, by the version of its format; later ones hold no numbers.
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# Bytes; reading the headers of smaller arrays first would cost more than it saves.
LARGE_ARRAYS = 64 << 20
LARGEST_JSON = 256 << 20  # bytes; the results of some thousand cases take a few MiB
LARGEST_SLICE = 1 << 30  # bytes of an array in an .npz, unpacked; 16384 x 16384 in float32


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


def make_folder(path: str | Path, *, flag: str) -> Path:
    """Make a folder and those above it, or raise an `InputError` that names the flag to change."""
    try:
        make_folders(Path(path))
    except OSError as error:
        raise cannot_make(path, error, flag=flag) from None
    return Path(path)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path, *, remedy: str) -> Any:
    """Read a JSON file, which anybody may have edited or damaged.

    Raises:
        MissingFileError: there is no such file.
        InputError: it cannot be read, or is not JSON in the sense of `parse_json`.
    """
    path = require_file(path, what="file", remedy=remedy)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not JSON ({first_line(error)}); {remedy}") from None


def parse_json(text: str) -> Any:
    """Return the content of a JSON text.

    Raises:
        ValueError: it is no JSON, or nested too deeply, or holds a number beyond 64 bits, NaN, or
            half a character, which nothing could compute with or write again.
    """
    try:
        content = json.loads(
            text, parse_int=_whole_number, parse_float=_number, parse_constant=_number
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\u" in text:
        json.dumps(content, ensure_ascii=False).encode()
    return content


def _whole_number(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{text:.20} has more than 64 bits")
    return int(text)


def _number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text:.20} is no finite number")
    return float(text)


@dataclass(frozen=True)
class Declared:
    """What a file says of an array before its values are read."""

    shape: tuple[int, ...]
    dtype: np.dtype


def load_arrays(
    path: str | Path, keys: tuple[str, ...], check: Callable[..., object] | None = None
) -> dict[str, np.ndarray]:
    """Read the named arrays of an `.npz` file; pickled objects in it are refused.

    Args:
        check: called with each array, in this order. If they are large, it is called before any
            is read, with a `Declared` of each.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is corrupt, or a key is missing, or an array holds objects or is too large.
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
                size = sum(item.file_size for item in archive.zip.infolist())
                if check is not None and size > LARGE_ARRAYS:
                    check(*(_declared(archive, key) for key in keys))
                arrays = {key: archive[key] for key in keys}
                if check is not None and size <= LARGE_ARRAYS:
                    check(*arrays.values())
                return arrays
        except InputError:
            raise
        except Exception as error:  # Damaged bytes make the parser raise nearly anything.
            if isinstance(error, SystemError) and again:
                continue  # Before 3.11.9, CPython's parser failed when threads used it at once.
            raise InputError(
                f"{path} is not a readable npz file ({first_line(error)}); run preprocess again"
            ) from None
    raise AssertionError("the second attempt returns or raises")


def _declared(archive: NpzFile, key: str) -> Declared:
    # numpy finds an array by its name with or without this ending
    name = key if key in archive.zip.namelist() else f"{key}.npy"
    with archive.zip.open(name) as file:
        version = np.lib.format.read_magic(file)
        if version not in HEADERS:
            raise ValueError(f"{name} is in version {version} of numpy's format")
        shape, _, dtype = HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError(f"its {key} holds pickled objects")
    size = math.prod(shape) * dtype.itemsize
    if size > LARGEST_SLICE:
        raise ValueError(f"its {key} {shape} would take {size:,} bytes")
    return Declared(shape, dtype)
