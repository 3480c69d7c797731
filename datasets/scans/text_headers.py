"""What the text headers of NRRD and MetaImage (.mha, .mhd) files say; SimpleITK ignores some of it.

SimpleITK takes every length for mm, whatever the unit, and a size that is not a number for 1 mm.
Its library for MetaImage trusts the header: more than ten dimensions end the process.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import InputError

LONGEST = 1 << 20  # bytes of a header
NRRD, META = (".nrrd", ".nhdr"), (".mha", ".mhd")  # suffixes
SEGMENTATION = ".seg.nrrd"  # of 3D Slicer: NRRD with the names of its labels
# Units of length that mean mm, or that nobody gave; units of axes that are no lengths.
MM = (
    "mm",
    "millimeter",
    "millimeters",
    "millimetre",
    "millimetres",
    "",
    "none",
    "unknown",
    "?",
    "???",
)
NO_LENGTHS = ("s", "sec", "second", "seconds", "ms", "us", "hz", "ppm", "rad", "rads")
REMEDY = "write the sizes in mm into the header, or export the scan again as NIfTI"
LONGEST_WORD, LONGEST_LINE = 40, 500  # characters; SimpleITK's library for NRRD dies of longer ones
FREE_TEXT = ("content", "data file", "datafile")  # fields of NRRD that it only copies
LIST = re.compile(r"^data ?file:\s*LIST[^\n]*\n", re.MULTILINE)  # the files follow
MOST_DIMENSIONS = 10  # SimpleITK's library would write beyond its arrays
# Fields of MetaImage that hold numbers: one for each dimension, or a matrix.
VECTORS = ("elementspacing", "elementsize", "offset", "position", "origin", "centerofrotation")
MATRICES = ("transformmatrix", "rotation", "orientation")
# Fields of text that its library copies into places of 255 characters.
TEXTS = ("comment", "name", "objecttype", "objectsubtype", "transformtype", "acquisitiondate")
TEXTS += ("anatomicalorientation", "modality", "distanceunits", "binarydatabyteordermsb")
LONGEST_TEXT, LONGEST_FIELD = 250, 4000
# Fields that SimpleITK reads: written twice, the header says two things.
ONCE = (*VECTORS, *MATRICES, "ndims", "dimsize", "elementtype", "elementdatafile", "headersize")
ONCE += ("binarydata", "binarydatabyteordermsb", "elementbyteordermsb", "compresseddata")
ONCE += ("compresseddatasize", "elementnumberofchannels", "distanceunits")


@dataclass(frozen=True)
class TextHeader:
    """The header of an NRRD or a MetaImage file."""

    path: Path
    is_nrrd: bool
    fields: dict[str, str]  # names in lower case
    end: int  # bytes; where the voxels begin, if they are in the same file
    after: str  # the text after the header, in which a list of files stands

    def number(self, name: str, default: int) -> int:
        """Return a whole number; raises an `InputError` if it is none."""
        text = self.fields.get(name, str(default))
        if not re.fullmatch(r"[+-]?\d{1,18}", text):
            raise self.error(f"gives {text:.40} as its {name}, expected a whole number")
        return int(text)

    def error(self, what: str) -> InputError:
        return InputError(f"{self.path} {what}; export the scan again, e.g. as NIfTI")


def text_header(path: Path) -> TextHeader | None:
    """Return the header of an NRRD or MetaImage file, told by its content; None: neither.

    Raises:
        InputError: a field is given twice, or the header of a MetaImage file has no end.
    """
    with path.open("rb") as file:
        content = file.read(LONGEST)
    if content.startswith(b"NRRD000"):
        return _nrrd(path, content)
    if content.startswith(b"ObjectType") or path.suffix.lower() in META:
        return _metaimage(path, content)
    return None


def _nrrd(path: Path, content: bytes) -> TextHeader:
    blank = re.search(rb"\r?\n\r?\n", content)
    end = blank.end() if blank else len(content)
    text = content[:end].decode("latin-1")
    head, *listed = re.split(LIST, text, maxsplit=1)
    lines = [line for line in re.split(r"[\r\n]+", head) if line[:1] != "#" and ":=" not in line]
    for line in lines:
        words = re.split(r'[\s(),":]+', line)
        if line.split(":")[0].lower() not in FREE_TEXT and (
            len(line) > LONGEST_LINE or max(map(len, words)) > LONGEST_WORD
        ):
            raise InputError(
                f"{path} has a line in its header that is no field of NRRD ({line[:60]!r}…); "
                "export the scan again, e.g. as NIfTI"
            )
    fields = _fields(path, [line.split(":", 1) for line in lines])
    if listed:
        fields["data file"] = "LIST"
    return TextHeader(path, True, fields, end, "".join(listed))


def _metaimage(path: Path, content: bytes) -> TextHeader:
    last = re.search(rb"^[ \t]*ElementDataFile[ \t]*[=:][^\r\n]*\r?\n?", content, re.MULTILINE)
    if last is None:
        raise InputError(
            f"{path} is not a readable scan (no MetaImage header by its content); it may be "
            "damaged, or of another format than its name says: fetch or export it again"
        )
    lines = re.split(r"[\r\n]+", content[: last.end()].decode("latin-1"))
    # SimpleITK takes a colon for an equals sign as well.
    fields = _fields(path, [re.split("[=:]", line, maxsplit=1) for line in lines])
    for name, value in fields.items():
        if len(name) + len(value) > (LONGEST_TEXT if name in TEXTS else LONGEST_FIELD):
            raise InputError(
                f"{path} has {len(value)} characters in its field {name[:60]!r}, too many for "
                "SimpleITK; shorten it, or export the scan again as NIfTI"
            )
    return TextHeader(path, False, fields, last.end(), content[last.end() :].decode("latin-1"))


def _fields(path: Path, pairs: list[list[str]]) -> dict[str, str]:
    """Return the values by the names of the fields, in lower case."""
    fields: dict[str, str] = {}
    for name, *value in pairs:
        key, text = name.strip().lower(), "".join(value).strip()
        if key in fields and key in ONCE:
            raise InputError(
                f"{path} gives its field {key} twice, as {fields[key]:.40} and {text:.40}; "
                "export the scan again, e.g. as NIfTI"
            )
        if value:
            fields[key] = text
    return fields


def voxel_size_text(fields: dict[str, str]) -> str | None:
    """Return what the fields of a header say about the size of voxels; None: nothing."""
    names = ("space directions", "spacings", "elementspacing", "elementsize")
    return next((fields[name] for name in names if name in fields), None)


def refuse_other_sizes(header: TextHeader) -> None:
    """Refuse a size of voxels that is in another unit than mm or is no size, and a place of NaN.

    Raises:
        InputError: see above.
    """
    fields, path = header.fields, header.path
    for name in ("space units", "units", "distanceunits"):
        units = re.findall(r'"([^"]*)"', fields.get(name, "")) or fields.get(name, "").split()
        known = MM + NO_LENGTHS * (name == "units")
        if other := [unit for unit in units if unit.strip().lower() not in known]:
            raise InputError(f"{path} has its {name} in {other[0]:.40}, expected mm; {REMEDY}")
    text = voxel_size_text(fields)
    if text is not None:
        axes = sized_axes(text)
        wrong = [axis for axis in axes if not _is_size(axis)]
        if len(axes) - len(wrong) < min(3, len(axes)):  # a fourth axis, of channels, may have none
            raise InputError(f"{path} gives {wrong[0]:.60} as a size of its voxels; {REMEDY}")
    if header.is_nrrd:
        if re.search(r"nan|inf", fields.get("space origin", ""), re.IGNORECASE):
            raise header.error(f"gives {fields['space origin']:.60} as its space origin")
        return
    dimensions = header.number("ndims", 0)
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise header.error(
            f"has {dimensions} dimensions by its field NDims, expected 3 (slice, row, column) or 2"
        )
    for names, count in ((VECTORS, dimensions), (MATRICES, dimensions**2)):
        for name in set(names) & fields.keys():
            if len(numbers_in(fields[name])) != count:
                raise header.error(
                    f"gives {fields[name]:.60} as its {name}, expected {count} finite numbers"
                )


def numbers_in(text: str) -> list[float]:
    """Return the finite numbers of a text; of any other text, none."""
    try:
        values = [float(part) for part in text.split()]
    except ValueError:
        return []
    return values if all(map(math.isfinite, values)) else []


def sized_axes(text: str) -> list[str]:
    """Return the text of each axis that has a size."""
    return [axis for axis in re.findall(r"\([^)]*\)|[^\s()]+", text) if axis.lower() != "none"]


def _is_size(axis: str) -> bool:
    """Return whether a text is a number or a vector that is a length."""
    try:
        values = [float(part) for part in re.split(r"[,\s]+", axis.strip("() "))]
    except ValueError:
        return False
    return all(map(math.isfinite, values)) and any(values)
