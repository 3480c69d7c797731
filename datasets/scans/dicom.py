"""DICOM series: slices ordered by their position, none missing, doubled or askew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from common.errors import InputError, first_few
from datasets.scans.volumes import (
    Geometry,
    accessible,
    geometry_of,
    known_name,
    quiet,
    read_header,
    readable,
)

POSITION, ORIENTATION = "0020|0032", "0020|0037"  # DICOM tags of a slice
SAME_PLACE = 1e-3  # mm: nearer slices are one
UNEVEN = 0.02  # of the spacing: what the distances of slices may differ by
SHEARED = 0.1  # mm: how far a slice may lie beside the normal through the first


def read_dicom(folder: Path) -> tuple[np.ndarray, Geometry]:  # (D, H, W)
    """Read the one series of a folder, ordered by position.

    Raises:
        InputError: several series, or slices that are missing, doubled or unevenly spaced.
    """
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in dicom_files(folder)])
    with readable(folder):
        image = reader.Execute()
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetDimension() != 3:
        raise InputError(f"{folder} holds colour or moving DICOM, expected one value a voxel")
    return sitk.GetArrayFromImage(image), geometry_of(image)


def read_dicom_header(folder: Path) -> tuple[tuple[int, ...], Geometry]:  # (D, H, W)
    """Shape and geometry of the series without its voxels; raises as `read_dicom` does."""
    files = dicom_files(folder)
    shape, first = read_header(files[0])
    if len(files) == 1:
        return shape, first
    origins = [np.array(read_header(file)[1].origin) for file in files[:2]]
    gap = float(np.linalg.norm(origins[1] - origins[0]))
    spacing = (*first.spacing[:2], gap)
    return (len(files), *shape[1:]), Geometry(spacing, first.origin, first.direction)


def dicom_files(folder: Path) -> list[Path]:
    """The slices of a folder's one series, by their place along its normal, which must be even."""
    with accessible(folder):
        files = [Path(known_name(file)) for file in sorted(folder.iterdir())]
        expected = {file.name for file in files if _is_dicom(file)}
    with readable(folder), quiet():
        series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        if len(series) > 1:
            raise InputError(
                f"{folder} holds {len(series)} DICOM series: {first_few(list(series))}; put each "
                "into a folder of its own"
            )
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), *series[:1])
    if not names:
        raise InputError(f"{folder} holds no readable DICOM series; export it again")
    files = [Path(name) for name in names]
    lost = sorted(expected - {file.name for file in files})
    if lost:  # GDCM passes over them in silence
        raise InputError(
            f"{folder} has DICOM files that cannot be read as slices: {first_few(lost)}; they may "
            "be cut short: fetch or export the series again"
        )
    axes, positions = zip(*(_place(file) for file in files), strict=True)
    turned_away = [
        f.name for f, own in zip(files, axes, strict=True) if abs(own - axes[0]).max() > 1e-3
    ]
    if turned_away:
        raise InputError(
            f"{folder} has slices turned against the first: {first_few(turned_away)}; remove them"
        )
    return _in_order(folder, files, np.array(positions), np.cross(axes[0][:3], axes[0][3:]))


def _in_order(
    folder: Path, files: Sequence[Path], positions: np.ndarray, normal: np.ndarray
) -> list[Path]:
    along = positions @ normal
    order = np.argsort(along)
    along, positions = along[order], positions[order]
    gaps = np.diff(along)
    doubled = [f"{along[i]:.2f} mm" for i in np.flatnonzero(gaps < SAME_PLACE)]
    if doubled:
        raise InputError(f"{folder} has doubled slices at {first_few(doubled)}; remove one of each")
    usual = float(np.median(gaps)) if gaps.size else 1.0
    uneven = np.flatnonzero(np.abs(gaps - usual) > UNEVEN * usual)
    if uneven.size:
        where = [f"between {along[i]:.2f} and {along[i + 1]:.2f} mm" for i in uneven]
        raise InputError(
            f"{folder} has slices missing or unevenly spaced: {first_few(where)}, where "
            f"{usual:.2f} mm are usual; complete the series"
        )
    beside = positions - positions[0] - np.outer(along - along[0], normal)
    if np.linalg.norm(beside, axis=1).max() > SHEARED:
        raise InputError(
            f"{folder} was scanned with a tilted gantry (its slices lie askew); resample it to a "
            "straight grid first"
        )
    return [files[i] for i in order]


def _place(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Axes (6,) and position (3,) of a DICOM slice."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        with quiet():
            reader.ReadImageInformation()
        axes, position = (
            np.array([float(v) for v in reader.GetMetaData(tag).split("\\")])
            for tag in (ORIENTATION, POSITION)
        )
        if axes.shape != (6,) or position.shape != (3,) or reader.GetSize()[2:] not in ((), (1,)):
            raise ValueError
    except (RuntimeError, ValueError):
        raise InputError(
            f"{file} has no readable position and orientation of one slice; export the series again"
        ) from None
    return axes, position


def holds_dicom(paths: Iterable[Path]) -> bool:
    """Whether one of the files starts as DICOM does."""
    for path in sorted(paths):
        with contextlib.suppress(PermissionError):
            if _is_dicom(path):
                return True
    return False


def _is_dicom(path: Path) -> bool:
    if path.name == "DICOMDIR" or not path.is_file():  # an archive's table of contents
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
