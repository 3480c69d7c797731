"""DICOM files written byte by byte, as other programs and scanners write them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import InputError
from datasets.scans.dicom import read_dicom, read_dicom_header

CT, ENHANCED_CT, MR, PET, NM = (
    f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("2", "2.1", "4", "128", "20")
)
XRAY, RTSTRUCT, SEG = (f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("1.1", "481.3", "66.4"))
EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
LONG = ("OB", "OW", "SQ", "UN", "UT")
UID = "1.2.826.0.1.3680043.2.1125"
UNDEFINED = 0xFFFFFFFF
STORED = np.random.default_rng(0).integers(0, 4000, (4, 5, 6)).astype(np.uint16)  # (D, H, W)
ALONG_Z = (1, 0, 0, 0, 1, 0, 0, 0, 1)

Element = tuple[int, int, str, Any]


def element(group: int, number: int, kind: str, value: Any, *, explicit: bool = True) -> bytes:
    """Return the bytes of an element; a list becomes a sequence of items of undefined length."""
    if isinstance(value, list):
        start, end = (
            struct.pack("<HHI", 0xFFFE, 0xE000, UNDEFINED),
            struct.pack("<HHI", 0xFFFE, 0xE00D, 0),
        )
        items = b"".join(start + elements(item, explicit=explicit) + end for item in value)
        return (
            struct.pack("<HH", group, number)
            + (b"SQ\0\0" if explicit else b"")
            + struct.pack("<I", UNDEFINED)
            + items
            + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
        )
    if kind == "US":
        value = struct.pack("<H", value)
    elif isinstance(value, (tuple, float, int)):
        numbers = value if isinstance(value, tuple) else (value,)
        value = "\\".join(f"{number:.10g}" for number in numbers)
    value = value.encode() if isinstance(value, str) else value
    value += (b"\0" if kind in ("UI", "OB") else b" ") * (len(value) % 2)
    size = struct.pack("<I", len(value))
    if explicit:
        short = kind.encode() + struct.pack("<H", len(value) & 0xFFFF)
        size = kind.encode() + b"\0\0" + size if kind in LONG else short
    return struct.pack("<HH", group, number) + size + value


def elements(many: Sequence[Element], *, explicit: bool = True) -> bytes:
    """Return the bytes of elements, ordered by their tags."""
    ordered = sorted(many, key=lambda one: one[:2])
    return b"".join(
        element(group, number, kind, value, explicit=explicit)
        for group, number, kind, value in ordered
    )


def slice_tags(
    stored: np.ndarray,
    *,
    position: Sequence[float] | None = (0, 0, 0),
    axes: Sequence[float] = (1, 0, 0, 0, 1, 0),
    spacing: Sequence[float] | None = (0.7, 0.7),
    rescale: Sequence[float] | None = (1, -1024),
    kind: str = CT,
    modality: str = "CT",
    number: int = 1,
    **changes: Any,
) -> dict[str, Element]:
    """Return the elements of one slice by their names, for `write_dicom_file`.

    Args:
        stored: (H, W), or (frames, H, W), of 16 bits.
        changes: elements or None, by the name below or a new name, that replace or remove one.
    """
    signed = int(stored.dtype.kind == "i")
    tags: dict[str, Element | None] = {
        "kind": (0x08, 0x16, "UI", kind),
        "instance": (0x08, 0x18, "UI", f"{UID}.1.{number}"),
        "modality": (0x08, 0x60, "CS", modality),
        "study": (0x20, 0x0D, "UI", UID),
        "series": (0x20, 0x0E, "UI", f"{UID}.1"),
        "number": (0x20, 0x13, "IS", number),
        "samples": (0x28, 0x02, "US", 1),
        "photometric": (0x28, 0x04, "CS", "MONOCHROME2"),
        "rows": (0x28, 0x10, "US", stored.shape[-2]),
        "columns": (0x28, 0x11, "US", stored.shape[-1]),
        "allocated": (0x28, 0x100, "US", 16),
        "bits": (0x28, 0x101, "US", 16),
        "high": (0x28, 0x102, "US", 15),
        "signed": (0x28, 0x103, "US", signed),
        "pixels": (0x7FE0, 0x10, "OW", stored.astype("<i2" if signed else "<u2").tobytes()),
    }
    if stored.ndim == 3:
        tags["frames"] = (0x28, 0x08, "IS", len(stored))
    if position is not None:
        tags["position"] = (0x20, 0x32, "DS", tuple(position))
        tags["axes"] = (0x20, 0x37, "DS", tuple(axes))
    if spacing is not None:
        tags["spacing"] = (0x28, 0x30, "DS", tuple(spacing))
    if rescale is not None:
        tags["slope"] = (0x28, 0x1053, "DS", rescale[0])
        tags["intercept"] = (0x28, 0x1052, "DS", rescale[1])
    return {name: one for name, one in (tags | changes).items() if one is not None}


def write_dicom_file(
    path: Path,
    tags: dict[str, Element],
    *,
    preamble: bool = True,
    meta: bool = True,
    syntax: str = EXPLICIT,
) -> Path:
    """Write the elements as a DICOM file.

    Args:
        preamble: 128 bytes and DICM come first.
        meta: the elements of group 2 come next.
    """
    head = b""
    if meta:
        named = [(2, 2, "UI", tags["kind"][3]), (2, 3, "UI", tags["instance"][3])]
        rest = elements([(2, 1, "OB", b"\0\1"), *named, (2, 16, "UI", syntax)])
        head = element(2, 0, "UL", struct.pack("<I", len(rest))) + rest
    start = bytes(128) + b"DICM" if preamble else b""
    body = elements(list(tags.values()), explicit=syntax != IMPLICIT)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(start + head + body)
    return path


def write_series(
    folder: Path, stored: np.ndarray, places: Sequence[float] | None = None, **tags: Any
) -> Path:
    """Write (D, H, W) stored values as a series along z, in files named by the slice."""
    places = [2.5 * index for index in range(len(stored))] if places is None else places
    for index, place in enumerate(places):
        one = slice_tags(stored[index], position=(-10, -20, place), number=index + 1, **tags)
        write_dicom_file(folder / f"{index:02}.dcm", one)
    return folder


def refused(folder: Path, *told: str) -> None:
    """Check that a series is refused in one line that holds these texts."""
    for read in (read_dicom, read_dicom_header):
        with pytest.raises(InputError) as caught:
            read(folder)
        assert "\n" not in str(caught.value)
        for text in told:
            assert text in str(caught.value)
