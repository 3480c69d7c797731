"""Whether a file says how large its voxels are; readers put 1 mm where it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datasets.scans.dicom_slices import slices_of
from datasets.scans.files import DICOM, ScanFile
from datasets.scans.nifti import nifti_header
from datasets.scans.series_header import first_image
from datasets.scans.text_headers import sized_axes, text_header, voxel_size_text
from datasets.scans.volumes import Geometry


def voxel_size_is_known(scan: ScanFile, slices: int, geometry: Geometry | None) -> bool:
    """Return whether the file of a scan states the size of its voxels along all three axes.

    Args:
        slices: number of slices of the scan.
        geometry: as it was read; None: a picture.
    """
    if geometry is None:
        return False
    if scan.suffix == DICOM:  # several slices are refused without it
        return slices > 1 or _known_in_slice(scan.path)
    header = nifti_header(scan.path)
    if header is None:
        text = voxel_size_text(text_header(scan.path))
        return text is not None and len(sized_axes(text)) >= 3
    # Without a size along an axis, and without an sform, a file is refused, unless it is one slice.
    sides = header["pixdim"][1:4].astype(float)
    stated = bool(np.isfinite(sides).all() and (sides != 0).all())
    return header["dim"][0] >= 3 and (stated or header["sform_code"] > 0)


def _known_in_slice(path: Path) -> bool:
    """Return whether a single DICOM slice states its pixels and its thickness."""
    found = first_image(path)
    slices = slices_of(found) if found else []
    return bool(slices) and None not in (slices[0].spacing, slices[0].thickness)
