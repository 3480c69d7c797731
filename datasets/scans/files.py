"""Finding and reading of the scan files, DICOM series and pictures that a user names."""

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
from datasets.scans.errors import reporting_os_errors, utf8_path
from datasets.scans.pictures import opened_picture, read_picture
from datasets.scans.volumes import Geometry, read_header, read_volume

SCANS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
DICOM = "dicom"
EXPECTED = f"{', '.join(SCANS + PICTURES)} or a folder of DICOM files"


@dataclass(frozen=True)
class ScanFile:
    """One scan or picture: a file, or the folder of one DICOM series."""

    name: str  # results for this scan have this name
    path: Path
    suffix: str  # the format; DICOM for a series
    channel: int | None = None  # index of the volume in a 4-D file; None: the file is 3-D

    @property
    def is_picture(self) -> bool:
        return self.suffix in PICTURES


def find_scans(path: str | Path) -> list[ScanFile]:
    """Find the scans at a path: a file, a DICOM series, or a folder of files and series.

    DICOM series are found at any depth, because archives export patient/study/series. Their name
    is their path below the folder.

    Raises:
        MissingFileError: the path does not exist.
        InputError: no scan was found, the format is unknown, or two scans have the same name.
    """
    path = Path(path)
    with reporting_os_errors(path):
        if path.is_file():
            suffix = suffix_of(path)
            if suffix is None:
                raise InputError(
                    f"{path} is not a scan or picture by its suffix, expected {EXPECTED}"
                )
            return [scan_file(path, suffix)]
        if not path.is_dir():
            raise MissingFileError(f"{path} does not exist, expected {EXPECTED}")
        inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        found = [scan_file(p, suffix) for p in inside if p.is_file() and (suffix := suffix_of(p))]
        series = _series_below(path)
        if holds_dicom(inside):
            return [_one_series(path, found, series)]
    found += series
    if not found:
        raise InputError(
            f"{path} holds no scan, expected {EXPECTED}; in subfolders only DICOM is looked for, "
            "so pass the folder that holds the files"
        )
    names: dict[str, list[str]] = defaultdict(list)
    for scan in found:
        names[scan.name].append(scan.path.name)
    repeated = [" and ".join(files) for files in names.values() if len(files) > 1]
    if repeated:
        raise InputError(
            f"{path} holds {first_few(repeated)}, whose results would have the same name; rename "
            "them"
        )
    return found


def _one_series(path: Path, beside: list[ScanFile], below: list[ScanFile]) -> ScanFile:
    """Return a folder that holds DICOM slices directly as one series.

    Args:
        beside: other scans in the folder; they are refused.
        below: series in subfolders; they are left out with a warning.
    """
    if beside:
        others = first_few([scan.path.name for scan in beside])
        raise InputError(
            f"{path} holds DICOM slices beside {others}; put the slices into a separate folder"
        )
    if below:
        others = first_few([str(scan.path.relative_to(path)) for scan in below])
        warn(f"{path} is read as one DICOM series; the series below it are left out: {others}")
    return scan_file(path.resolve(), DICOM)


def _series_below(path: Path) -> list[ScanFile]:
    """Find DICOM series in visible subfolders at any depth; warn about unreadable folders."""

    def warn_of_unreadable(error: OSError) -> None:
        warn(f"cannot read {error.filename} ({error.strerror}); its content is left out")

    found = []
    for folder, names, _ in os.walk(path, onerror=warn_of_unreadable):
        names[:] = [name for name in names if not name.startswith(".")]
        for below in (Path(folder, name) for name in names):
            with contextlib.suppress(OSError):  # `os.walk` will report this folder
                if holds_dicom(below.iterdir()):
                    name = "_".join(below.relative_to(path).parts)
                    below = Path(utf8_path(below))
                    found.append(ScanFile(safe_name(name, source=path), below, DICOM))
    return sorted(found, key=lambda scan: scan.path)


def select_channel(scans: Sequence[ScanFile], channel: int | None) -> list[ScanFile]:
    """Select what to read for a network that was trained on one channel of several.

    Of files that are named like the channels of nnU-Net (`NAME_0000`, `NAME_0001`), keep those of
    this channel. Of 4-D files, select the volume of this channel. Warn about files that are left
    out.

    Args:
        channel: counted from 0; None: all scans, unchanged.
    """
    if channel is None:
        return list(scans)
    parts = [re.fullmatch(r"(.+)_(\d{4})", scan.name) for scan in scans]
    # The channels of a scan start at 0, so pat_0001 … pat_0004 are four different scans.
    with_channels = {match[1] for match in parts if match and match[2] == "0000"}
    complete = {match[1] for match in parts if match and int(match[2]) == channel} & with_channels
    chosen, left_out, foreign = [], [], []
    for scan, match in zip(scans, parts, strict=True):
        of_other_channel = match and match[1] in with_channels and int(match[2]) != channel
        if of_other_channel and match[1] in complete:
            left_out.append(scan.name)
            continue
        if of_other_channel:
            foreign.append(scan.name)
        chosen.append(replace(scan, channel=channel))
    trained = f"the network was trained on channel {channel}"
    if left_out:
        warn(f"{trained}; files of other channels are left out: {first_few(left_out)}")
    if foreign:
        warn(f"{trained}, but these files have the name of another channel: {first_few(foreign)}")
    return chosen


def suffix_of(path: Path) -> str | None:
    """Return the suffix of a file if it is the suffix of a scan or picture."""
    name = path.name.lower()
    return next((suffix for suffix in SCANS + PICTURES if name.endswith(suffix)), None)


def scan_file(path: Path, suffix: str, channel: int | None = None) -> ScanFile:
    """Return a scan whose name is the name of its file without the suffix."""
    utf8_path(path)
    name = path.name if suffix == DICOM else path.name[: -len(suffix)]
    return ScanFile(safe_name(name, source=path.parent), path, suffix, channel)


def stamp(path: Path) -> list[list[Any]]:
    """Return name, size and time of each file of a scan as plain JSON, to recognise changes."""
    files = sorted(path.iterdir()) if path.is_dir() else [path, *_data_files(path)]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _data_files(path: Path) -> list[Path]:
    """Return the files that a header file names: a file, a list of files, or a numbered pattern."""
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
    """Read one scan of any format.

    Returns:
        For a scan, voxels (D, H, W) in the dtype of the file, and their geometry. For a picture,
        (1, H, W) or in colour (1, 3, H, W), and None.

    Raises:
        InputError: the scan is damaged, has several values per voxel, or is a series with missing,
            duplicate or uneven slices.
    """
    if scan.is_picture:
        return read_picture(scan.path), None
    if scan.suffix == DICOM:
        return read_dicom(scan.path)
    return read_volume(scan.path, scan.channel)


def read_scan_header(scan: ScanFile) -> tuple[tuple[int, ...], Geometry | None]:  # (D, H, W)
    """Read shape and geometry of a scan without its voxels; raises as `read_scan` does."""
    if scan.is_picture:
        with opened_picture(scan.path) as picture:
            return (1, picture.height, picture.width), None
    if scan.suffix == DICOM:
        return read_dicom_header(scan.path)
    return read_header(scan.path, scan.channel)
