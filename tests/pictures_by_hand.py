"""PNG and TIFF files written byte by byte, so that no decoder under test has a part in them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of PNG
# The seven passes of an interlaced PNG: first column and row, steps between columns and rows.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
         (0, 1, 1, 2))  # fmt: skip


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def packed_row(row: np.ndarray, bits: int) -> bytes:
    """Pack values (W,) or (W, C) into `bits` bits each, the highest bit first."""
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits(((row.reshape(-1, 1).astype(int) >> shifts) & 1).astype(np.uint8)).tobytes()


def write_png(
    path: Path,
    array: np.ndarray,
    bits: int,
    kind: int,
    *chunks: bytes,
    interlaced: bool = False,
) -> Path:
    """Write values (H, W) or (H, W, C) without filters."""
    passes = [array]
    if interlaced:
        passes = [array[y::dy, x::dx] for x, y, dx, dy in ADAM7 if array[y::dy, x::dx].size]
    rows = b"".join(b"\0" + packed_row(row, bits) for part in passes for row in part)
    size = (array.shape[1], array.shape[0])
    head = struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, interlaced)
    parts = [
        chunk(b"IHDR", head),
        *chunks,
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def write_tiff(
    path: Path,
    pages: Sequence[np.ndarray],
    *,
    order: str = "<",
    white_is_zero: bool = False,
    tags: Sequence[tuple[int, int, list[int]]] = (),
    bits: int | None = None,
    subfiles: Sequence[int] = (),
) -> Path:
    """Write pages (H, W) or (H, W, C) uncompressed, in their dtype or packed into `bits` bits.

    Args:
        order: `<` little or `>` big endian.
        tags: more tags of every page: number, type (3: 16 bits, 4: 32 bits), values.
        subfiles: NewSubfileType of each page: 1 a smaller copy, 4 a mask.
    """
    content = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    for index, page in enumerate(pages):
        channels = page.shape[2] if page.ndim == 3 else 1
        depth = bits or 8 * page.itemsize
        data = page.astype(page.dtype.newbyteorder(order)).tobytes()
        if bits:
            data = b"".join(packed_row(row, bits) for row in page)
        photometric = {1: 0 if white_is_zero else 1, 3: 2, 4: 2}[channels]
        entries = [
            (256, 4, [page.shape[1]]), (257, 4, [page.shape[0]]), (258, 3, [depth] * channels),
            (259, 3, [1]), (262, 3, [photometric]), (273, 4, [0]), (277, 3, [channels]),
            (278, 4, [page.shape[0]]), (279, 4, [len(data)]),
            (339, 3, [{"u": 1, "i": 2, "f": 3}[page.dtype.kind]] * channels),
            *([(338, 3, [2])] if channels == 4 else []), *tags,
            *([(254, 4, [subfiles[index]])] if subfiles else []),
        ]  # fmt: skip
        content += _directory(sorted(entries), data, len(content), order, index + 1 == len(pages))
    path.write_bytes(content)
    return path


def _directory(
    entries: list[tuple[int, int, list[int]]], data: bytes, start: int, order: str, last: bool
) -> bytes:
    """Return a directory at offset `start`, its long values and its pixels."""
    codes = {3: "H", 4: "I"}
    after = start + 2 + 12 * len(entries) + 4
    long_values = b"".join(
        struct.pack(f"{order}{len(v)}{codes[k]}", *v)
        for _, k, v in entries
        if len(v) * (2 if k == 3 else 4) > 4
    )
    pixels = after + len(long_values)
    body, used = b"", after
    for number, kind, values in entries:
        values = [pixels] if number == 273 else values
        raw = struct.pack(f"{order}{len(values)}{codes[kind]}", *values)
        if len(raw) > 4:
            raw, used = struct.pack(order + "I", used), used + len(raw)
        body += struct.pack(order + "HHI", number, kind, len(values)) + raw.ljust(4, b"\0")
    following = 0 if last else pixels + len(data)
    head = struct.pack(order + "H", len(entries))
    return head + body + struct.pack(order + "I", following) + long_values + data
