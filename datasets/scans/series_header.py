"""A few texts of a DICOM header: what was scanned, and whom."""

from __future__ import annotations

from pathlib import Path

from datasets.scans.dicom import holds_dicom
from datasets.scans.dicom_tags import MODALITY, SERIES, DicomFile, NotDicomError, read_tags

PATIENT_NAME, PATIENT_ID, BIRTH_DATE = 0x00100010, 0x00100020, 0x00100030
IDENTITY_REMOVED = 0x00120062  # YES: whoever exported the scan has removed the identity
TEXTS = (PATIENT_NAME, PATIENT_ID, BIRTH_DATE, IDENTITY_REMOVED, SERIES, MODALITY)


def series_tags(path: Path) -> dict[int, str]:
    """Return texts of a DICOM file or of the first image in a folder, by tag; {} without one."""
    found = first_image(path)
    if found is None:
        return {}
    raw = {tag: found.tags.get(tag) for tag in TEXTS}
    return {tag: _decoded(value) for tag, value in raw.items() if isinstance(value, bytes)}


def first_image(path: Path) -> DicomFile | None:
    """Return the tags of a DICOM file, or of the first image in a folder, if it is readable."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if holds_dicom([file]):
            try:
                return read_tags(file)
            except NotDicomError:
                continue  # it is damaged; reading the series tells
    return None


def _decoded(raw: bytes) -> str:
    """Return a text without padding; bytes that are not UTF-8 are read as Latin-1."""
    try:
        return raw.decode("utf-8").strip(" \0")
    except UnicodeDecodeError:
        return raw.decode("latin-1").strip(" \0")
