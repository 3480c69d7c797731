"""What the text headers of NRRD and MetaImage (.mha, .mhd) files say; SimpleITK ignores some of it.

SimpleITK takes every length for mm, whatever the unit, and a size that is not a number for 1 mm.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from common.errors import InputError

LONGEST = 1 << 16  # bytes of a header
NRRD, META = (".nrrd", ".nhdr"), (".mha", ".mhd")
# Lengths other than mm, in lower case. Axes of time have other units.
OTHER_UNITS = re.compile(
    r"m|dm|cm|um|\u00b5m|\u00c2\u00b5m|\u03bcm|nm|microns?|in|inch|inches"
    r"|(deci|centi|micro|nano)?met(er|re)s?"
)
REMEDY = "write the sizes in mm into the header, or export the scan again as NIfTI"


def text_header(path: Path) -> dict[str, str]:
    """Return the fields of a header, names in lower case; {} for files of other formats."""
    suffix = path.suffix.lower()
    if suffix not in NRRD + META:
        return {}
    with path.open("rb") as file:
        text = file.read(LONGEST).decode("latin-1")
    if suffix in NRRD:
        lines = re.split(r"\n\r?\n", text, maxsplit=1)[0].splitlines()
        pairs = [re.split(r":=?", line, maxsplit=1) for line in lines if not line.startswith("#")]
    else:
        # The voxels follow the line ElementDataFile.
        lines = re.split(r"^ElementDataFile", text, maxsplit=1, flags=re.MULTILINE)[0].splitlines()
        pairs = [line.split("=", 1) for line in lines]
    return {pair[0].strip().lower(): pair[1].strip() for pair in pairs if len(pair) == 2}


def voxel_size_text(header: dict[str, str]) -> str | None:
    """Return what a header says about the size of voxels; None: nothing."""
    names = ("space directions", "spacings", "elementspacing", "elementsize")
    return next((header[name] for name in names if name in header), None)


def refuse_other_sizes(path: Path) -> None:
    """Refuse a size of voxels that is in another unit than mm, or is no size.

    Raises:
        InputError: see above.
    """
    header = text_header(path)
    for name in ("space units", "units", "distanceunits"):
        units = re.findall(r"[^\s\"]+", header.get(name, ""))
        if other := [unit for unit in units if OTHER_UNITS.fullmatch(unit.lower())]:
            raise InputError(f"{path} has its {name} in {other[0]}, expected mm; {REMEDY}")
    text = voxel_size_text(header)
    if text is None:
        return
    axes = sized_axes(text)
    wrong = [axis for axis in axes if not _is_size(axis)]
    if len(axes) - len(wrong) < min(3, len(axes)):  # a fourth axis, of channels, may have none
        raise InputError(f"{path} gives {wrong[0]} as a size of its voxels; {REMEDY}")


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
