"""Reading of DICOM series: which files belong to one, and the values of its slices."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from common.errors import InputError, first_few, warn
from common.names import utf8_path
from datasets.scans.dicom_pixels import BITS_ALLOCATED, COLUMNS, ROWS, SAMPLES
from datasets.scans.dicom_slices import (
    IMAGE_TYPE,
    INTERCEPT,
    MODALITY_LUT,
    PHOTOMETRIC,
    SLOPE,
    Slice,
    in_order,
    slices_of,
    spacing_at_detector,
)
from datasets.scans.dicom_tags import (
    DICOM_SUFFIXES,
    KIND,
    SERIES,
    DicomFile,
    NotDicomError,
    is_dicom,
    read_tags,
)
from datasets.scans.errors import reporting_os_errors, short_reason, without_itk_warnings
from datasets.scans.geometry import Geometry

# Objects that hold pixels but no scan.
NO_SCANS = ("SEG", "RTDOSE")
SPECTROSCOPY = "1.2.840.10008.5.1.4.1.1.4.2"
BITS_STORED, HIGH_BIT, SIGNED = 0x00280101, 0x00280102, 0x00280103
# Kinds of which GDCM applies the rescale that the frames give; of others, only that of the file.
FRAME_KINDS = "2.1 2.2 4.1 4.4 13.1.1 13.1.2 13.1.3 13.1.4 13.1.5 66.4 128.1 130"
RESCALED_BY_FRAME = {f"1.2.840.10008.5.1.4.1.1.{end}" for end in FRAME_KINDS.split()}
OVERLAY_BIT = 0x0102  # element of the groups 60xx
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")  # transfer syntaxes: little endian, as is
# Start of a transfer syntax that GDCM cannot decode -> name of the compression.
UNDECODABLE = {
    "1.2.840.10008.1.2.4.20": "High-Throughput JPEG 2000",
    "1.2.840.10008.1.2.4.11": "JPEG XL",
    "1.2.840.10008.1.2.4.10": "MPEG or HEVC video",
    "1.2.840.10008.1.2.4.94": "JPIP",
    "1.2.840.10008.1.2.4.95": "JPIP",
    "1.2.840.10008.1.2.8": "deflated frames",
}


def read_dicom(folder: Path) -> tuple[np.ndarray, Geometry]:  # (D, H, W)
    """Read the only series of a folder, or a single DICOM file, ordered by position.

    Each slice has the values that its own rescale slope and intercept give. GDCM inverts
    MONOCHROME1, so that bright is high. Files that hold no image, e.g. RTSTRUCT, are left out with
    a warning.

    Raises:
        InputError: there are several series, slices are missing, duplicated or unevenly spaced, or
            a file is damaged, in colour, or of a kind that cannot be read.
    """
    files, others = _images(folder)
    if others:
        named = [f"{file.path.name} ({file.modality or 'no modality'})" for file in others]
        warn(f"{folder} holds DICOM files that are no images; left out: {first_few(named)}")
    slices, geometry = in_order(folder, [one for file in files for one in file])
    if len(slices) == 1:
        _warn_of_unknown_size(slices[0])
    planes = {}
    for frames in files:
        values = _values(frames)
        for one in frames:
            planes[one.name] = _rescaled(values[one.frame], *_applied(frames[0]), one)
    return np.stack([planes[one.name] for one in slices]), geometry


def read_dicom_header(folder: Path) -> tuple[tuple[int, ...], Geometry]:  # (D, H, W)
    """Read shape and geometry of the series without its voxels; raises as `read_dicom` does."""
    slices, geometry = ordered_slices(folder)
    first = slices[0].file
    return (len(slices), first.whole(ROWS), first.whole(COLUMNS)), geometry


def ordered_slices(folder: Path) -> tuple[list[Slice], Geometry]:
    """Return the slices in the order of the voxels of `read_dicom`; raises as it does."""
    files, _ = _images(folder)
    return in_order(folder, [one for file in files for one in file])


def holds_dicom(paths: Iterable[Path]) -> bool:
    """Return whether at least one of the files is a DICOM image, or may be a damaged one."""
    for path in sorted(paths):
        with contextlib.suppress(PermissionError):
            if is_dicom(path) and not _is_other_object(_tags(path)):
                return True
    return False


def _images(folder: Path) -> tuple[list[list[Slice]], list[DicomFile]]:
    """Return the frames of each file of the only series, and the files that are no images."""
    with reporting_os_errors(folder):
        inside = sorted(folder.iterdir()) if folder.is_dir() else [folder]
        dicom = {path: _tags(Path(utf8_path(path))) for path in inside if is_dicom(path)}
    found = [file for file in dicom.values() if not file.is_directory]
    others = [file for file in found if _is_other_object(file)]
    images = [file for file in found if not _is_other_object(file)]
    if not images:
        kinds = f", only {first_few(sorted({file.modality for file in others}))}" if others else ""
        raise InputError(f"{folder} holds no DICOM image{kinds}; pass the folder of a scan")
    damaged = [file.path.name for file in images if not file.has_pixels or file.pixels.is_cut_short]
    # An empty file, other bytes under the suffix of a slice, or a link to nothing: without it the
    # scan would be short.
    damaged += [
        path.name
        for path in inside
        if path not in dicom
        and (path.suffix.lower() in DICOM_SUFFIXES or not path.exists())
        and not path.name.startswith(".")  # macOS copies such files beside each file
        and not path.is_dir()
    ]
    if damaged:
        raise InputError(
            f"{folder} has DICOM files that cannot be read as slices: {first_few(damaged)}; they "
            "may be cut short, or links to nothing: fetch or export the series again"
        )
    series = defaultdict(list)
    for file in images:
        series[file.text(SERIES)].append(file)
    if len(series) > 1:
        named = [
            f"{uid} ({len(files)} files of {files[0].modality}, e.g. {files[0].path.name})"
            for uid, files in series.items()
        ]
        raise InputError(
            f"{folder} holds {len(series)} DICOM series: {first_few(named)}; put each series into "
            "a separate folder"
        )
    files = [slices_of(file) for file in images]
    for frames in files:
        _refuse_unknown_values(frames)
    return files, others


def _tags(path: Path) -> DicomFile:
    """Read the tags of a file; a file that ends within its tags has none."""
    try:
        return read_tags(path)
    except NotDicomError:
        return DicomFile(path, {})


def _is_other_object(file: DicomFile) -> bool:
    """Return whether a file is whole and holds no scan: structures, reports, segmentations."""
    if file.has_pixels or KIND not in file.tags:
        return file.modality in NO_SCANS
    return ROWS not in file.tags or file.text(KIND) == SPECTROSCOPY  # else its pixels are missing


def _refuse_unknown_values(frames: Sequence[Slice]) -> None:
    """Refuse a file of which SimpleITK would give other values than the scan's, or none."""
    file = frames[0].file
    colours = file.text(PHOTOMETRIC)
    syntax = file.transfer_syntax
    compression = next((UNDECODABLE[s] for s in UNDECODABLE if syntax.startswith(s)), None)
    rescaled = any((one.slope, one.intercept) != (1, 0) for one in frames)
    if file.whole(SAMPLES, 1) != 1 or not colours.startswith("MONOCHROME"):
        reason = f"is in colour ({colours}), expected grey values; export it as grey or as PNG"
    elif "MOSAIC" in file.text(IMAGE_TYPE).upper():
        reason = "holds many slices in one picture (a mosaic); convert the series with dcm2niix"
    elif file.items(MODALITY_LUT):
        reason = "maps its values through a table (Modality LUT), which is not supported; export "
        reason += "it with a rescale slope and intercept"
    elif colours == "MONOCHROME1" and rescaled:
        reason = "is MONOCHROME1 (bright is low) with a rescale, which would be turned round; "
        reason += "export it as MONOCHROME2"
    elif colours == "MONOCHROME1" and file.whole(SIGNED) and file.whole(BITS_STORED) != 16:
        reason = "is MONOCHROME1 with signed values, which SimpleITK turns round incorrectly; "
        reason += "export it as MONOCHROME2"
    elif compression:
        reason = f"is compressed as {compression} ({syntax}), which SimpleITK cannot read; export "
        reason += "the series uncompressed (Explicit VR Little Endian)"
    else:
        return
    raise InputError(f"{file.path} {reason}")


def _values(frames: Sequence[Slice]) -> np.ndarray:  # (frames, H, W)
    """Read the values of a file; GDCM rescales all its frames as the first one."""
    import SimpleITK as sitk

    file = frames[0].file
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(utf8_path(file.path))
    try:
        with without_itk_warnings():
            image = reader.Execute()
    except RuntimeError as error:
        raise InputError(
            f"{file.path} cannot be read as slices ({short_reason(error)}; transfer syntax "
            f"{file.transfer_syntax or 'unknown'}); it may be damaged: fetch it again, or export "
            "the series uncompressed"
        ) from None
    array = sitk.GetArrayFromImage(image)
    expected = (len(frames), file.whole(ROWS), file.whole(COLUMNS))
    if array.shape != expected:
        raise InputError(
            f"{file.path} holds pixels of shape {array.shape}, expected {expected} by its tags; "
            "export the series again"
        )
    _refuse_lost_bits(file)
    return array


def _refuse_lost_bits(file: DicomFile) -> None:
    """Refuse pixels beyond the bits that the tags give, of which GDCM would drop the upper bits.

    Old files keep overlays in the upper bits. There, dropping them is right.
    """
    bits = file.whole(BITS_STORED)
    native = file.transfer_syntax in ("", *NATIVE) and not file.pixels.is_compressed
    if not native or file.whole(BITS_ALLOCATED) != 16 or file.whole(HIGH_BIT) != bits - 1:
        return
    if any(tag >> 24 == 0x60 and tag & 0xFFFF == OVERLAY_BIT for tag in file.tags):
        return
    count = file.pixels.length // 2
    stored = np.fromfile(file.path, "<u2", count, offset=file.pixels.start)
    beyond = stored >> bits if bits < 16 else np.zeros_like(stored)
    negative = (beyond == 0xFFFF >> bits) & (stored >> (bits - 1) & 1 == 1)
    wrong = (beyond != 0) & ~(negative & bool(file.whole(SIGNED)))
    if wrong.any():
        raise InputError(
            f"{file.path} stores values up to {stored[wrong].max()}, beyond its {bits} bits by the "
            "tag (0028,0101), so it is unclear what they mean (often the padding of the scanner); "
            "convert the series with dcm2niix and check the values"
        )


def _applied(first: Slice) -> tuple[float, float]:
    """Return the slope and intercept that GDCM applied to all frames of a file."""
    if first.file.text(KIND) in RESCALED_BY_FRAME:
        return first.slope, first.intercept
    (slope,) = first.file.floats(SLOPE, 1) or (1.0,)
    (intercept,) = first.file.floats(INTERCEPT, 1) or (0.0,)
    return slope, intercept


def _rescaled(
    plane: np.ndarray, slope: float, intercept: float, one: Slice
) -> np.ndarray:  # (H, W)
    """Return the plane, which has a rescale, with that of its frame instead."""
    if (one.slope, one.intercept) == (slope, intercept):
        return plane
    return (plane.astype(np.float64) - intercept) / slope * one.slope + one.intercept


def _warn_of_unknown_size(one: Slice) -> None:
    if one.spacing is None:
        at_detector = spacing_at_detector(one.file)
        taken = "that of the detector is" if at_detector else "1 mm is"
        warn(f"{one.file.path} gives no pixel spacing in the patient; {taken} used for distances")
    if one.thickness is None:
        warn(f"{one.file.path} gives no slice thickness, so volumes are not known")
