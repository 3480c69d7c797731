"""Files below an input folder that no program reads: each is named, with the reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.errors import first_few

UNKNOWN = "of an unknown suffix, and not DICOM"
SUBFOLDER = "in a subfolder, where only DICOM is looked for"
HIDDEN = "hidden"
BROKEN = "a link to nothing, or not a file"
SEEN = "a link to a folder that is searched already"
BELOW_SERIES = "below the folder of a DICOM series"
BESIDE_SERIES = "not DICOM, beside DICOM slices"
NO_IMAGE = "DICOM without an image of a scan"
LABELS = "a segmentation of 3D Slicer, not a scan"
OTHER_CHANNEL = "of another channel"
# Notes, tables and what operating systems leave behind are expected beside scans.
NOTES = (
    *(".txt", ".md", ".json", ".xml", ".csv", ".tsv", ".xlsx", ".pdf", ".htm", ".html", ".log"),
    *(".ini", ".db", ".yaml", ".yml", ".inf", ".exe", ".bval", ".bvec", ".ctbl", ".sha256", ".md5"),
)
NOTE_NAMES = ("readme", "license", "licence", "dicomdir", "version", "lockfile")


@dataclass(frozen=True)
class Unused:
    """A file, or a folder with all it holds, that is not read."""

    path: str  # below the folder that was searched; a folder ends in /
    reason: str

    @property
    def is_note(self) -> bool:
        """Whether nobody would expect it to be read, e.g. README.txt or DICOMDIR."""
        name = PurePosixPath(self.path).name.lower()
        return (
            name.endswith(NOTES)
            or name in NOTE_NAMES
            or name.startswith(("._", ".ds_store", ".git"))
        )


def counted(unused: Sequence[Unused]) -> str:
    """Return the number of files for each reason and the first few names, as one line."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for one in unused:
        by_reason[one.reason].append(one.path)
    return "; ".join(
        f"{len(paths)} {reason} ({first_few(paths, 3)})" for reason, paths in by_reason.items()
    )


def path_below(path: Path, source: Path) -> str:
    """Return a path below the input folder; of the input itself, and outside of it, the name.

    Args:
        source: the folder, a scan, or a table of scans, whose folder it then is.
    """
    if path.resolve() != source.resolve() and source.is_file():
        source = source.parent
    inside = path.resolve() != source.resolve() and path.absolute().is_relative_to(
        source.absolute()
    )
    return path.absolute().relative_to(source.absolute()).as_posix() if inside else path.name
