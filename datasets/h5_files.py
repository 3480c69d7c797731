"""Reading of h5 files that anybody may have written: plain data sets of the file itself alone.

HDF5 lets a data set lie in other files of the machine, and loads programs to unpack it. Neither is
needed for images and labels, so both are refused, before any value is read.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from common.errors import InputError, first_few, first_line

# gzip, shuffle, fletcher32, szip, nbit, scale-offset and lzf, which come with HDF5 and h5py.
FILTERS = {1, 2, 3, 4, 5, 6, 32000}
# A data set larger than this must take space in its file, or a few bytes would fill the memory.
LARGE = 256 << 20  # bytes
MOST_COMPRESSED = 400  # bytes in memory for each byte in the file
MOST_IN_ATTRIBUTE = 9  # values: the cosines of a direction
HEAP = b"GCOL\x01\0\0\0"  # how a heap of texts starts
HEAP_OBJECT = struct.Struct("<H6xQ")  # index, 0 for free space; length in bytes

# Raises an error if the declared shapes or types of the arrays do not fit.
Check = Callable[[Any, Any], object]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open an h5 file; whatever the parser raises meanwhile becomes an `InputError`."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except InputError:
        raise
    except Exception as error:  # on damaged bytes the parser raises nearly anything
        raise InputError(
            f"{path} is not a readable h5 file ({first_line(error)}); run preprocess again"
        ) from None


def read_h5(path: Path, check: Check) -> dict[str, np.ndarray]:
    """Read `image` and `label` of a volume, or of a slice in this format.

    Args:
        check: called with both data sets, which have `shape` and `dtype`, before they are read.

    Raises:
        InputError: the file is damaged, or `image` or `label` is absent, incomplete, lies in
            another file, or would take far more memory than its file has bytes.
    """
    with opened(path) as file:
        image, label = (plain_dataset(file, key, path) for key in ("image", "label"))
        check(image, label)
        _refuse_large_parts(image, path)
        _refuse_large_parts(label, path)
        _refuse_unwritten(image, path)
        return {"image": image[()], "label": label[()]}


def count_slices(path: Path) -> int:
    """Return the number of slices of a volume."""
    with opened(path) as file:
        return len(plain_dataset(file, "image", path))


def plain_dataset(file: h5py.File, key: str, path: Path) -> h5py.Dataset:
    """Return a data set whose values lie in this file and need no foreign program."""
    link = file.get(key, getlink=True)
    if link is not None and not isinstance(link, h5py.HardLink):
        raise _not_plain(path, key, "a link")
    found = file.get(key)
    if not isinstance(found, h5py.Dataset) or found.shape is None:
        raise InputError(
            f"{path} has no data set named {key} (it holds {first_few(list(file)) or 'nothing'}); "
            "run preprocess again"
        )
    settings = found.id.get_create_plist()
    if settings.get_external_count() or settings.get_layout() == h5py.h5d.VIRTUAL:
        raise _not_plain(path, key, "values of other files")
    numbers = {settings.get_filter(index)[0] for index in range(settings.get_nfilters())}
    if numbers - FILTERS:
        raise InputError(
            f"{path} packs {key} with the HDF5 filter {min(numbers - FILTERS)}, which needs a "
            "program of another source; write the file with compression='gzip'"
        )
    return found


def _not_plain(path: Path, key: str, what: str) -> InputError:
    return InputError(
        f"{path} holds {what} as {key}, expected the values themselves, because a file of data "
        "must not name other files to read; copy the values into it"
    )


def _refuse_large_parts(found: h5py.Dataset, path: Path) -> None:
    """Refuse parts that are larger than their data set: HDF5 unpacks a whole part at once."""
    part = math.prod(found.chunks or (0,)) * found.dtype.itemsize
    if part > max(LARGE, found.size * found.dtype.itemsize):
        raise InputError(
            f"{path} stores {found.name[1:]} in parts of {part >> 20} MiB, more than all of its "
            "values; run preprocess again"
        )


def _refuse_unwritten(image: h5py.Dataset, path: Path) -> None:
    """Raise an `InputError` for an image whose values were never written, or hardly take space.

    A label may be so: that of a scan without any organ is zero everywhere. It has the image's shape
    and therefore needs no check of its own.
    """
    size, stored = image.size * image.dtype.itemsize, image.id.get_storage_size()
    if image.chunks is None:
        complete = stored >= size
    else:
        parts = zip(image.shape, image.chunks, strict=True)
        complete = image.id.get_num_chunks() == math.prod(-(-n // part) for n, part in parts)
    if not complete:
        raise InputError(
            f"{path} declares an image {image.shape} whose values were not all written; the "
            "program that wrote the file was stopped, so run preprocess again"
        )
    if size > LARGE and size > MOST_COMPRESSED * stored:
        raise InputError(
            f"{path} declares an image {image.shape} of {size >> 20} MiB in {stored} bytes, too "
            "few for a picture; run preprocess again"
        )


def read_attribute(file: h5py.File, name: str) -> str | np.ndarray | None:
    """Return a text or a few numbers that a file stores beside its data; None: not stored.

    Raises:
        ValueError: the attribute holds something else.
    """
    if name not in file.attrs:
        return None
    stored = file.attrs.get_id(name)
    text = h5py.check_string_dtype(stored.dtype) is not None
    if not (text or stored.dtype.kind in "fiub") or math.prod(stored.shape) > MOST_IN_ATTRIBUTE:
        raise ValueError(f"{name} is neither a text nor a few numbers")
    if h5py.check_vlen_dtype(stored.dtype) is not None or stored.dtype.hasobject:
        _refuse_endless_heaps(file)
    value = file.attrs[name]
    if isinstance(value, bytes):
        value = value.decode("ascii")
    return value if isinstance(value, str) else np.asarray(value, dtype=float)


def _refuse_endless_heaps(file: h5py.File) -> None:
    """Refuse heaps, in which texts of any length lie, that HDF5 would walk through for ever.

    It goes from object to object by their sizes, and stays where a free one has the size 0.

    Raises:
        ValueError: there is such a heap.
    """
    _, bytes_of_a_length = file.id.get_create_plist().get_sizes()
    if bytes_of_a_length != 8:  # which no program of the field writes
        return
    with (
        Path(file.filename).open("rb") as raw,
        mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        start = data.find(HEAP)
        while start >= 0:
            size = int.from_bytes(data[start + 8 : start + 16], "little")
            here, end = start + 16, min(start + size, len(data))
            while here + HEAP_OBJECT.size <= end:
                index, length = HEAP_OBJECT.unpack_from(data, here)
                step = HEAP_OBJECT.size + -(-length // 8) * 8 if index else length
                if step == 0:
                    raise ValueError("its texts are damaged")
                here += step
            start = data.find(HEAP, start + 8)


def numbers(value: Sequence[float] | np.ndarray | str | None, count: int) -> tuple[float, ...]:
    """Return an attribute as this many finite numbers.

    Raises:
        ValueError: it holds something else.
    """
    if value is None or isinstance(value, str):
        raise ValueError("no numbers")
    found = np.reshape(value, count)
    if not np.isfinite(found).all():
        raise ValueError("not finite")
    return tuple(found.tolist())
