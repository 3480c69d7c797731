"""Whether a file says how large its voxels are; readers put 1 mm where it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datasets.scans.dicom_slices import slices_of
from datasets.scans.files import DICOM, ScanFile
from datasets.scans.geometry import Geometry
from datasets.scans.series_header import first_image
from datasets.scans.text_headers import sized_axes, text_header, voxel_size_text


def voxel_size_is_known(scan: ScanFile, slices: int, geometry: Geometry | None) -> bool:
    """Return whether the file of a scan states the size of its voxels along all three axes."""
    return stated_sizes(scan, slices, geometry) == 3


def distances_are_known(scan: ScanFile, slices: int, geometry: Geometry | None) -> bool:
    """Return whether distances in mm are known: those of one slice need no thickness."""
    return stated_sizes(scan, slices, geometry) >= (2 if slices == 1 else 3)


def stated_sizes(scan: ScanFile, slices: int, geometry: Geometry | None) -> int:
    """Return along how many axes a file states the size of voxels: 3, 2 (no thickness) or 0.

    Args:
        slices: number of slices of the scan.
        geometry: as it was read; None: a picture.
    """
    if geometry is None:
        return 0
    if scan.suffix == DICOM:  # several slices are refused without it
        return 3 if slices > 1 else _stated_in_slice(scan.path)
    from datasets.scans.nifti import nifti_header

    header = nifti_header(scan.path)
    if header is None:
        fields = text_header(scan.path)
        text = voxel_size_text(fields.fields) if fields else None
        return 0 if text is None else min(3, len(sized_axes(text)))
    # A file of several slices without a size along an axis is refused.
    sides = header["pixdim"][1:4].astype(float)
    stated = np.isfinite(sides) & (sides != 0)
    if header["dim"][0] >= 3 and stated.all():
        return 3
    return 2 if stated[:2].all() else 0


def _stated_in_slice(path: Path) -> int:
    """Return the same for a single DICOM slice."""
    found = first_image(path)
    slices = slices_of(found) if found else []
    if not slices or slices[0].spacing is None:
        return 0
    return 2 if slices[0].thickness is None else 3
