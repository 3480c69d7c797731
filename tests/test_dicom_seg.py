"""`--dicom_seg`: the segmentation of a DICOM series as DICOM, read back by other programs."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import ENHANCED_CT, EXPLICIT, IMPLICIT, slice_tags, write_dicom_file
from test_predict import SPEC, VALUES, adapter, marked, run  # noqa: F401
from test_scans import placed, write_dicom

from datasets.colours import label_colours
from datasets.scans.dicom import ordered_slices
from datasets.scans.files import find_scans
from prediction.cases import read_case
from prediction.dicom_seg import write_dicom_seg

highdicom = pytest.importorskip("highdicom", reason="pip install -r requirements-dicom.txt")
pydicom = pytest.importorskip("pydicom", reason="pip install -r requirements-dicom.txt")

KEY = {"adapter": "0123456789abcdef" * 4, "program": "89abcdef"}
FRAME = "1.2.826.0.1.3680043.2.1125.77"
# 5 × 7 pixels are no whole number of bytes, so frames start within one.
LABELS = np.zeros((4, 5, 7), np.uint8)
LABELS[0, :2, :3], LABELS[1:3, 1, 4:], LABELS[3, 4, 0], LABELS[2, 3, 1:3] = 1, 3, 3, 1
SHAPE = LABELS.shape


def tag(group: int, number: int, kind: str, value: Any) -> tuple[int, int, str, Any]:
    return group, number, kind, value


def series(folder: Path, *, syntax: str = EXPLICIT, preamble: bool = True, **changes: Any) -> Path:
    """Write an oblique CT whose files are named against the order of its slices."""
    axes = np.array(placed("LPS").direction).reshape(3, 3).T
    tags = {
        "frame": tag(0x20, 0x52, "UI", FRAME),
        "patient": tag(0x10, 0x10, "PN", "Doe^Jane"),
        "id": tag(0x10, 0x20, "LO", "ID7"),
        "series_number": tag(0x20, 0x11, "IS", 3),
    } | changes
    for index in range(SHAPE[0]):
        own = {"instance": tag(8, 0x18, "UI", f"1.2.3.{index + 1}")} | tags
        one = slice_tags(
            np.full(SHAPE[1:], 900 + index, np.uint16),
            position=np.array([-10.5, 20.25, -300.0]) + 2.5 * index * axes[2],
            axes=(*axes[0], *axes[1]),
            spacing=(0.8, 0.7),
            **{name: made(index) if callable(made) else made for name, made in own.items()},
        )
        path = folder / f"{9 - index}.dcm"
        write_dicom_file(path, one, syntax=syntax, preamble=preamble, meta=preamble)
    return folder


def segmented(
    source: Path, labels: np.ndarray = LABELS, spec: Any = SPEC
) -> tuple[Any, str | None]:
    """Return the written segmentation as a data set, or None and why there is none."""
    case = read_case(replace(spec, orientation=None), find_scans(source)[0])
    path = source.parent / "case.seg.dcm"
    failed = write_dicom_seg(path, spec, case, labels, KEY)
    assert path.exists() == (failed is None)
    assert not list(source.parent.glob(".*partial*"))
    return (pydicom.dcmread(path) if failed is None else None), failed


def volume_of(file: Any, source: Path) -> np.ndarray:
    """Return label values (D, H, W) by pydicom's pixels and the place of each frame."""
    slices, _ = ordered_slices(source)
    positions = np.array([one.position for one in slices])
    by_number = {one.SegmentNumber: one for one in file.SegmentSequence}
    found = np.zeros((len(slices), file.Rows, file.Columns), np.uint16)
    pixels = np.atleast_3d(file.pixel_array) if file.NumberOfFrames > 1 else file.pixel_array[None]
    for mask, frame in zip(pixels, file.PerFrameFunctionalGroupsSequence, strict=True):
        groups = (frame, file.SharedFunctionalGroupsSequence[0])
        (one,) = next(
            g.SegmentIdentificationSequence for g in groups if "SegmentIdentificationSequence" in g
        )
        text = by_number[one.ReferencedSegmentNumber].SegmentDescription
        value = int(text.rsplit(": ", 1)[1].split()[0])
        place = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        distance = np.abs(positions - place).max(axis=1)
        assert distance.min() < 1e-9
        found[distance.argmin()][mask.astype(bool)] = value
    return found


def values_of(labels: np.ndarray) -> np.ndarray:
    return np.array((0, *SPEC.predicted_values))[labels]


def series_of(folder: Path, array: np.ndarray, letters: str = "LPS") -> Path:
    """Write a series of these values, of a known patient and with a frame of reference."""
    write_dicom(folder, array, placed(letters))
    for path in list(folder.iterdir()):
        one = pydicom.dcmread(path)
        one.FrameOfReferenceUID, one.PatientName, one.PatientID = FRAME, "Doe^Jane", "ID7"
        one.save_as(path)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("letters", ["LPS", "LPI", "RAS", "PIR"])
def test_a_series_is_segmented_voxel_by_voxel(tmp_path: Path, adapter: Path, letters: str):  # noqa: F811
    """The label file, pydicom, highdicom and the source series tell of the same voxels."""
    array, _ = marked((6, 20, 23))
    source = series_of(tmp_path / "in" / "s", array, letters)
    before = {path: path.read_bytes() for path in source.iterdir()}
    assert run(source, tmp_path / "out", adapter, "--dicom_seg") == 0
    assert before == {path: path.read_bytes() for path in source.iterdir()}
    image = sitk.ReadImage(str(tmp_path / "out" / "s.mha"))
    expected = sitk.GetArrayFromImage(image)
    assert {*np.unique(expected)} == {0, *SPEC.predicted_values}
    file = pydicom.dcmread(tmp_path / "out" / "s.seg.dcm")
    assert np.array_equal(volume_of(file, source), expected)

    # By highdicom's reader: the array, and its place by its own affine matrix.
    volume = highdicom.seg.segread(tmp_path / "out" / "s.seg.dcm").get_volume(combine_segments=True)
    values = np.array((0, *SPEC.predicted_values))[volume.array]
    for index in np.argwhere(values):
        point = (volume.affine @ [*index, 1])[:3].tolist()
        assert np.allclose(
            image.TransformIndexToPhysicalPoint(image.TransformPhysicalPointToIndex(point)),
            point,
            atol=1e-4,
        )
        assert image.GetPixel(image.TransformPhysicalPointToIndex(point)) == values[tuple(index)]
    assert np.count_nonzero(values) == np.count_nonzero(expected)


def test_what_the_file_says(tmp_path: Path):
    source = series(tmp_path / "s")
    file, failed = segmented(source)
    assert failed is None and np.array_equal(volume_of(file, source), values_of(LABELS))
    first = pydicom.dcmread(source / "9.dcm")
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert file[keyword].value == first[keyword].value
    assert file.SeriesInstanceUID != first.SeriesInstanceUID and file.SeriesNumber == 1003
    assert file.SegmentationType == "BINARY" and file.Modality == "SEG"
    assert file.Manufacturer == "SAMed" and file.DeviceSerialNumber == KEY["adapter"][:16]
    (referenced,) = file.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == first.SeriesInstanceUID
    named = {one.ReferencedSOPInstanceUID for one in referenced.ReferencedInstanceSequence}
    assert named == {f"1.2.3.{index}" for index in range(1, 5)}
    for frame in file.PerFrameFunctionalGroupsSequence:
        (origin,) = frame.DerivationImageSequence[0].SourceImageSequence
        place = frame.PlanePositionSequence[0].ImagePositionPatient
        (there,) = [p for p in map(pydicom.dcmread, source.iterdir())
                    if p.SOPInstanceUID == origin.ReferencedSOPInstanceUID]  # fmt: skip
        assert np.allclose(place, there.ImagePositionPatient, rtol=0, atol=1e-9)
    measures = file.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert list(measures.PixelSpacing) == [0.8, 0.7]
    assert measures.SpacingBetweenSlices == pytest.approx(2.5)
    # The second class is absent, so segments are 1 and 2, and the description names the value.
    assert [one.SegmentNumber for one in file.SegmentSequence] == [1, 2]
    assert [one.SegmentLabel for one in file.SegmentSequence] == ["front mark", "top mark"]
    assert [one.SegmentDescription for one in file.SegmentSequence] == [
        "front mark: 2 in the label file",
        "top mark: 9 in the label file",
    ]
    (algorithm,) = file.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence
    assert (
        algorithm.AlgorithmName == "SAMed" and KEY["adapter"][:16] in algorithm.AlgorithmParameters
    )
    for one, colour in zip(
        file.SegmentSequence, label_colours(SPEC.class_names)[[1, 3]], strict=True
    ):
        light, a, b = np.array(one.RecommendedDisplayCIELabValue) / 65535 * [100, 255, 255] - [
            0,
            128,
            128,
        ]
        assert np.abs(rgb_of(light, a, b) - colour).max() <= 2


def rgb_of(light: float, a: float, b: float) -> np.ndarray:
    """Return sRGB 0…255 of CIELab with the white point D65, by the formulas of CIE 15."""
    f = (light + 16) / 116 + np.array([a / 500, 0, -b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.95047, 1, 1.08883]
    matrix = [[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]]
    linear = np.clip(np.array(matrix) @ xyz, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def name_in(charset: str, encoding: str, name: str) -> dict[str, Any]:
    return {
        "charset": tag(8, 5, "CS", charset),
        "patient": tag(0x10, 0x10, "PN", name.encode(encoding)),
    }


ODD = {
    "Latin-1": name_in("ISO_IR 100", "latin-1", "Müller^Zoë"),
    "Cyrillic": name_in("ISO_IR 144", "iso8859_5", "Люкceмбypг"),
    "UTF-8": name_in("ISO_IR 192", "utf-8", "Wang^XiaoDong=王^小東"),
    "an unknown character set": name_in("ISO_IR 999", "latin-1", "Doe^Jane"),
    "no patient at all": {"patient": None, "id": None},
    "a birth date and a sex that are not valid": {
        "birth": tag(0x10, 0x30, "DA", "1970-01-0X"),
        "sex": tag(0x10, 0x40, "CS", "weibl"),
    },
    "no study ID, an empty accession number": {"accession": tag(8, 0x50, "SH", "")},
    "no series number": {"series_number": None},
    "a negative series number": {"series_number": tag(0x20, 0x11, "IS", -4)},
    "implicit encoding": {"syntax": IMPLICIT},
    "no preamble": {"preamble": False},
    "a UID that is not valid": {"study": tag(0x20, 0x0D, "UI", "1.02.3")},
    "private tags": {"private": tag(0x29, 0x10, "LO", "SIEMENS CSA HEADER")},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_tags_of_the_series(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture):
    source = series(tmp_path / "s", **ODD[name])
    with caplog.at_level(logging.DEBUG):
        file, failed = segmented(source)
    assert failed is None and np.array_equal(volume_of(file, source), values_of(LABELS))
    first = pydicom.dcmread(source / "9.dcm", force=True)
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID"):
        value = first.get(keyword, "")
        assert file[keyword].value == value or not (value or file[keyword].value)
        assert not value or str(value) not in caplog.text


def test_the_source_series_may_be_one_file_of_frames_in_any_order(tmp_path: Path):
    axes = (1, 0, 0, 0, 1, 0)
    order = [2, 0, 3, 1]
    frames = [
        [
            (0x20, 0x9113, "SQ", [[(0x20, 0x32, "DS", (-5, 7, 2.5 * place))]]),
            (0x20, 0x9116, "SQ", [[(0x20, 0x37, "DS", axes)]]),
            (0x28, 0x9110, "SQ", [[(0x28, 0x30, "DS", (0.8, 0.7)), (0x18, 0x50, "DS", 3)]]),
        ]
        for place in order
    ]
    one = slice_tags(
        np.linspace(-900, 200, LABELS.size).reshape(SHAPE).astype(np.int16),
        position=None,
        spacing=None,
        rescale=None,
        kind=ENHANCED_CT,
        frame=tag(0x20, 0x52, "UI", FRAME),
        shared=(0x5200, 0x9229, "SQ", [[]]),
        groups=(0x5200, 0x9230, "SQ", frames),
    )
    source = write_dicom_file(tmp_path / "s" / "one.dcm", one)
    file, failed = segmented(source.parent)
    assert failed is None
    # `volume_of` goes by positions; the frames that are named are those of the file.
    assert np.array_equal(volume_of(file, source), values_of(LABELS))
    for frame in file.PerFrameFunctionalGroupsSequence:
        (origin,) = frame.DerivationImageSequence[0].SourceImageSequence
        place = frame.PlanePositionSequence[0].ImagePositionPatient[2] / 2.5
        assert order[origin.ReferencedFrameNumber - 1] == place


def test_one_slice(tmp_path: Path):
    source = series(tmp_path / "s")
    for path in list(source.iterdir())[:-1]:
        path.unlink()
    file, failed = segmented(source, LABELS[:1])
    assert failed is None and np.array_equal(volume_of(file, source), values_of(LABELS[:1]))


NOT_POSSIBLE = {
    "no frame of reference": ({"frame": None}, "the series has no FrameOfReferenceUID"),
    "two frames of reference": (
        {"frame": lambda index: tag(0x20, 0x52, "UI", f"{FRAME}.{index % 2}")},
        "the series has more than one FrameOfReferenceUID",
    ),
    "no names of slices": ({"instance": None}, "the slices have no SOPInstanceUID"),
    "an unknown kind of object": (
        {"kind": "1.2.3.4"},
        "highdicom does not take the series, KeyError: ",
    ),
}


@pytest.mark.parametrize("name", NOT_POSSIBLE)
def test_a_series_that_cannot_have_one(tmp_path: Path, name: str):
    changes, told = NOT_POSSIBLE[name]
    _, failed = segmented(series(tmp_path / "s", preamble=False, **changes))
    assert failed.startswith(f"no DICOM segmentation is written: {told}")
    assert failed.endswith("; the label file is complete") and "\n" not in failed


def test_nothing_found_and_a_changed_series(tmp_path: Path):
    source = series(tmp_path / "s")
    _, failed = segmented(source, np.zeros_like(LABELS))
    assert "no organ was found" in failed
    case = read_case(replace(SPEC, orientation=None), find_scans(source)[0])
    (source / "notes.txt").write_text("new")
    failed = write_dicom_seg(tmp_path / "case.seg.dcm", SPEC, case, LABELS, KEY)
    assert "the series was changed after it was read" in failed


@pytest.mark.parametrize("fault", ["a voxel", "a place", "a slice"])
def test_a_fault_of_highdicom_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str):
    true = highdicom.seg.Segmentation.save_as

    def save(file: Any, path: Any, **kwargs: Any) -> None:
        (first, second, *_) = file.PerFrameFunctionalGroupsSequence
        if fault == "a voxel":
            file.PixelData = bytes([file.PixelData[0] ^ 1]) + file.PixelData[1:]
        elif fault == "a place":
            first.PlanePositionSequence = second.PlanePositionSequence
        else:
            first.DerivationImageSequence = second.DerivationImageSequence
        true(file, path, **kwargs)

    monkeypatch.setattr(highdicom.seg.Segmentation, "save_as", save)
    _, failed = segmented(series(tmp_path / "s"))
    assert "what highdicom wrote reads back differently" in failed
