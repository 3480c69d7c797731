"""What format a scan has, by its content, and a reader of SimpleITK for it after all checks."""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from pathlib import Path

import SimpleITK as sitk
from nibabel import Nifti1Header

from common.errors import InputError
from common.names import utf8_path
from datasets.scans.nifti import (
    is_packed,
    nifti_affines,
    nifti_header,
    refuse_hidden_faults,
    refuse_missing_voxels,
)
from datasets.scans.stored_data import refuse_damaged_data, refuse_missing_data
from datasets.scans.text_headers import refuse_other_sizes, text_header

NIFTI_NAME = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
# SimpleITK reads the first file of these names in place of the one that it is given.
SAME_TO_NIFTI = (".nii", ".hdr", ".img", ".nia", ".nii.gz", ".hdr.gz", ".img.gz")


def checked_reader(path: Path) -> tuple[sitk.ImageFileReader, Nifti1Header | None]:
    """Return a reader for a scan whose header is sound, and its header if it is NIfTI.

    What the checks raise is the true cause where SimpleITK has another, or none, or dies.

    Raises:
        InputError: the file is neither NIfTI nor NRRD nor MetaImage, or its header is damaged.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(utf8_path(path))
    header = nifti_header(path)
    if header is not None:
        refuse_missing_voxels(path, header)
        nifti_affines(path, header)
        reader.SetImageIO("NiftiImageIO")
        if not _is_named_well(path):
            _read_by_link(reader, path)
        return reader, header
    text = text_header(path)
    if text is None:
        raise InputError(
            f"{path} is not a readable scan (it is neither NIfTI nor NRRD nor MetaImage by its "
            "content); it may be damaged or cut short: fetch or export it again"
        )
    refuse_other_sizes(text)
    refuse_missing_data(text)
    reader.SetImageIO("NrrdImageIO" if text.is_nrrd else "MetaImageIO")
    return reader, None


def refuse_bad_voxels(path: Path) -> None:
    """Refuse damage of the voxels that SimpleITK hides; raises an `InputError`."""
    header = nifti_header(path)
    if header is not None:
        refuse_hidden_faults(path, header)
    elif (text := text_header(path)) is not None:
        refuse_damaged_data(text)


def _is_named_well(path: Path) -> bool:
    """Return whether SimpleITK takes a file for NIfTI, and for no other of nearly its name."""
    base, renamed = NIFTI_NAME.subn("", path.name)
    if not renamed or path.name.lower().endswith(".gz") != is_packed(path):
        return False
    names = {base + end for suffix in SAME_TO_NIFTI for end in (suffix, suffix.upper())}
    return not NIFTI_NAME.search(base) and not any(
        (path.parent / name).exists() for name in names - {path.name}
    )


def _read_by_link(reader: sitk.ImageFileReader, path: Path) -> None:
    """Let a reader see a NIfTI file alone, under the suffix of its content."""
    folder = Path(tempfile.mkdtemp())
    weakref.finalize(reader, shutil.rmtree, folder, ignore_errors=True)
    link = folder / f"scan.nii{'.gz' if is_packed(path) else ''}"
    link.symlink_to(path.resolve())
    reader.SetFileName(str(link))
