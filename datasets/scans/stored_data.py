"""Whether the voxels that an NRRD or MetaImage header declares are in its file, whole.

SimpleITK takes memory for all that a header declares, follows it to any file, and reads packed
voxels without their checksum: damaged ones become zeros, or what was in memory before.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from pathlib import Path
from typing import IO

from common.errors import InputError
from common.files import require_file
from datasets.scans.errors import short_reason
from datasets.scans.text_headers import TextHeader, numbers_in

BLOCK = 1 << 20  # bytes that are unpacked at once
DEFLATE_RATIO = 1032  # the most bytes that gzip and zlib pack into one
MOST_PER_CHARACTER = 8  # bytes of a number of one digit and the blank behind it
MOST_FILES = 100_000
LONGEST_NAME = 255  # characters
# Bytes of a voxel by its type.
NRRD_SIZES = {
    name: size
    for size, names in (
        (1, "signed char,int8,int8_t,uchar,unsigned char,uint8,uint8_t"),
        (2, "short,short int,signed short,signed short int,int16,int16_t"),
        (2, "ushort,unsigned short,unsigned short int,uint16,uint16_t"),
        (4, "int,signed int,int32,int32_t,uint,unsigned int,uint32,uint32_t,float"),
        (8, "longlong,long long,long long int,signed long long,signed long long int,int64,int64_t"),
        (8, "ulonglong,unsigned long long,unsigned long long int,uint64,uint64_t,double"),
    )
    for name in names.split(",")
}
META_SIZES = {
    f"MET_{name}": size
    for size, names in (
        (1, "CHAR UCHAR"),
        (2, "SHORT USHORT"),
        (4, "INT UINT LONG ULONG FLOAT"),  # a long of this format has 4 bytes everywhere
        (8, "LONG_LONG ULONG_LONG DOUBLE"),
    )
    for name in names.split()
}
RAW, GZIP, TEXT, HEX = "raw", "gzip", "ascii", "hex"
ENCODINGS = {"raw": RAW, "gz": GZIP, "gzip": GZIP, "txt": TEXT, "text": TEXT, "ascii": TEXT}
ENCODINGS["hex"] = HEX


def refuse_missing_data(header: TextHeader) -> None:
    """Refuse a header that declares more voxels than its files can hold, or files elsewhere.

    No voxel is read.

    Raises:
        InputError: see above; or the sizes, the type or the encoding is unknown.
    """
    wanted, files, packing = declared_bytes(header), data_files(header), _packing(header)
    refuse_beyond_memory(header.path, wanted)
    most = {GZIP: DEFLATE_RATIO, TEXT: MOST_PER_CHARACTER, HEX: 0.5}.get(packing, 1)
    there = 0
    for file in files:
        size = file.stat().st_size - (header.end if file == header.path else 0)
        size -= max(0, _skipped(header)) if packing == RAW else 0
        there += size
        if size * most < wanted // len(files):
            raise InputError(
                f"{header.path} is damaged or cut short (its header declares {wanted} bytes of "
                f"voxels, and {file.name} has {max(0, size)} bytes for {wanted // len(files)} of "
                "them); fetch it again"
            )


def refuse_beyond_memory(path: Path, wanted: int) -> None:
    """Refuse a scan of more bytes than the machine has memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > memory:
        raise InputError(
            f"{path} declares {wanted / 2**30:.1f} GiB of voxels, more than the memory of this "
            f"machine ({memory / 2**30:.1f} GiB); cut the scan, or correct its header"
        )


def refuse_damaged_data(header: TextHeader) -> None:
    """Unpack packed voxels, and compare their size and checksum; unpacked voxels have none.

    Raises:
        InputError: they are damaged or cut short.
    """
    if _packing(header) != GZIP:
        return
    files = data_files(header)
    wanted = declared_bytes(header) // len(files)
    for file in files:
        try:
            with file.open("rb") as stream:
                stream.seek(header.end if file == header.path else 0)
                if header.is_nrrd:
                    for _ in range(header.number("line skip", 0)):
                        stream.readline()
                    least = wanted + max(0, _skipped(header))
                    found = _size_of_gzip(stream, least + BLOCK)
                else:
                    least = wanted
                    found = _size_of_zlib(header, stream, least + BLOCK)
            if not least <= found <= least + BLOCK:
                raise EOFError(f"expected {least} bytes of voxels, found {found}")
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"{file} is damaged or cut short ({short_reason(error)}); fetch it again"
            ) from None


def _size_of_gzip(stream: IO[bytes], most: int) -> int:
    found = 0
    with gzip.GzipFile(fileobj=stream) as unpacked:
        # At the end, it compares the checksum.
        while found <= most and (part := unpacked.read(BLOCK)):
            found += len(part)
    return found


def _size_of_zlib(header: TextHeader, stream: IO[bytes], most: int) -> int:
    stream.seek(max(0, _skipped(header)), os.SEEK_CUR)
    left = header.number("compresseddatasize", 0) or math.inf
    unpacker = zlib.decompressobj(wbits=47)  # zlib or gzip, as SimpleITK takes them
    found = 0
    while not unpacker.eof and found <= most:
        packed = unpacker.unconsumed_tail
        if not packed:
            packed = stream.read(min(BLOCK, left))
            left -= len(packed)
            if not packed:
                raise EOFError("its packed voxels have no end")
        found += len(unpacker.decompress(packed, BLOCK))
    return found


def declared_bytes(header: TextHeader) -> int:
    """Return how many bytes the voxels take that a header declares.

    Raises:
        InputError: the sizes are no sizes, or the type is none of a voxel.
    """
    text = header.fields.get("sizes" if header.is_nrrd else "dimsize", "")
    count = header.number("dimension" if header.is_nrrd else "ndims", 0)
    sizes = [int(size) for size in text.split() if re.fullmatch(r"\d{1,10}", size)]
    if len(sizes) != count or len(text.split()) != count or not all(sizes):
        raise header.error(f"gives {text[:60] or 'nothing'} as its {count} sizes")
    kind = header.fields.get("type" if header.is_nrrd else "elementtype", "nothing")
    size = NRRD_SIZES.get(kind.lower()) if header.is_nrrd else META_SIZES.get(kind)
    if size is None:
        raise header.error(f"has voxels of the type {kind:.40}, expected whole or decimal numbers")
    channels = 1 if header.is_nrrd else header.number("elementnumberofchannels", 1)
    return math.prod(sizes) * size * max(1, channels)


def data_files(header: TextHeader) -> list[Path]:
    """Return the files that hold the voxels: the file itself, or files that its header names.

    Raises:
        InputError: a file does not exist, or lies elsewhere than beside or below the header.
    """
    names = ("data file", "datafile") if header.is_nrrd else ("elementdatafile",)
    text = next((header.fields[name] for name in names if name in header.fields), "LOCAL")
    first, *numbers = text.split() or [""]
    if first.upper() == "LOCAL" and not numbers:
        return [header.path]
    if first == "LIST":
        named = [line.strip() for line in header.after.splitlines() if line.strip()]
    elif "%" in first and len(numbers) in (3, 4):
        named = _numbered(header, first, numbers[:3])
    else:
        named = [text]
    if not 1 <= len(named) <= MOST_FILES:
        raise header.error(f"names {len(named)} files of voxels")
    for name in named:
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise header.error("names a file of voxels by no name of a file")
        parts = re.split(r"[/\\]", name)
        if parts[0] in ("", "~") or ".." in parts or ":" in parts[0]:
            raise InputError(
                f"{header.path} takes its voxels from {name}, which is not in the folder of "
                "the header; put the file beside the header, and its plain name into the header"
            )
    remedy = "put it beside the header"
    return [
        require_file(header.path.parent / name, what=f"voxels of {header.path}:", remedy=remedy)
        for name in named
    ]


def _numbered(header: TextHeader, name: str, numbers: list[str]) -> list[str]:
    """Return the names of files that a pattern stands for, e.g. `s%03d.raw 1 20 1`."""
    if not re.fullmatch(r"[^%]*%0?\d?d[^%]*", name) or not all(
        re.fullmatch(r"[+-]?\d{1,9}", number) for number in numbers
    ):
        raise header.error(
            f"names its files as {name} {' '.join(numbers)}, expected e.g. s%03d.raw"
        )
    first, last, step = map(int, numbers)
    if step == 0 or abs(last - first) > MOST_FILES:
        raise header.error(f"names files from {first} to {last} in steps of {step}")
    return [name % index for index in range(first, last + (1 if step > 0 else -1), step)]


def _packing(header: TextHeader) -> str:
    """Return the encoding: RAW, GZIP (also for zlib), TEXT or HEX."""
    fields = header.fields
    if header.is_nrrd:
        name = fields.get("encoding", "nothing")
        if name.lower() not in ENCODINGS:
            raise header.error(f"has the encoding {name:.40}, expected raw or gzip")
        return ENCODINGS[name.lower()]
    if not _is_true(header, "binarydata", "True"):
        raise header.error("holds its voxels as text (BinaryData = False), expected bytes")
    for name, value in (("slope", 1), ("offset", 0)):
        if numbers_in(fields.get(f"elementtointensityfunction{name}", str(value))) != [value]:
            raise header.error(f"rescales its voxels (ElementToIntensityFunction{name.title()})")
    orders = ("binarydatabyteordermsb", "elementbyteordermsb")
    if len({_is_true(header, name, "False") for name in orders if name in fields}) > 1:
        raise header.error("gives two orders of bytes")
    packed = _is_true(header, "compresseddata", "False")
    local = data_files(header) == [header.path]
    if (local and _skipped(header) > 0) or (packed and _skipped(header) < 0):
        raise header.error(f"has a HeaderSize of {_skipped(header)}, which does not fit its voxels")
    size = header.number("compresseddatasize", 0)
    if packed and (size < 0 or (local and size == 0)):
        raise header.error("does not give the size of its packed voxels (CompressedDataSize)")
    return GZIP if packed else RAW


def _is_true(header: TextHeader, name: str, default: str) -> bool:
    text = header.fields.get(name, default).lower()
    if text not in ("true", "t", "1", "false", "f", "0"):
        raise header.error(f"gives {text[:40] or 'nothing'} as its {name}, expected True or False")
    return text[0] in "t1"


def _skipped(header: TextHeader) -> int:
    """Return how many bytes stand before the voxels; -1: the voxels end the file."""
    names = ("byte skip", "byteskip") if header.is_nrrd else ("headersize",)
    skipped = next((header.number(name, 0) for name in names if name in header.fields), 0)
    if skipped < -1:
        raise header.error(f"has {skipped} bytes before its voxels")
    return skipped
