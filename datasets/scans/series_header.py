"""A few texts of a DICOM header: what was scanned, how, and whom."""

from __future__ import annotations

from pathlib import Path

import SimpleITK as sitk

from datasets.scans.dicom import holds_dicom
from datasets.scans.errors import utf8_path, without_itk_warnings

PATIENT_NAME, PATIENT_ID, BIRTH_DATE = "0010|0010", "0010|0020", "0010|0030"
IDENTITY_REMOVED = "0012|0062"  # YES: whoever exported the scan has removed the identity
SERIES_UID, MODALITY = "0020|000e", "0008|0060"
PIXEL_SPACING, THICKNESS, SLICE_DISTANCE = "0028|0030", "0018|0050", "0018|0088"


def series_tags(folder: Path) -> dict[str, str]:
    """Return the texts of the first readable slice of a folder by `group|element`; {} for none."""
    for file in sorted(folder.iterdir()):
        if holds_dicom([file]) and (tags := _texts(file)):
            return tags
    return {}


def is_image(file: Path) -> bool:
    """Return whether a DICOM file holds an image; reports, plans and contours do not."""
    return bool(_texts(file))


def _texts(file: Path) -> dict[str, str]:
    reader = sitk.ImageFileReader()
    reader.SetFileName(utf8_path(file))
    try:
        with without_itk_warnings():
            reader.ReadImageInformation()
    except RuntimeError:
        return {}  # no image, or damaged; reading the series tells more
    return {key: _decoded(reader.GetMetaData(key)) for key in reader.GetMetaDataKeys()}


def _decoded(text: str) -> str:
    """Return a text without padding; bytes that are not UTF-8 are read as Latin-1."""
    raw = text.encode("utf-8", "surrogateescape")
    try:
        return raw.decode("utf-8").strip(" \0")
    except UnicodeDecodeError:
        return raw.decode("latin-1").strip(" \0")
