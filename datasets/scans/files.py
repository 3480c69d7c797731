"""Finding and reading of the scan files, DICOM series and pictures that a user names."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import InputError, MissingFileError, first_few, warn
from common.names import safe_name, utf8_path
from datasets.scans.dicom import holds_dicom, read_dicom, read_dicom_header
from datasets.scans.dicom_tags import DICOM_SUFFIXES, is_dicom
from datasets.scans.errors import reporting_os_errors, require_scan_packages
from datasets.scans.geometry import Geometry
from datasets.scans.identity import names_patient, short_name
from datasets.scans.pictures import opened_picture, read_picture
from datasets.scans.series_header import series_tags
from datasets.scans.stamps import files_of
from datasets.scans.text_headers import SEGMENTATION
from datasets.scans.unused import (
    BELOW_SERIES,
    BESIDE_SERIES,
    BROKEN,
    HIDDEN,
    LABELS,
    NO_IMAGE,
    SEEN,
    SUBFOLDER,
    UNKNOWN,
    Unused,
    counted,
    path_below,
)

SCANS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
DICOM = "dicom"
SERIES = "a folder of DICOM files"
EXPECTED = f"{', '.join(SCANS + PICTURES)} or {SERIES}"
RENAME = "rename them, or remove one of two copies"


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


def find_scans(path: str | Path, *, labels: bool = False) -> list[ScanFile]:
    """Find the scans at a path as `search` does, and warn about the files that are left out."""
    scans, unused = search(path, labels=labels)
    warn_of_unused(unused, path)
    return scans


def search(
    path: str | Path, *, keep_names: bool = True, labels: bool = False
) -> tuple[list[ScanFile], list[Unused]]:
    """Find the scans at a path: a file, a DICOM series, or a folder of files and series.

    DICOM series are found at any depth (patient/study/series) and named by their path below it.

    Args:
        keep_names: False: a series whose folder names the patient is called `series_` and a part
            of the hash of its UID.
        labels: whether label files are looked for, so that a segmentation of 3D Slicer is one.

    Returns:
        The scans, and the files and folders that are none of them. Files in the folder of a
        series are not looked at; see `unused_in_series`.

    Raises:
        MissingFileError: the path does not exist.
        InputError: no scan was found, the format is unknown, two scans have the same name, or a
            package that reads scans is not installed.
    """
    path = Path(path)
    with reporting_os_errors(path):
        if path.is_file():
            found = [_single_file(path)]
            require_readers(found)
            return found, []
        if not path.is_dir():
            what = "is a pipe or a device" if path.exists() else "does not exist"
            raise MissingFileError(f"{path} {what}, expected {EXPECTED}")
        inside = sorted(path.iterdir())
        visible = [p for p in inside if not p.name.startswith(".")]
        found = [scan_file(p, suffix) for p in visible if p.is_file() and (suffix := suffix_of(p))]
        found = [scan for scan in found if labels or scan.suffix != SEGMENTATION]
        series, unused = _series_below(path)
        if holds_dicom(visible):
            _refuse_beside_series(path, found)
            below = [p for p in visible if p.is_dir() and any(p.iterdir())]
            found = [scan_file(path.resolve(), DICOM)]
            unused = [Unused(f"{p.name}/", BELOW_SERIES) for p in below]
        else:
            data = {file for scan in found for file in files_of(scan.path)}
            rest = [p for p in inside if p not in data and not p.is_dir()]
            unused += [Unused(p.name, reason) for p in rest if (reason := _reason(p))]
            found += series
        if not keep_names:
            found = [without_patient(scan, path) for scan in found]
    if not found:
        held = f" (it holds files that are not read: {counted(unused)})" if unused else ""
        remedy = "in subfolders only DICOM is looked for; move the files up, or pass their folder"
        if unused and all(one.reason == UNKNOWN for one in unused):
            remedy = "convert its files to one of these, e.g. with 3D Slicer"
        raise InputError(f"{path} holds no scan, expected {EXPECTED}; {remedy}{held}")
    refuse_equal_names(found, path)
    require_readers(found)
    return found, sorted(unused, key=lambda one: one.path)


def warn_of_unused(unused: Sequence[Unused], source: str | Path, listed_in: str = "") -> None:
    """Warn about files that are left out, unless all of them are notes, as README.txt.

    Args:
        source: the folder that was searched.
        listed_in: file with the whole list, for the message.
    """
    if any(not one.is_note for one in unused):
        where = f"; {listed_in} lists all of them" if listed_in else ""
        warn(f"not everything in {source} is used: {counted(unused)}{where}")


def _single_file(path: Path) -> ScanFile:
    suffix = suffix_of(path)
    if suffix == SEGMENTATION:
        raise InputError(f"{path} is {LABELS}; pass the scan that it was drawn on")
    if suffix is not None:
        return scan_file(path, suffix)
    if not holds_dicom([path]):
        raise InputError(f"{path} is not a scan or picture by its suffix, expected {EXPECTED}")
    if len([file for file in path.parent.iterdir() if holds_dicom([file])]) > 1:
        warn(f"only {path} is read; pass its folder to read the whole DICOM series")
    name = path.stem if path.suffix.lower() in DICOM_SUFFIXES else path.name
    return ScanFile(safe_name(name, source=path.parent), Path(utf8_path(path)), DICOM)


def _reason(path: Path) -> str | None:
    """Return why a file of a folder without DICOM slices is not read; None: it is read."""
    if path.name.startswith("."):
        return HIDDEN
    if not path.is_file():
        return BROKEN
    if suffix := suffix_of(path):
        return LABELS if suffix == SEGMENTATION else None
    return NO_IMAGE if is_dicom(path) else UNKNOWN


def require_readers(scans: Sequence[ScanFile]) -> None:
    """Raise an `InputError` if scans cannot be read because a package is not installed."""
    if not all(scan.is_picture for scan in scans):
        require_scan_packages()


def refuse_equal_names(scans: Sequence[ScanFile], source: Path, remedy: str = RENAME) -> None:
    """Raise an `InputError` if the results of two scans would have the same name."""
    names: dict[str, list[str]] = defaultdict(list)
    for scan in scans:
        names[scan.name].append(path_below(scan.path, source))
    repeated = [" and ".join(files) for files in names.values() if len(files) > 1]
    if repeated:
        told = f"{first_few(repeated)}, whose results would have the same name"
        raise InputError(f"{source} holds {told}; {remedy}")


def without_patient(scan: ScanFile, source: Path) -> ScanFile:
    """Return a series under a name that does not tell who the patient is; say so if it changes."""
    if scan.suffix != DICOM:
        return scan
    tags = series_tags(scan.path)
    if not names_patient(scan.name, tags):
        return scan
    name = short_name(scan.name, tags)
    warn(
        f"{path_below(scan.path, source)} is called {name} in the results, because the name of the "
        "folder tells who the patient is; --keep_names keeps it"
    )
    return replace(scan, name=name)


def _refuse_beside_series(path: Path, beside: Sequence[ScanFile]) -> None:
    """Raise an `InputError` if a folder holds scans beside the slices of a DICOM series."""
    if beside:
        others = first_few([scan.path.name for scan in beside])
        raise InputError(
            f"{path} holds DICOM slices beside {others}; put the slices into a separate folder"
        )


def _series_below(path: Path) -> tuple[list[ScanFile], list[Unused]]:
    """Find DICOM series in visible subfolders at any depth, and the files that are in none.

    Links to folders are followed, each folder once.
    """
    series, unused = [], []

    def left_out(place: Path, reason: str) -> None:
        folder = "/" if place.is_dir() else ""
        unused.append(Unused(f"{place.relative_to(path).as_posix()}{folder}", reason))

    def unreadable(error: OSError) -> None:
        left_out(Path(error.filename), f"cannot be read ({error.strerror})")

    seen = {path.resolve()}
    for place, names, files in os.walk(path, onerror=unreadable, followlinks=True):
        folder = Path(place)
        for name in sorted(names):
            target = (folder / name).resolve()
            if name.startswith(".") or target in seen:
                names.remove(name)
                left_out(folder / name, HIDDEN if name.startswith(".") else SEEN)
            seen.add(target)
        if folder == path:
            continue
        inside = [folder / name for name in files]
        if holds_dicom(inside):
            name = "_".join(folder.relative_to(path).parts)
            series.append(ScanFile(safe_name(name, source=path), Path(utf8_path(folder)), DICOM))
            continue
        for file in inside:
            left_out(file, _reason(file) or SUBFOLDER)
    return sorted(series, key=lambda scan: scan.path), unused


def unused_in_series(scan: ScanFile) -> list[Unused]:
    """Return the files in the folder of a DICOM series that are not its slices, by their names."""
    unused = []
    for file in sorted(scan.path.iterdir()) if scan.path.is_dir() else []:
        if file.is_dir():
            continue  # `search` looks into it
        if file.name.startswith("."):
            unused.append(Unused(file.name, HIDDEN))
        elif not is_dicom(file):
            unused.append(Unused(file.name, BESIDE_SERIES if file.is_file() else BROKEN))
        elif not holds_dicom([file]):
            unused.append(Unused(file.name, NO_IMAGE))
    return unused


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
    return next((s for s in (SEGMENTATION, *SCANS, *PICTURES) if name.endswith(s)), None)


def scan_file(path: Path, suffix: str, channel: int | None = None) -> ScanFile:
    """Return a scan whose name is the name of its file without the suffix."""
    utf8_path(path)
    name = path.name if suffix == DICOM else path.name[: -len(suffix)]
    return ScanFile(safe_name(name, source=path.parent), path, suffix, channel)


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
    from datasets.scans.volumes import read_volume

    return read_volume(scan.path, scan.channel)


def read_scan_header(scan: ScanFile) -> tuple[tuple[int, ...], Geometry | None]:  # (D, H, W)
    """Read shape and geometry of a scan without its voxels; raises as `read_scan` does."""
    if scan.is_picture:
        with opened_picture(scan.path) as picture:
            return (1, picture.height, picture.width), None
    if scan.suffix == DICOM:
        return read_dicom_header(scan.path)
    from datasets.scans.volumes import read_header

    return read_header(scan.path, scan.channel)
