"""Whether a file says how large its voxels are; readers put 1 mm where it does not."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from nibabel import Nifti1Header, Nifti2Header

from datasets.scans.dicom_slices import slices_of
from datasets.scans.files import DICOM, ScanFile
from datasets.scans.series_header import first_image
from datasets.scans.volumes import NIFTI_HEADER_SIZES, Geometry, unpacked

HEADER = 1 << 16  # bytes
STATED = {
    ".nrrd": rb"^(spacings|space directions):(?!.*\bnan\b)",
    ".mha": rb"^Element(Spacing|Size)\s*=",
}
STATED |= {".nhdr": STATED[".nrrd"], ".mhd": STATED[".mha"]}


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
    if scan.suffix in STATED:
        with scan.path.open("rb") as file:
            head = re.split(rb"\n\r?\n|ElementDataFile", file.read(HEADER), maxsplit=1)[0]
        return re.search(STATED[scan.suffix], head, re.IGNORECASE | re.MULTILINE) is not None
    return _known_in_nifti(scan.path)


def _known_in_slice(path: Path) -> bool:
    """Return whether a single DICOM slice states its pixels and its thickness."""
    found = first_image(path)
    slices = slices_of(found) if found else []
    return bool(slices) and None not in (slices[0].spacing, slices[0].thickness)


def _known_in_nifti(path: Path) -> bool:
    with unpacked(path) as stream:
        start = stream.read(Nifti2Header.sizeof_hdr)
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    kind = Nifti2Header if NIFTI_HEADER_SIZES[1] in sizes else Nifti1Header
    header = kind(start[: kind.sizeof_hdr], check=False)
    sides = header["pixdim"][1:4].astype(float)
    return header["dim"][0] >= 3 and bool(np.isfinite(sides).all() and (sides != 0).all())
