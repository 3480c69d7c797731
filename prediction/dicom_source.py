"""The tags of a DICOM series as highdicom takes them, to write a segmentation that refers to it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from datasets.scans.dicom_slices import Slice
from datasets.scans.geometry import Geometry

if TYPE_CHECKING:
    from pydicom import Dataset

# Tags that every series has (type 2 in DICOM, so they may be empty), and highdicom reads.
STUDY = ("AccessionNumber", "StudyID", "StudyDate", "StudyTime")
PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")


class NoSegmentationError(ValueError):
    """A DICOM segmentation of a series is not possible; the message says why."""


def source_images(slices: Sequence[Slice], geometry: Geometry) -> list[Dataset]:
    """Return the tags of each file of a series, without pixels.

    Args:
        slices: in the order of the series; of a file of several frames, in the order of the file.
        geometry: of the series.

    Raises:
        NoSegmentationError: a segmentation could not name the slices or the place of them.
    """
    from pydicom import dcmread

    _keep_quiet()
    paths = dict.fromkeys(one.file.path for one in slices)
    images = [dcmread(path, stop_before_pixels=True, force=True) for path in paths]
    frames = {str(one.get("FrameOfReferenceUID") or "") for one in images}
    if len(frames) > 1 or (frames == {""} and slices[0].position is not None):
        what = "no" if frames == {""} else "more than one"
        raise NoSegmentationError(
            f"the series has {what} FrameOfReferenceUID (0020,0052), so no other file can lie over "
            "it; export it again"
        )
    instances = {str(one.get("SOPInstanceUID") or "") for one in images}
    if "" in instances or len(instances) < len(images):
        raise NoSegmentationError(
            "the slices have no SOPInstanceUID (0008,0018) of their own to name them by; export "
            "the series again"
        )
    if slices[0].position is not None and slices[0].spacing is not None:  # else it is a picture
        _state_places(images, slices, geometry)
    return images


@cache
def _keep_quiet() -> None:
    """Keep texts of pydicom and highdicom out of the log, because they quote patients' names."""
    for name in ("pydicom", "highdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", module=name)


def _state_places(images: Sequence[Dataset], slices: Sequence[Slice], geometry: Geometry) -> None:
    """Give the tags in memory the places and sizes that our own reader found.

    highdicom looks for them only where each kind of file should have them, wants all of them, and
    wants the same orientation in each slice, to the last digit.
    """
    from highdicom import PixelMeasuresSequence, PlaneOrientationSequence, PlanePositionSequence
    from pydicom import Dataset

    first, gap = slices[0], geometry.spacing[2]
    measures = PixelMeasuresSequence(first.spacing, first.thickness or gap, gap)
    axes = images[0].get("ImageOrientationPatient") or first.axes.tolist()
    orientation = PlaneOrientationSequence("PATIENT", axes)
    for image in images:
        image.update(measures[0])
        image.update(orientation[0])
    if len(images) > 1:
        return  # highdicom takes no series of several files with several frames each
    shared, frames = Dataset(), []
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = measures, orientation
    for one in slices:
        frames.append(Dataset())
        frames[-1].PlanePositionSequence = PlanePositionSequence("PATIENT", one.position.tolist())
    (image,) = images
    image.SharedFunctionalGroupsSequence, image.PerFrameFunctionalGroupsSequence = [shared], frames


def without_patient(image: Dataset) -> Dataset:
    """Take the patient out of the tags of a slice in memory, and return these tags.

    highdicom refuses values that are not valid, e.g. a date of birth with dashes, so they are
    copied behind its back. Tags of the study that are missing become empty.
    """
    from pydicom import Dataset

    patient = Dataset()
    for keyword in PATIENT:
        if keyword in image:
            patient.add(image[keyword])
            del image[keyword]
        setattr(image, keyword, "")
    for keyword in STUDY:
        if keyword not in image:
            setattr(image, keyword, "")
    return patient
