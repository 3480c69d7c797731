"""What users bring to be segmented: scan files, DICOM series, pictures; found and read."""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError, MissingFileError, first_few, warn
from common.files import safe_name
from datasets.scans.dicom import holds_dicom, read_dicom, read_dicom_header
from datasets.scans.pictures import opened_picture, read_picture
from datasets.scans.volumes import Geometry, accessible, known_name, read_header, read_volume

SCANS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
DICOM = "dicom"
EXPECTED = f"{', '.join((*SCANS, *PICTURES))} or a folder of DICOM files"


@dataclass(frozen=True)
class ScanFile:
    """One thing to segment: a file, or the folder of one DICOM series."""

    name: str  # of what is written for it
    path: Path
    suffix: str  # the format, or DICOM
    channel: int | None = None  # which 3-D volume of a 4-D file; None: it is 3-D

    @property
    def is_picture(self) -> bool:
        return self.suffix in PICTURES


def find_scans(path: str | Path) -> list[ScanFile]:
    """The scans that a path means: a file, a DICOM series, or a folder of either.

    DICOM series are found at any depth, as archives export them (patient/study/series), and named
    by their path below the folder.

    Raises:
        MissingFileError: nothing is there.
        InputError: no scan in it, an unknown format, or two of one name.
    """
    path = Path(path)
    with accessible(path):
        if path.is_file():
            suffix = suffix_of(path)
            if suffix is None:
                raise InputError(f"{path} is no scan or picture by its name; expected {EXPECTED}")
            return [scan_file(path, suffix)]
        if not path.is_dir():
            raise MissingFileError(f"{path} does not exist; expected {EXPECTED}")
        inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        found = [scan_file(p, suffix) for p in inside if p.is_file() and (suffix := suffix_of(p))]
        series = _series_below(path)
        if holds_dicom(inside):
            return [_one_series(path, found, series)]
    found += series
    if not found:
        raise InputError(
            f"{path} holds no scan; expected {EXPECTED} (below it only DICOM is looked for: give "
            "the folder that the files themselves lie in)"
        )
    names: dict[str, list[str]] = defaultdict(list)
    for scan in found:
        names[scan.name].append(scan.path.name)
    doubled = [" and ".join(files) for files in names.values() if len(files) > 1]
    if doubled:
        raise InputError(
            f"{path} holds {first_few(doubled)}, whose results would have one name; rename them"
        )
    return found


def _one_series(path: Path, beside: list[ScanFile], below: list[ScanFile]) -> ScanFile:
    """A folder that holds DICOM slices itself: it is one series, and nothing else."""
    if beside:
        others = first_few([scan.path.name for scan in beside])
        raise InputError(
            f"{path} holds DICOM slices beside {others}; put them into a folder of their own"
        )
    if below:
        others = first_few([str(scan.path.relative_to(path)) for scan in below])
        warn(f"{path} is taken for one DICOM series; those in folders below are left out: {others}")
    return scan_file(path.resolve(), DICOM)


def _series_below(path: Path) -> list[ScanFile]:
    """DICOM series in visible folders at any depth; what may not be read is warned of."""

    def left_out(error: OSError) -> None:
        warn(f"cannot read {error.filename} ({error.strerror}); what it holds is left out")

    found = []
    for folder, names, _ in os.walk(path, onerror=left_out):
        names[:] = [name for name in names if not name.startswith(".")]
        for below in (Path(folder, name) for name in names):
            with contextlib.suppress(OSError):  # the walk comes to it and says so
                if holds_dicom(below.iterdir()):
                    name = "_".join(below.relative_to(path).parts)
                    below = Path(known_name(below))
                    found.append(ScanFile(safe_name(name, source=path), below, DICOM))
    return sorted(found, key=lambda scan: scan.path)


def of_channel(scans: Sequence[ScanFile], channel: int | None) -> list[ScanFile]:
    """What is to be read where the data set has several channels and one was trained on.

    Of files that are named as nnU-Net's channels (`NAME_0000`, `NAME_0001`) those of the channel,
    of 4-D files that volume. What is left out is warned of.

    Args:
        channel: from 0; None: all scans as they are.
    """
    if channel is None:
        return list(scans)
    parts = [re.fullmatch(r"(.+)_(\d{4})", scan.name) for scan in scans]
    # sets of channels start at 0: of pat_0001 … pat_0004 each is a scan of its own
    sets = {match[1] for match in parts if match and match[2] == "0000"}
    complete = {match[1] for match in parts if match and int(match[2]) == channel} & sets
    chosen, left_out, foreign = [], [], []
    for scan, match in zip(scans, parts, strict=True):
        if match and match[1] in sets and int(match[2]) != channel:
            if match[1] in complete:
                left_out.append(scan.name)
                continue
            foreign.append(scan.name)
        chosen.append(replace(scan, channel=channel))
    if left_out:
        warn(f"channel {channel} was trained on; left out as others: {first_few(left_out)}")
    if foreign:
        warn(f"channel {channel} was trained on; by their names of another: {first_few(foreign)}")
    return chosen


def suffix_of(path: Path) -> str | None:
    """The known suffix that a file name ends with."""
    name = path.name.lower()
    return next((suffix for suffix in (*SCANS, *PICTURES) if name.endswith(suffix)), None)


def scan_file(path: Path, suffix: str, channel: int | None = None) -> ScanFile:
    """One scan, named as its file without the suffix."""
    known_name(path)
    name = path.name if suffix == DICOM else path.name[: -len(suffix)]
    return ScanFile(safe_name(name, source=path.parent), path, suffix, channel)


def stamp(path: Path) -> list[list[Any]]:
    """Names, sizes and times of the files of a scan, in plain JSON: they tell that it changed."""
    files = sorted(path.iterdir()) if path.is_dir() else [path, *_data_files(path)]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _data_files(path: Path) -> list[Path]:
    """The files beside a header that it names: one, a list of them, or a numbered pattern."""
    if suffix_of(path) not in (".mhd", ".nhdr"):
        return []
    with path.open("rb") as file:
        lines = file.read(1 << 20).decode("utf-8", "replace").splitlines()
    named = [re.split(r"[:=]+", line, maxsplit=1)[-1].strip() for line in lines]
    numbered = [re.sub(r"%\d*d", "*", name.split()[0]) for name in named if "%" in name]
    return [
        file
        for file in sorted(path.parent.iterdir())
        if file.name in named or any(fnmatchcase(file.name, pattern) for pattern in numbered)
    ]


def read_scan(scan: ScanFile) -> tuple[np.ndarray, Geometry | None]:
    """Read one scan, whatever its format.

    Returns:
        (D, H, W) voxels in the file's dtype with their geometry; of a picture (1, H, W) or, in
        colour, (1, 3, H, W) and None.

    Raises:
        InputError: it is damaged, of more than one value a voxel, or a series with missing,
            doubled or uneven slices.
    """
    if scan.is_picture:
        return read_picture(scan.path), None
    if scan.suffix == DICOM:
        return read_dicom(scan.path)
    return read_volume(scan.path, scan.channel)


def read_scan_header(scan: ScanFile) -> tuple[tuple[int, ...], Geometry | None]:  # (D, H, W)
    """Shape and geometry of a scan without its voxels; raises as `read_scan` does."""
    if scan.is_picture:
        with opened_picture(scan.path) as picture:
            return (1, picture.height, picture.width), None
    if scan.suffix == DICOM:
        return read_dicom_header(scan.path)
    return read_header(scan.path, scan.channel)
