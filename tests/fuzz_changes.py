"""How fuzzing changes sound files: bytes, fields of headers, what is compressed, JSON values."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

Change = Callable[[bytes, random.Random], bytes]

ODD_NUMBERS = (0, 1, -1, 2, 7, 8, 11, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32,
               -(2**31), 2**63 - 1, -(2**63))  # fmt: skip
ODD_TEXTS = (b"0", b"-1", b"1", b"11", b"99", b"3.5", b"9999999999", b"99999999999999999999",
             b"nan", b"inf", b"1e400", b"1e-300", b"", b"abc", b"%n%s", b"\x1b[2J", b"\xff\xfe",
             b"True", b"../../secret.raw", b"/etc/passwd", b"LIST", b"none", b"\0")  # fmt: skip
# What may stand anywhere in a JSON file that somebody edited.
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 10**400, 1.5, -0.0, 1e308, float("nan"),
    float("inf"), "", " ", "a", "a\nb", "a\0b", "../../x", "/etc/passwd", "=1+1", "\x1b[2J",
    "\u2028", "\ud800", "<script>", "x" * 5000, [], [[]], [None], {}, {"": None}, [1, 2, 3],
    ["a", "a"], {"a": {"b": [1, {"c": 2}]}},
)  # fmt: skip


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut, repeat or insert some bytes; half of the time near the beginning."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        end = len(data) if rng.random() < 0.5 else min(len(data), 400)
        place, length = rng.randrange(end + 1), rng.choice((1, 2, 4, 8, 64))
        what = rng.randrange(8)
        if what == 0 and data:
            data[min(place, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif what == 1:
            data[place : place + length] = rng.randbytes(length)
        elif what == 2:
            data[place : place + length] = bytes([rng.choice((0, 0xFF))]) * length
        elif what == 3:
            kind = rng.choice(("<h", ">h", "<i", ">i", "<q", ">q"))
            number = rng.choice(ODD_NUMBERS) % 2 ** (8 * struct.calcsize(kind))
            packed = struct.pack(kind.upper(), number)
            data[place : place + len(packed)] = packed
        elif what == 4:
            packed = struct.pack(rng.choice(("<f", ">f")), rng.choice((0, -1, 1e30, 1e-30)))
            odd = rng.choice(
                (packed, struct.pack("<f", float("nan")), struct.pack("<I", 0x7F800000))
            )
            data[place : place + 4] = odd
        elif what == 5:
            del data[place : place + (length if rng.random() < 0.7 else len(data))]
        elif what == 6:
            data[place:place] = data[place : place + length * 4]
        else:
            data[place:place] = rng.randbytes(length)
    return bytes(data)


def change_text_header(content: bytes, rng: random.Random) -> bytes:
    """Replace numbers and words in the lines before the voxels, or repeat or drop lines."""
    end = min(len(content), 1500)
    for mark in (b"ElementDataFile = LOCAL\n", b"\n\n"):
        if mark in content[:1500]:
            end = content.index(mark) + len(mark)
            break
    head, body = content[:end], content[end:]
    for _ in range(rng.choice((1, 1, 2, 3))):
        lines = head.splitlines(keepends=True)
        if not lines:
            break
        place = rng.randrange(len(lines))
        what = rng.randrange(5)
        if what == 0:
            lines.insert(place, rng.choice(lines))
        elif what == 1:
            del lines[place]
        else:
            pattern = rb"-?[\d.]+" if what < 4 else rb"[\w.()/-]+"
            found = list(re.finditer(pattern, lines[place]))
            if found:
                match = rng.choice(found)
                line = lines[place]
                lines[place] = line[: match.start()] + rng.choice(ODD_TEXTS) + line[match.end() :]
        head = b"".join(lines)
    return head + body


def change_gzipped(content: bytes, rng: random.Random) -> bytes:
    """Change what is compressed, and compress it again."""
    return gzip.compress(change_bytes(gzip.decompress(content), rng), 1, mtime=0)


def change_zipped(content: bytes, rng: random.Random) -> bytes:
    """Change, drop, repeat or compress the members of an archive; its checksums stay right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    place = rng.randrange(len(members))
    name, body = members[place]
    what = rng.randrange(6)
    method = zipfile.ZIP_STORED
    if what == 0:
        del members[place]
    elif what == 1:
        members.append(members[place])
    elif what == 2:
        members[place] = (rng.choice(("../" + name, "/" + name, name + "\0", "x")), body)
    elif what == 3:
        method = zipfile.ZIP_DEFLATED
        members[place] = (name, body + bytes(rng.choice((0, 1 << 16, 1 << 24))))
    else:
        members[place] = (name, change_bytes(body, rng))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for member, inner in members:
            archive.writestr(member, inner)
    return made.getvalue()


def change_deflated(content: bytes, rng: random.Random) -> bytes:
    """Change the voxels of a compressed MetaImage, and compress them again to another length."""
    mark = b"ElementDataFile = LOCAL\n"
    if mark not in content:
        return change_bytes(content, rng)
    end = content.index(mark) + len(mark)
    voxels = zlib.decompress(content[end:])
    return content[:end] + zlib.compress(change_bytes(voxels, rng))


def change_json(content: bytes, rng: random.Random) -> bytes:
    """Replace, drop or repeat values anywhere in a JSON text."""
    if rng.random() < 0.15:
        return change_bytes(content, rng)
    whole = [json.loads(content)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(whole))
        inner, key = rng.choice(places)
        what = rng.randrange(8)
        if what == 0 and isinstance(inner, dict):
            del inner[key]
        elif what == 1 and isinstance(inner, list):
            inner.append(inner[key])
        elif what == 2 and isinstance(inner, dict):
            inner[str(rng.choice(ODD_VALUES))] = inner[key]
        elif what == 3:
            deep: Any = inner[key]
            for _ in range(rng.choice((1, 3, 2000))):
                deep = [deep]
            return _dumped(whole).replace(_dumped(inner[key]), b"[" * 2000 + b"]" * 2000, 1)
        else:
            inner[key] = rng.choice(ODD_VALUES)
        if not whole:
            return b""
    return _dumped(whole[0])


def change_json_lines(content: bytes, rng: random.Random) -> bytes:
    """Change, cut, drop or repeat lines, of which each may be JSON."""
    lines = content.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    what = rng.randrange(5)
    if what == 0:
        del lines[place]
    elif what == 1:
        lines.insert(place, rng.choice(lines))
    elif what == 2:
        lines[place] = rng.choice(ODD_TEXTS) + b"\n"
    elif what == 3:
        lines[place] = lines[place][: rng.randrange(len(lines[place]))]
    elif lines[place].startswith((b"{", b"[")):
        lines[place] = change_json(lines[place], rng) + b"\n"
    return b"".join(lines)


def _places(inner: Any) -> list[tuple[Any, Any]]:
    keys = inner.keys() if isinstance(inner, dict) else range(len(inner))
    found = [(inner, key) for key in keys]
    for key in keys:
        if isinstance(inner[key], (dict, list)):
            found += _places(inner[key])
    return found


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()
