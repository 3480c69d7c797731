"""DICOM series as scanners and archives write them: values, places, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import (
    ALONG_Z,
    CT,
    ENHANCED_CT,
    EXPLICIT,
    IMPLICIT,
    MR,
    NM,
    PET,
    STORED,
    refused,
    slice_tags,
    write_dicom_file,
    write_series,
)

from common.errors import InputError
from datasets.scans.dicom import read_dicom, read_dicom_header
from datasets.scans.volumes import Geometry


def replaced(folder: Path, index: int, stored: np.ndarray = STORED, **tags: Any) -> Path:
    """Write one slice of a series again, with other tags."""
    one = slice_tags(stored[index], position=(-10, -20, 2.5 * index), number=index + 1, **tags)
    write_dicom_file(folder / f"{index:02}.dcm", one)
    return folder


def test_an_ordinary_series_is_read_as_by_simpleitk(tmp_path: Path):
    folder = write_series(tmp_path / "a", STORED)
    found, geometry = read_dicom(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in sorted(folder.iterdir())])
    expected = reader.Execute()
    assert np.array_equal(found, sitk.GetArrayFromImage(expected))
    assert found.dtype == sitk.GetArrayFromImage(expected).dtype == np.int32
    assert np.array_equal(found, STORED.astype(int) - 1024)
    assert geometry == Geometry((0.7, 0.7, 2.5), (-10.0, -20.0, 0.0), ALONG_Z)
    assert geometry.spacing == pytest.approx(expected.GetSpacing())


@pytest.mark.parametrize(
    "rescales",
    [
        [(1, 0), (0.8, 0), (0.5, -3.25), (2.125, 7)],  # PET: each slice has its own slope
        [(1, 0), (1, -1024), (1, 30000), (20, -30000)],  # whole, but beyond the first one's range
        [(0.25, 0), (1, 0), (1, 0), (1, -1)],
    ],
)
def test_each_slice_has_its_own_rescale(tmp_path: Path, rescales: list[tuple[float, float]]):
    for index, rescale in enumerate(rescales):
        replaced(tmp_path, index, rescale=rescale, kind=PET, modality="PT")
    found, _ = read_dicom(tmp_path)
    for index, (slope, intercept) in enumerate(rescales):
        assert np.array_equal(found[index], STORED[index] * float(slope) + intercept)


def test_bits_and_signs_may_differ_between_slices(tmp_path: Path):
    negative = (STORED.astype(int) - 2000).astype(np.int16)
    replaced(tmp_path, 0, rescale=(1, 0))
    replaced(tmp_path, 1, negative, rescale=(1, 0))
    twelve = {"bits": (0x28, 0x101, "US", 12), "high": (0x28, 0x102, "US", 11)}
    replaced(tmp_path, 2, rescale=(1, 0), **twelve)
    replaced(tmp_path, 3, STORED + 61000, rescale=(1, -1))
    found, _ = read_dicom(tmp_path)
    assert np.array_equal(found[1], negative[1]) and np.array_equal(found[0], STORED[0])
    assert np.array_equal(found[2], STORED[2])
    assert np.array_equal(found[3], STORED[3].astype(int) + 60999)


MONOCHROME1 = (0x28, 4, "CS", "MONOCHROME1")
ODD = {
    "pixel spacing": ({"spacing": (0.7, 0.75)}, "pixel spacing differs"),
    "no pixel spacing": ({"spacing": None}, "pixel spacing differs"),
    "orientation": ({"axes": (0, 1, 0, 0, 0, -1)}, "orientation differs"),
    "photometric": ({"photometric": MONOCHROME1, "rescale": None},
                    "photometric interpretation differs"),
    "colour": ({"photometric": (0x28, 4, "CS", "RGB"), "samples": (0x28, 2, "US", 3)},
               "is in colour (RGB)"),
    "scout": ({"axes": (1, 0, 0, 0, 0, -1), "type": (8, 8, "CS", "ORIGINAL\\PRIMARY\\LOCALIZER")},
              "localizer images (scouts)"),
    "mosaic": ({"type": (8, 8, "CS", "ORIGINAL\\PRIMARY\\M\\MOSAIC")}, "(a mosaic)"),
    "slope 0": ({"rescale": (0, 0)}, "rescale slope of 0"),
    "slope of letters": ({"slope": (0x28, 0x1053, "DS", "one")}, "unreadable tag (0028,1053)"),
    "two numbers": ({"position_": (0x20, 0x32, "DS", "1\\2"), "position": None},
                    "unreadable tag (0020,0032)"),
    "spacing 0": ({"spacing": (0.7, 0)}, "expected above 0"),
    "skewed axes": ({"axes": (1, 0, 0, 0.1, 0.995, 0)}, "not at right angles"),
    "a table of values": ({"lut": (0x28, 0x3000, "SQ", [[(0x28, 0x3003, "LO", "x")]])},
                          "Modality LUT"),
    "no position": ({"position": None}, "02.dcm"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_slice_that_differs_is_refused_by_its_name(tmp_path: Path, name: str):
    tags, told = ODD[name]
    folder = write_series(tmp_path / "a", STORED)
    one = slice_tags(STORED[2], **({"position": (-10, -20, 5), "number": 3} | tags))
    write_dicom_file(folder / "02.dcm", one)
    refused(folder, told, "02.dcm")


def test_slices_of_another_size_are_refused(tmp_path: Path):
    folder = write_series(tmp_path / "a", STORED)
    write_dicom_file(folder / "03.dcm", slice_tags(STORED[3, :4], position=(-10, -20, 7.5)))
    refused(folder, "size differs", "(5 × 6)", "03.dcm (4 × 6)")


@pytest.mark.parametrize(("bits", "dtype"), [(12, "u2"), (16, "u2"), (16, "i2")])
def test_low_is_bright_is_inverted(tmp_path: Path, bits: int, dtype: str):
    stored = (STORED.astype(int) - 2048 * (dtype == "i2")).astype(dtype)
    tags: dict[str, Any] = {
        "rescale": None,
        "photometric": MONOCHROME1,
        "bits": (0x28, 0x101, "US", bits),
        "high": (0x28, 0x102, "US", bits - 1),
    }
    found, _ = read_dicom(write_series(tmp_path / "a", stored, **tags))
    assert np.array_equal(found, (-1 if dtype == "i2" else 2**bits - 1) - stored.astype(int))
    refused(write_series(tmp_path / "b", stored, **(tags | {"rescale": (1, -1024)})), "MONOCHROME1")


def test_values_beyond_the_stored_bits_are_refused(tmp_path: Path):
    twelve = {"bits": (0x28, 0x101, "US", 12), "high": (0x28, 0x102, "US", 11)}
    padded = STORED.copy()
    padded[2, 0, 0] = 63536
    folder = write_series(tmp_path / "a", padded, **twelve)
    with pytest.raises(InputError, match=r"02\.dcm stores values up to 63536, beyond its 12 bits"):
        read_dicom(folder)
    signed = (STORED.astype(int) - 2000).astype(np.int16)
    found, _ = read_dicom(write_series(tmp_path / "b", signed, rescale=(1, 0), **twelve))
    assert np.array_equal(found, signed)
    unextended = (signed.astype(np.uint16) & 0xFFF).astype(np.uint16)
    sign = {"signed": (0x28, 0x103, "US", 1)}
    found, _ = read_dicom(
        write_series(tmp_path / "c", unextended, rescale=(1, 0), **twelve, **sign)
    )
    assert np.array_equal(found, signed)
    overlay = {"overlay": (0x6000, 0x102, "US", 15)}
    found, _ = read_dicom(
        write_series(tmp_path / "d", STORED | 0x8000, rescale=None, **twelve, **overlay)
    )
    assert np.array_equal(found, STORED)


OBLIQUE = (0.8, 0.6, 0, -0.6, 0.8, 0)


@pytest.mark.parametrize("kind", [CT, ENHANCED_CT, MR, PET, NM, "1.2.840.10008.5.1.4.1.1.6.1"])
@pytest.mark.parametrize("axes", [(1, 0, 0, 0, 1, 0), OBLIQUE])
def test_the_geometry_is_that_of_the_tags(tmp_path: Path, kind: str, axes: tuple):
    tags = {"kind": kind, "axes": axes, "spacing": (0.7, 0.9), "rescale": (2.5, -7)}
    folder = write_series(tmp_path / "a", STORED, [9, 6.5, 4, 1.5], **tags)
    found, geometry = read_dicom(folder)
    assert np.array_equal(found, STORED[::-1] * 2.5 - 7)
    assert geometry.spacing == pytest.approx((0.9, 0.7, 2.5))
    assert geometry.origin == (-10, -20, 1.5)
    rows = np.array([*np.reshape(axes, (2, 3)), (0, 0, 1)])
    assert np.allclose(geometry.direction, rows.T.ravel())
    assert read_dicom_header(folder) == (found.shape, geometry)


def frames(places: list[float], rescales: list[tuple[float, float]], **tags: Any) -> dict:
    """Return a file of several frames, as Enhanced CT and MR have them."""
    shared = [
        (0x28, 0x9110, "SQ", [[(0x28, 0x30, "DS", (0.7, 0.9)), (0x18, 0x50, "DS", 2.5)]]),
        (0x20, 0x9116, "SQ", [[(0x20, 0x37, "DS", (1, 0, 0, 0, 1, 0))]]),
    ]
    own = [
        [
            (0x20, 0x9113, "SQ", [[(0x20, 0x32, "DS", (-10, -20, place))]]),
            (0x28, 0x9145, "SQ", [[(0x28, 0x1052, "DS", b), (0x28, 0x1053, "DS", a)]]),
        ]
        for place, (a, b) in zip(places, rescales, strict=True)
    ]
    groups = {"shared": (0x5200, 0x9229, "SQ", [shared]), "own": (0x5200, 0x9230, "SQ", own)}
    plain = slice_tags(
        STORED[: len(places)], position=None, spacing=None, rescale=None, kind=ENHANCED_CT
    )
    return {name: tag for name, tag in (plain | groups | tags).items() if tag is not None}


KINDS = ("2", "2.1", "4", "4.1", "4.4", "6.2", "7.3", "12.1.1", "13.1.1", "20", "77.1.5.4", "130")


@pytest.mark.parametrize("kind", KINDS)
def test_frames_have_their_own_rescale_in_every_kind(tmp_path: Path, kind: str):
    rescales = [(2, -1000), (0.5, 0), (1, -1000), (3, 4)]
    kind = f"1.2.840.10008.5.1.4.1.1.{kind}"
    tags = frames([0, 2.5, 5, 7.5], rescales, kind=(0x08, 0x16, "UI", kind))
    write_dicom_file(tmp_path / "a.dcm", tags)
    expected = [STORED[i] * float(a) + b for i, (a, b) in enumerate(rescales)]
    assert np.allclose(read_dicom(tmp_path)[0], expected, rtol=0, atol=1e-9)


def test_a_detector_is_not_the_place_of_several_frames(tmp_path: Path):
    detector = [[(0x20, 0x32, "DS", (1, 2, 3)), (0x20, 0x37, "DS", (1, 0, 0, 0, 1, 0))]]
    tags = {"detector": (0x54, 0x22, "SQ", detector), "kind": (0x08, 0x16, "UI", NM)}
    one = slice_tags(STORED[0], position=None) | tags
    write_dicom_file(tmp_path / "one" / "a.dcm", one)
    assert read_dicom(tmp_path / "one")[1].origin == (1, 2, 3)
    write_dicom_file(tmp_path / "all" / "a.dcm", slice_tags(STORED, position=None) | tags)
    refused(tmp_path / "all", "without a position", "dcm2niix")


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
@pytest.mark.parametrize("places", [[0, 2.5, 5, 7.5], [7.5, 5, 2.5, 0], [2.5, 0, 7.5, 5]])
def test_a_file_of_several_frames(tmp_path: Path, places: list[float], syntax: str):
    rescales = [(2, -1000), (0.5, 0), (1, -1000), (3, 4)]
    write_dicom_file(tmp_path / "a.dcm", frames(places, rescales), syntax=syntax)
    found, geometry = read_dicom(tmp_path)
    expected = [STORED[i] * float(a) + b for i, (a, b) in enumerate(rescales)]
    assert np.allclose(found, np.array(expected)[np.argsort(places)], rtol=0, atol=1e-9)
    assert geometry == Geometry((0.9, 0.7, 2.5), (-10.0, -20.0, 0.0), ALONG_Z)
    assert read_dicom_header(tmp_path) == (found.shape, geometry)


def test_frames_without_places_are_refused(tmp_path: Path):
    same = [(1, 0)] * 4
    write_dicom_file(tmp_path / "a" / "a.dcm", frames([0, 2.5, 5, 7.5], same, own=None))
    refused(tmp_path / "a", "without a position", "dcm2niix")
    write_dicom_file(tmp_path / "b" / "a.dcm", frames([0, 2.5, 0, 2.5], same))
    refused(tmp_path / "b", "each position is there 2 times", "file of its own", "dcm2niix")
    own = (0x28, 0x30, "DS", (1, 1))
    write_dicom_file(tmp_path / "c" / "a.dcm", frames([0, 2.5, 5, 7.5], same, spacing=own))
    refused(tmp_path / "c", "(0028,0030) twice")
