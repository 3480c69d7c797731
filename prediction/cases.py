"""Read the scans that `predict.py` segments, in the orientation of the training data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError, warn
from datasets.intensity import WINDOW, to_unit, with_channels
from datasets.registry import DatasetSpec
from datasets.scans.dicom_tags import MODALITY
from datasets.scans.errors import reporting_os_errors
from datasets.scans.files import DICOM, ScanFile, read_scan, unused_in_series
from datasets.scans.geometry import Geometry
from datasets.scans.orientation import orientation_of, reorient, reorient_geometry
from datasets.scans.planes import is_cut_across
from datasets.scans.series_header import series_tags
from datasets.scans.stamps import stamp
from datasets.scans.unused import Unused
from datasets.scans.voxel_size import voxel_size_is_known


@dataclass(frozen=True)
class UnitSlices:
    """A scan with intensities for the network, converted a few slices at a time."""

    array: np.ndarray  # (D, H, W) or (D, 3, H, W), values of the file
    limits: tuple[float, float]  # the values that become 0 and 1
    channels: int
    source: Path  # the file, for messages

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.array.shape

    def __getitem__(self, part: slice) -> np.ndarray:  # (B, H, W) or (B, 3, H, W), [0, 1]
        unit = to_unit(np.ascontiguousarray(self.array[part]), *self.limits)
        return with_channels(unit, self.channels, self.source)


@dataclass(frozen=True)
class Case:
    """A scan in memory."""

    scan: ScanFile
    slices: UnitSlices  # in the orientation of the training data
    geometry: Geometry | None  # geometry of the scan in its file; None: a picture
    place: Geometry | None  # geometry of `slices`
    orientation: tuple[str, str] | None  # letters of the file and of `slices`; None: not turned
    source: list[Any]  # stamp of the file before it was read
    voxel_ml: float | None  # volume of a voxel; None: a picture, or the file states no size
    warnings: list[str]  # why the result may be wrong
    unused: list[Unused]  # files in the folder of a series that are not read


def read_case(spec: DatasetSpec, scan: ScanFile) -> Case:
    """Read a scan, turn it to the orientation of the training data, and warn of what is odd.

    Raises:
        InputError: the scan is damaged, was replaced meanwhile, or is of another kind than the
            training data.
    """
    with reporting_os_errors(scan.path):
        source = stamp(scan.path)
        array, geometry = read_scan(scan)
        tags = series_tags(scan.path) if scan.suffix == DICOM else {}
        if stamp(scan.path) != source:
            raise InputError(
                f"{scan.path} was changed while it was read; run the same command again when "
                "nothing writes there"
            )
    warnings = [*_doubts_of_kind(spec, scan, tags), *spec.intensity.doubts(array, spec.raw_range)]
    voxel_ml = None
    if voxel_size_is_known(scan, len(array), geometry):
        voxel_ml = float(np.prod(geometry.spacing)) / 1000
    elif geometry is not None:
        warnings.append("the file does not state the size of its voxels, so volumes have no ml")
    letters, place = None, geometry
    if geometry is not None and spec.orientation is not None:
        letters = (orientation_of(geometry), spec.orientation)
        place = reorient_geometry(geometry, array.shape, spec.orientation)
        array = reorient(array, *letters)
    if place is not None and is_cut_across(array.shape, place):
        _, *pixel = place.voxel_spacing
        warnings.append(
            "its slices were taken in another plane than the training slices, so the network sees "
            f"pixels of {pixel[0]:.3g} × {pixel[1]:.3g} mm; check the result closely"
        )
    limits = spec.intensity.limits(array, scan.path)
    slices = UnitSlices(array, limits, spec.channels, scan.path)
    slices[:1]  # refuses a colour picture for a network of grey slices now, not later
    for text in warnings:
        warn(f"{scan.name}: {text}")
    unused = unused_in_series(scan) if scan.suffix == DICOM else []
    return Case(scan, slices, geometry, place, letters, source, voxel_ml, warnings, unused)


def _doubts_of_kind(spec: DatasetSpec, scan: ScanFile, tags: Mapping[int, str]) -> list[str]:
    """Say whether a scan is for another kind of network: pictures, or another modality."""
    if scan.is_picture != spec.is_pictures:
        kinds = ("a picture", "scans") if scan.is_picture else ("a scan", "pictures")
        return [f"this is {kinds[0]}, but the adapter was trained on {kinds[1]}"]
    is_ct = spec.intensity.rule == WINDOW and not spec.intensity.sure
    trained, found = spec.modality or ("CT" if is_ct else None), tags.get(MODALITY)
    if trained and found not in (None, "", "OT", trained):
        return [f"its DICOM modality is {found}, but the adapter was trained on {trained}"]
    return []
