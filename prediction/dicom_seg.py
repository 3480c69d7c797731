"""DICOM segmentations of DICOM series, by highdicom, which `requirements-dicom.txt` lists.

A case has one file (DICOM PS3.3, A.51) with a segment for each organ that was found. The standard
numbers segments 1, 2, …, without gaps (C.8.20.2), so a segment's description names the value that
the organ has in the label file. Each frame names the slice that it belongs to.

The file holds who the patient is, as the series does; no other result does.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import InputError, first_few, first_line, require_package, warn
from common.writing import write_bytes
from datasets.colours import label_colours
from datasets.registry import DatasetSpec
from datasets.scans.dicom import ordered_slices
from datasets.scans.dicom_slices import Slice
from datasets.scans.files import DICOM, ScanFile
from datasets.scans.stamps import stamp
from prediction.cases import Case
from prediction.dicom_source import NoSegmentationError, source_images, without_patient
from prediction.records import DICOM_SEG
from prediction.snomed import LONGEST_TEXT, codes_of

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription
    from pydicom import Dataset

REQUIREMENTS = "requirements-dicom.txt"
NAME = "SAMed"
SERIES_OFFSET = 1000  # of the number of the new series, after that of the source
PLACED = 0.01  # mm; largest distance of a frame from its slice


def refuse_dicom_seg(args: argparse.Namespace, scans: Sequence[ScanFile]) -> None:
    """Raise an `InputError` if `--dicom_seg` can have no effect; warn of scans without it."""
    if not args.dicom_seg:
        return
    others = [scan.name for scan in scans if scan.suffix != DICOM]
    if len(others) == len(scans):
        raise InputError(
            f"--dicom_seg needs DICOM series, but {args.input} holds none; pass their folder, or "
            "leave the flag out"
        )
    require_package("highdicom", REQUIREMENTS)
    if others:
        warn(f"--dicom_seg has no effect on scans that are not DICOM: {first_few(others)}")


def dicom_seg_names(args: argparse.Namespace, scan: ScanFile) -> list[str]:
    """Return the name of the DICOM segmentation of a scan, or none, as a list."""
    return [f"{scan.name}{DICOM_SEG}"] if args.dicom_seg and scan.suffix == DICOM else []


def write_dicom_seg(
    path: Path, spec: DatasetSpec, case: Case, labels: np.ndarray, key: dict[str, Any]
) -> str | None:
    """Write the segmentation of a DICOM series; it is read back before it gets its name.

    Args:
        labels: (D, H, W) classes, in the orientation of the series.
        key: see `config.settings.prediction_key`.

    Returns:
        Why there is no file; None: it is written.

    Raises:
        InputError: no room or no right to write there.
    """
    try:
        content = _content(spec, case, labels, key)
    except Exception as error:  # highdicom raises many kinds for a series that it does not take
        told = isinstance(error, (InputError, NoSegmentationError))
        reason = str(error) if told else f"highdicom does not take the series, {first_line(error)}"
        return f"no DICOM segmentation is written: {reason}; the label file is complete"
    write_bytes(path, content)
    return None


def _content(spec: DatasetSpec, case: Case, labels: np.ndarray, key: dict[str, Any]) -> bytes:
    """Return the bytes of a DICOM segmentation."""
    slices, geometry = ordered_slices(case.scan.path)
    if stamp(case.scan.path) != case.source:
        raise NoSegmentationError("the series was changed after it was read")
    if len({one.file.path for one in slices}) == 1:  # highdicom wants frames as in their file
        order = np.argsort([one.frame for one in slices])
        slices, labels = [slices[index] for index in order], labels[order]
    sources = source_images(slices, geometry)
    classes = np.unique(labels)
    classes = classes[classes > 0]
    if not len(classes):
        raise NoSegmentationError("no organ was found")
    numbers = np.zeros(spec.num_classes + 1, np.uint8)  # of the segment of each class
    numbers[classes] = range(1, len(classes) + 1)
    segments = numbers[labels]
    content = _encoded(sources, segments, _descriptions(spec, classes.tolist(), key), key)
    if not _is_same(content, slices, [str(one.SOPInstanceUID) for one in sources], segments):
        raise NoSegmentationError("what highdicom wrote reads back differently")
    return content


def _encoded(
    sources: Sequence[Dataset],
    segments: np.ndarray,
    descriptions: Sequence[SegmentDescription],
    key: dict[str, Any],
) -> bytes:
    """Return the file of segments (D, H, W) of the source images, in their order."""
    import highdicom

    patient = without_patient(sources[0])
    number = int(sources[0].get("SeriesNumber") or 0)
    file = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=segments,
        segmentation_type="BINARY",
        segment_descriptions=descriptions,
        series_instance_uid=highdicom.UID(),
        series_number=SERIES_OFFSET + max(0, number),
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer=NAME,
        manufacturer_model_name=NAME,
        software_versions=[_version(), f"highdicom {version('highdicom')}"],
        device_serial_number=_network(key),
        content_label="SEGMENTATION",
        content_description="made by a program; not checked by a physician",
        series_description=f"{NAME} segmentation",
        specific_character_set="ISO_IR 192",  # UTF-8 holds every name of a patient and of a class
    )
    for item in patient:
        file.add(item)
    written = BytesIO()
    file.save_as(written, enforce_file_format=True)
    return written.getvalue()


def _descriptions(
    spec: DatasetSpec, classes: Sequence[int], key: dict[str, Any]
) -> list[SegmentDescription]:
    """Return what the segments of these classes are, numbered from 1."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes

    algorithm = AlgorithmIdentificationSequence(
        NAME,
        codes.cid7162.ArtificialIntelligence,
        _version(),
        parameters={"network": _network(key), "program": str(key.get("program"))},
    )
    colours, found = label_colours(spec.class_names), []
    for number, index in enumerate(classes, start=1):
        name = spec.class_names[index - 1].replace("\\", "/")  # which would part two values
        category, kind, region, side = codes_of(name)
        one = SegmentDescription(
            number,
            name[:LONGEST_TEXT],
            category,
            kind,
            "AUTOMATIC",
            algorithm,
            anatomic_regions=None if region is None else [region],
            display_color=CIELabColor.from_rgb(*colours[index].tolist()),
        )
        one.SegmentDescription = f"{name}: {spec.predicted_values[index - 1]} in the label file"
        if side is not None and region is None:
            one.SegmentedPropertyTypeModifierCodeSequence = [side]
        elif side is not None:
            one.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [side]
        found.append(one)
    return found


def _network(key: dict[str, Any]) -> str:
    """Return the start of the hash of the file of the network."""
    return next((str(key[name])[:16] for name in ("adapter", "onnx") if key.get(name)), "unknown")


@cache
def _version() -> str:
    """Return the version of this program: of the files beside it, or of the installed package."""
    try:
        text = (Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8")
        return str(tomllib.loads(text)["project"]["version"])
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        pass
    try:
        return version("samed")
    except PackageNotFoundError:
        return "unknown"


def _is_same(
    content: bytes, slices: Sequence[Slice], instances: Sequence[str], segments: np.ndarray
) -> bool:
    """Return whether a file holds these segments (D, H, W) and each frame lies on its slice.

    The bits are unpacked here, and places are those that our own reader found, so that a fault of
    highdicom shows.
    """
    from pydicom import dcmread

    file = dcmread(BytesIO(content))
    bits, (height, width) = np.frombuffer(file.PixelData, np.uint8), segments.shape[1:]
    shared, size = file.SharedFunctionalGroupsSequence[0], height * width
    if (file.Rows, file.Columns) != (height, width):
        return False
    found = np.zeros_like(segments)
    for index, frame in enumerate(file.PerFrameFunctionalGroupsSequence):
        start, end = index * size, (index + 1) * size
        mask = np.unpackbits(bits[start // 8 : -(-end // 8)], bitorder="little")
        mask = mask[start % 8 :][:size].reshape(height, width).astype(bool)
        origin = frame.DerivationImageSequence[0].SourceImageSequence[0]
        place = int(origin.get("ReferencedFrameNumber") or 1) - 1
        if len(instances) > 1:
            place = instances.index(str(origin.ReferencedSOPInstanceUID))
        position = slices[place].position
        if position is not None:
            written = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
            if np.abs(written - position).max() > PLACED:
                return False
        groups = (group for group in (frame, shared) if "SegmentIdentificationSequence" in group)
        number = next(groups).SegmentIdentificationSequence[0].ReferencedSegmentNumber
        found[place][mask] = number
    return np.array_equal(found, segments)
