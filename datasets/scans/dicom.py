"""Reading of DICOM series: order of the slices, and checks that the series is complete."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from common.errors import InputError, first_few
from datasets.scans.errors import (
    reporting_itk_errors,
    reporting_os_errors,
    utf8_path,
    without_itk_warnings,
)
from datasets.scans.volumes import Geometry, geometry_of, read_header

POSITION, ORIENTATION = "0020|0032", "0020|0037"  # DICOM tags of a slice
SAME_PLACE = 1e-3  # mm; nearer slices have the same position
UNEVEN = 0.02  # largest deviation of a distance between slices, as a share of the spacing
SHEARED = 0.1  # mm; largest distance of a slice from the normal through the first slice


def read_dicom(folder: Path) -> tuple[np.ndarray, Geometry]:  # (D, H, W)
    """Read the only series of a folder, ordered by position.

    Raises:
        InputError: there are several series, or slices are missing, duplicated or unevenly spaced.
    """
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in dicom_files(folder)])
    with reporting_itk_errors(folder):
        image = reader.Execute()
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetDimension() != 3:
        raise InputError(
            f"{folder} holds DICOM in colour or with time steps, expected one value per voxel"
        )
    return sitk.GetArrayFromImage(image), geometry_of(image)


def read_dicom_header(folder: Path) -> tuple[tuple[int, ...], Geometry]:  # (D, H, W)
    """Read shape and geometry of the series without its voxels; raises as `read_dicom` does."""
    files = dicom_files(folder)
    shape, first = read_header(files[0])
    if len(files) == 1:
        return shape, first
    origins = [np.array(read_header(file)[1].origin) for file in files[:2]]
    gap = float(np.linalg.norm(origins[1] - origins[0]))
    spacing = (*first.spacing[:2], gap)
    return (len(files), *shape[1:]), Geometry(spacing, first.origin, first.direction)


def dicom_files(folder: Path) -> list[Path]:
    """Return the slices of the folder's only series, ordered by their position along the normal.

    Raises:
        InputError: see `read_dicom`.
    """
    with reporting_os_errors(folder):
        files = [Path(utf8_path(file)) for file in sorted(folder.iterdir())]
        expected = {file.name for file in files if _is_dicom(file)}
    with reporting_itk_errors(folder):
        series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        if len(series) > 1:
            raise InputError(
                f"{folder} holds {len(series)} DICOM series: {first_few(list(series))}; put each "
                "series into a separate folder"
            )
        names = ()
        if series:
            names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    if not names:
        raise InputError(f"{folder} holds no readable DICOM series; export it again")
    files = [Path(name) for name in names]
    skipped = sorted(expected - {file.name for file in files})
    if skipped:  # GDCM skips them without a message
        raise InputError(
            f"{folder} has DICOM files that cannot be read as slices: {first_few(skipped)}; they "
            "may be cut short: fetch or export the series again"
        )
    places = [_place(file) for file in files]
    axes = np.array([place[0] for place in places])  # (N, 6)
    positions = np.array([place[1] for place in places])  # (N, 3)
    turned = np.flatnonzero(np.abs(axes - axes[0]).max(axis=1) > 1e-3)
    if turned.size:
        raise InputError(
            f"{folder} has slices whose orientation differs from the first slice: "
            f"{first_few([files[i].name for i in turned])}; remove them"
        )
    return _in_order(folder, files, positions, np.cross(axes[0][:3], axes[0][3:]))


def _in_order(
    folder: Path, files: Sequence[Path], positions: np.ndarray, normal: np.ndarray
) -> list[Path]:
    """Order the slices along the normal, and check that their distances are equal."""
    along = positions @ normal
    order = np.argsort(along)
    along, positions = along[order], positions[order]
    gaps = np.diff(along)
    repeated = [f"{along[i]:.2f} mm" for i in np.flatnonzero(gaps < SAME_PLACE)]
    if repeated:
        raise InputError(
            f"{folder} has duplicate slices at {first_few(repeated)}; remove one of each pair"
        )
    usual = float(np.median(gaps)) if gaps.size else 1.0
    uneven = np.flatnonzero(np.abs(gaps - usual) > UNEVEN * usual)
    if uneven.size:
        where = [f"between {along[i]:.2f} and {along[i + 1]:.2f} mm" for i in uneven]
        raise InputError(
            f"{folder} has missing or unevenly spaced slices: {first_few(where)}, expected a "
            f"distance of {usual:.2f} mm; complete the series"
        )
    beside = positions - positions[0] - np.outer(along - along[0], normal)
    if np.linalg.norm(beside, axis=1).max() > SHEARED:
        raise InputError(
            f"{folder} was scanned with a tilted gantry, so its slices are shifted against each "
            "other; resample the scan to a straight grid first"
        )
    return [files[i] for i in order]


def _place(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the axes (6,) and the position (3,) of a DICOM slice."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        with without_itk_warnings():
            reader.ReadImageInformation()
        axes, position = (
            np.array([float(v) for v in reader.GetMetaData(tag).split("\\")])
            for tag in (ORIENTATION, POSITION)
        )
        if axes.shape != (6,) or position.shape != (3,) or reader.GetSize()[2:] not in ((), (1,)):
            raise ValueError
    except (RuntimeError, ValueError):
        raise InputError(
            f"{file} has no readable position and orientation of a single slice; export the "
            "series again"
        ) from None
    return axes, position


def holds_dicom(paths: Iterable[Path]) -> bool:
    """Return whether at least one of the files is DICOM by its first bytes."""
    for path in sorted(paths):
        with contextlib.suppress(PermissionError):
            if _is_dicom(path):
                return True
    return False


def _is_dicom(path: Path) -> bool:
    if path.name == "DICOMDIR" or not path.is_file():  # DICOMDIR is a table of contents
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
