"""The tags of a DICOM file, read from its bytes, and what a file is by them.

GDCM shows neither the tags of a file that is not an image nor those of the frames in a file, and
for some kinds of image it ignores where the slice lies. So the tags are read here.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
PREFIX = 132  # bytes: a preamble of 128, then "DICM"
UNDEFINED = 0xFFFFFFFF  # length of a sequence that an element ends
ITEM, END_OF_ITEM, END_OF_SEQUENCE = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
PIXELS = 0x7FE00010
FLOAT_PIXELS = (0x7FE00008, 0x7FE00009)
LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
SHORT = tuple(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"  # transfer syntaxes
TRANSFER_SYNTAX, KIND_OF_FILE = 0x00020010, 0x00020002
KIND, INSTANCE, MODALITY, SERIES = 0x00080016, 0x00080018, 0x00080060, 0x0020000E
DIRECTORY = "1.2.840.10008.1.3.10"  # a table of contents, usually named DICOMDIR
KEPT = 1 << 16  # bytes; longer values are tables and private data
MOST_UNPACKED = 1 << 30  # bytes of a deflated file
DEEPEST = 20  # sequences in sequences; deeper ones come from damaged bytes

# By tag: bytes, or the tags of each item of a sequence, or where the pixels are.
Tags = dict[int, Any]


class NotDicomError(ValueError):
    """The bytes are not DICOM, or end too early."""


@dataclass(frozen=True)
class Pixels:
    """Where the pixels are in a file, in bytes."""

    start: int
    length: int
    end_of_file: int

    @property
    def is_compressed(self) -> bool:
        return self.length == UNDEFINED

    @property
    def is_cut_short(self) -> bool:
        return not self.is_compressed and self.start + self.length > self.end_of_file


@dataclass(frozen=True)
class DicomFile:
    """A file and its tags up to the pixels."""

    path: Path
    tags: Tags
    little: bool = True  # byte order

    def text(self, tag: int, tags: Tags | None = None) -> str:
        """Return a text; without the tag, an empty one."""
        value = (self.tags if tags is None else tags).get(tag, b"")
        if not isinstance(value, bytes):
            return ""
        return value.decode("latin-1").strip(" \0\t\r\n")

    def floats(self, tag: int, count: int, tags: Tags | None = None) -> tuple[float, ...] | None:
        """Return decimal numbers (DS, IS); None without the tag.

        Raises:
            ValueError: there are more or fewer, or other texts than numbers.
        """
        text = self.text(tag, tags)
        if not text:
            return None
        numbers = tuple(float(part) for part in text.split("\\"))
        if len(numbers) != count or not all(abs(number) < float("inf") for number in numbers):
            raise ValueError(f"expected {count} numbers")
        return numbers

    def whole(self, tag: int, default: int = 0) -> int:
        """Return a number of 16 bits (US)."""
        value = self.tags.get(tag, b"")
        if not isinstance(value, bytes) or len(value) < 2:
            return default
        return int.from_bytes(value[:2], "little" if self.little else "big")

    def items(self, tag: int, tags: Tags | None = None) -> list[Tags]:
        """Return the items of a sequence; without the tag, none."""
        value = (self.tags if tags is None else tags).get(tag, [])
        return value if isinstance(value, list) else []

    @property
    def has_pixels(self) -> bool:
        return PIXELS in self.tags

    @property
    def pixels(self) -> Pixels:
        return self.tags[PIXELS]

    @property
    def modality(self) -> str:
        return self.text(MODALITY)

    @property
    def transfer_syntax(self) -> str:
        return self.text(TRANSFER_SYNTAX)

    @property
    def is_directory(self) -> bool:
        return self.text(KIND_OF_FILE) == DIRECTORY or self.path.name == "DICOMDIR"


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM by its content; files without the preamble are recognised.

    Such a file starts with an element of group 2 or 8. Most other files are told by 8 bytes; of
    the rest, the tags are read, and must name a kind of object or a modality.
    """
    if path.name == "DICOMDIR" or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(PREFIX)
    if start[128:] == b"DICM":
        return True
    if len(start) < 8 or start[1] or start[0] not in (2, 8) or start[3]:
        return False
    explicit = start[4:6] in LONG + SHORT
    if not explicit and int.from_bytes(start[4:8], "little") > KEPT:
        return False
    try:
        tags = read_tags(path).tags
    except NotDicomError:
        return False
    return KIND in tags or MODALITY in tags


def read_tags(path: Path) -> DicomFile:
    """Read the tags up to the pixels.

    Raises:
        NotDicomError: the file is not DICOM, or ends within the tags, or what follows its pixels is
            not DICOM: for damaged bytes there, GDCM would take gigabytes before it fails.
    """
    with path.open("rb") as file:
        if file.read(PREFIX)[128:] != b"DICM":
            file.seek(0)
        tags = _Reader(file).elements(group=2)  # always explicit and little endian
        syntax = tags.get(TRANSFER_SYNTAX, b"").decode("latin-1").strip("\0 ")
        stream: IO[bytes] = file
        if syntax == DEFLATED:
            try:
                unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
                stream = io.BytesIO(unpacker.decompress(file.read(), MOST_UNPACKED))
            except zlib.error as error:
                raise NotDicomError(str(error)) from None
            if not unpacker.eof:
                raise NotDicomError("it is cut short, or more than 1 GiB")
        little = syntax != BIG_ENDIAN
        reader = _Reader(stream, little=little)
        tags |= reader.elements()
        found = DicomFile(path, tags, little)
        if found.has_pixels and not (found.pixels.is_compressed or found.pixels.is_cut_short):
            stream.seek(found.pixels.start + found.pixels.length)
            if any(stream.read()):  # GDCM takes zeros as the end
                stream.seek(found.pixels.start + found.pixels.length)
                reader.elements()
        return found


class _Reader:
    """Reads elements one after the other."""

    def __init__(self, file: IO[bytes], *, little: bool = True) -> None:
        self.file, self.order = file, "<" if little else ">"
        here = file.tell()
        self.end = file.seek(0, os.SEEK_END)
        file.seek(here)
        # Some files name another encoding than they have, so the first element decides.
        self.explicit = file.read(6)[4:] in LONG + SHORT
        file.seek(here)

    def elements(self, end: int | None = None, group: int | None = None, depth: int = 0) -> Tags:
        """Read elements up to a position, another group, the end of an item, or the pixels."""
        tags: Tags = {}
        if depth > DEEPEST:
            raise NotDicomError("sequences are nested too deep")
        while self.file.tell() < (self.end if end is None else end):
            if group is not None:
                (following,) = self.unpack("H")
                self.file.seek(-2, os.SEEK_CUR)
                if following != group:
                    break
            tag, kind, length = self.head()
            if tag == END_OF_ITEM:
                break
            if tag in (PIXELS, *FLOAT_PIXELS) and depth == 0:
                tags[tag] = Pixels(self.file.tell(), length, self.end)
                break
            tags[tag] = self.value(kind, length, depth)
        return tags

    def head(self) -> tuple[int, bytes, int]:
        """Read tag, kind of value and length."""
        group, element = self.unpack("HH")
        tag = group << 16 | element
        if group == 0xFFFE or not self.explicit:
            return tag, b"", self.unpack("I")[0]
        kind = self.take(2)
        if kind not in LONG + SHORT:
            raise NotDicomError(f"unknown kind of value {kind!r}")
        if kind in LONG:
            self.take(2)
            return tag, kind, self.unpack("I")[0]
        return tag, kind, self.unpack("H")[0]

    def value(self, kind: bytes, length: int, depth: int) -> Any:
        if kind == b"SQ" or length == UNDEFINED:
            # An unknown value of undefined length is a sequence in the implicit encoding.
            explicit, self.explicit = self.explicit, self.explicit and kind != b"UN"
            items = self.sequence(length, depth)
            self.explicit = explicit
            return items
        if not self.explicit and length > 0 and (start := self.take(min(4, length))):
            if start == b"\xfe\xff\x00\xe0":  # an item, so this is a sequence
                self.file.seek(-4, os.SEEK_CUR)
                return self.sequence(length, depth)
            self.file.seek(-len(start), os.SEEK_CUR)
        if self.file.tell() + length > self.end:
            raise NotDicomError("the file ends within a value")
        if length > KEPT:
            self.file.seek(length, os.SEEK_CUR)
            return b""
        return self.take(length)

    def sequence(self, length: int, depth: int) -> list[Tags]:
        stop = None if length == UNDEFINED else self.file.tell() + length
        items = []
        while stop is None or self.file.tell() < stop:
            tag, _, size = self.head()
            if tag == END_OF_SEQUENCE:
                break
            if tag != ITEM:
                raise NotDicomError("a sequence holds something else than items")
            end = None if size == UNDEFINED else self.file.tell() + size
            items.append(self.elements(end, depth=depth + 1))
        return items

    def unpack(self, kinds: str) -> tuple[int, ...]:
        layout = struct.Struct(self.order + kinds)
        return layout.unpack(self.take(layout.size))

    def take(self, count: int) -> bytes:
        value = self.file.read(count)
        if len(value) < count:
            raise NotDicomError("the file ends within its tags")
        return value
