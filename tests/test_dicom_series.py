"""Which files of a folder are the slices of its DICOM series, and where the slices lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_files import (
    ALONG_Z,
    EXPLICIT,
    IMPLICIT,
    RTSTRUCT,
    SEG,
    STORED,
    UID,
    XRAY,
    element,
    refused,
    slice_tags,
    write_dicom_file,
    write_series,
)
from PIL import Image

from datasets.scans.dicom import holds_dicom, read_dicom
from datasets.scans.dicom_tags import is_dicom
from datasets.scans.volumes import Geometry, write_volume


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("name", ["IM_0001", "a.dcm", "1.2.840.1"])
def test_files_without_the_preamble(tmp_path: Path, syntax: str, meta: bool, name: str):
    tags = slice_tags(STORED[0], position=(1, 2, 3))
    path = write_dicom_file(tmp_path / name, tags, preamble=False, meta=meta, syntax=syntax)
    assert is_dicom(path) and holds_dicom([path])
    found, geometry = read_dicom(tmp_path)
    assert np.array_equal(found, STORED[:1].astype(int) - 1024) and geometry.origin == (1, 2, 3)


def test_other_files_are_not_taken_for_dicom(tmp_path: Path):
    write_volume(tmp_path / "a.nii.gz", STORED, Geometry.unknown())
    write_volume(tmp_path / "a.nii", STORED, Geometry.unknown())
    write_volume(tmp_path / "a.nrrd", STORED, Geometry.unknown())
    Image.fromarray(STORED[0]).save(tmp_path / "a.png")
    np.savez(tmp_path / "a.npz", a=STORED)
    (tmp_path / "a.json").write_text('{"modality": "CT"}')
    (tmp_path / "empty").touch()
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(200))
    rng = np.random.default_rng(0)
    for index, start in enumerate((b"\x08\0\0\0\1\0\0\0", b"\x02\0\1\0OB", b"\x08\0\x08\0CS\4\0")):
        (tmp_path / f"noise{index}").write_bytes(start + rng.bytes(4000))
    (tmp_path / "zeros").write_bytes(b"\x08\0" + bytes(100_000))
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    assert [path.name for path in sorted(tmp_path.iterdir()) if is_dicom(path)] == []
    assert not holds_dicom(tmp_path.iterdir())
    folder = write_series(tmp_path, STORED)
    assert np.array_equal(read_dicom(folder)[0], STORED.astype(int) - 1024)


@pytest.mark.parametrize("spacing", [0.33, 0.625, 0.75, 0.977, 1.25])
@pytest.mark.parametrize("count", [5, 12, 40])
def test_positions_rounded_by_the_scanner(tmp_path: Path, spacing: float, count: int):
    exact = -37.04 + spacing * np.arange(count + 1)
    rounded = exact.round(1).tolist()
    stored = np.zeros((count, 2, 2), np.uint16) + np.arange(count, dtype=np.uint16)[:, None, None]
    found, geometry = read_dicom(write_series(tmp_path / "all", stored, rounded[:count]))
    assert np.array_equal(found[:, 0, 0], np.arange(count) - 1024)
    assert abs(geometry.spacing[2] - spacing) <= 0.1 / (count - 1) + 1e-9
    label = Geometry((0.7, 0.7, spacing), (-10, -20, exact[0]), ALONG_Z)
    assert geometry.matches(label) and label.matches(geometry)
    assert not geometry.matches(Geometry((0.7, 0.7, spacing * 1.1), label.origin, ALONG_Z))
    for lost in {1, 2, count // 2, count - 2, count - 1}:
        folder = write_series(tmp_path / str(lost), stored, rounded[:lost] + rounded[lost + 1 :])
        refused(folder, "missing or unevenly spaced slices: between")


def test_exact_positions_are_not_taken_for_rounded_ones(tmp_path: Path):
    refused(write_series(tmp_path / "a", STORED, [0, 1.25, 2.58, 3.75]), "unevenly spaced")


def test_objects_that_are_no_images_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = write_series(tmp_path / "a", STORED)
    names = ("kind", "instance", "modality", "study", "series")
    for name, kind, modality in (
        ("RS.dcm", RTSTRUCT, "RTSTRUCT"),
        ("report", "1.2.840.10008.5.1.4.1.1.88.33", "SR"),
        ("state", "1.2.840.10008.5.1.4.1.1.11.1", "PR"),
        ("raw", "1.2.840.10008.5.1.4.1.1.66", "CT"),
    ):
        tags = slice_tags(STORED[0], kind=kind, modality=modality)
        write_dicom_file(folder / name, {key: tags[key] for key in names})
    series = (0x20, 0x0E, "UI", f"{UID}.9")
    write_dicom_file(
        folder / "seg.dcm", slice_tags(STORED, kind=SEG, modality="SEG", series=series)
    )
    assert np.array_equal(read_dicom(folder)[0], STORED.astype(int) - 1024)
    told = capsys.readouterr().err
    for text in ("RS.dcm (RTSTRUCT)", "report (SR)", "state (PR)", "raw (CT)", "seg.dcm (SEG)"):
        assert text in told
    for file in folder.glob("0*.dcm"):
        file.unlink()
    assert not holds_dicom(folder.iterdir())
    refused(folder, "holds no DICOM image, only CT, PR, RTSTRUCT, SEG, SR")


def test_several_phases_and_copies(tmp_path: Path):
    folder = write_series(tmp_path / "a", STORED, [0, 2.5, 5, 7.5])
    for index in range(4):
        echo = {"echo": (0x18, 0x81, "DS", "9.2"), "number": index + 11}
        one = slice_tags(STORED[index], position=(-10, -20, 2.5 * index), **echo)
        write_dicom_file(folder / f"{index}b.dcm", one)
        first = slice_tags(STORED[index], position=(-10, -20, 2.5 * index), number=index,
                           echo=(0x18, 0x81, "DS", "4.6"))  # fmt: skip
        write_dicom_file(folder / f"{index:02}.dcm", first)
    refused(folder, "2 times", "several phases, echoes", "(their echo time is 4.6, 9.2)")
    folder = write_series(tmp_path / "b", STORED)
    (folder / "copy.dcm").write_bytes((folder / "01.dcm").read_bytes())
    refused(folder, "01.dcm, copy.dcm are copies of one image")


def test_two_series_are_named(tmp_path: Path):
    folder = write_series(tmp_path / "a", STORED)
    write_dicom_file(folder / "x.dcm", slice_tags(STORED[0], series=(0x20, 0x0E, "UI", "1.2.3")))
    refused(folder, "2 DICOM series", f"{UID}.1 (4 files of CT, e.g. 00.dcm)", "1.2.3 (1 files")


def test_a_file_cut_short_and_one_that_cannot_be_decoded(tmp_path: Path):
    folder = write_series(tmp_path / "a", STORED)
    content = (folder / "01.dcm").read_bytes()
    for length in (len(content) - 4, 300, 200):
        (folder / "01.dcm").write_bytes(content[:length])
        refused(folder, "cannot be read as slices: 01.dcm", "cut short")
    tags = slice_tags(STORED[0])
    write_dicom_file(tmp_path / "b" / "a.dcm", tags, syntax="1.2.840.10008.1.2.4.201")
    refused(tmp_path / "b", "High-Throughput JPEG 2000", "uncompressed")


def test_an_empty_slice_makes_no_shorter_scan(tmp_path: Path):
    folder = write_series(tmp_path, STORED)
    (folder / "._0.dcm").write_bytes(b"\0\5\x16\7")  # as macOS leaves beside each file
    assert read_dicom(folder)[0].shape == STORED.shape
    (folder / "last.dcm").touch()
    refused(folder, "cannot be read as slices: last.dcm", "fetch or export the series again")


def test_a_single_picture(tmp_path: Path, capsys: pytest.CaptureFixture):
    detector = {"kind": XRAY, "modality": "DX", "position": None, "rescale": None}
    chest = slice_tags(
        STORED[0], spacing=None, at_detector=(0x18, 0x1164, "DS", (0.14, 0.15)), **detector
    )
    path = write_dicom_file(tmp_path / "a" / "chest", chest)
    for source in (path.parent, path):
        found, geometry = read_dicom(source)
        assert np.array_equal(found, STORED[:1]) and found.dtype == np.uint16
        assert geometry == Geometry((0.15, 0.14, 1.0), (0.0, 0.0, 0.0), ALONG_Z)
    assert "that of the detector is used" in capsys.readouterr().err
    write_dicom_file(tmp_path / "b" / "chest", slice_tags(STORED[0], spacing=None, **detector))
    assert read_dicom(tmp_path / "b")[1] == Geometry.unknown()
    assert "no pixel spacing in the patient; 1 mm is used" in capsys.readouterr().err
    side = slice_tags(STORED[1], **detector)
    write_dicom_file(tmp_path / "a" / "side", side)
    refused(tmp_path / "a", "differs")
    one = slice_tags(STORED[0], position=(1, 2, 3), thick=(0x18, 0x50, "DS", "4"))
    write_dicom_file(tmp_path / "c" / "a.dcm", one)
    assert read_dicom(tmp_path / "c")[1] == Geometry((0.7, 0.7, 4.0), (1.0, 2.0, 3.0), ALONG_Z)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_what_follows_the_pixels(tmp_path: Path, syntax: str):
    """Zeros and elements may follow. For other bytes GDCM takes gigabytes before it fails."""
    folder, stored = tmp_path / "s", STORED[:1]
    path = write_dicom_file(folder / "0.dcm", slice_tags(stored[0]), syntax=syntax)
    whole = path.read_bytes()
    padding = element(0xFFFC, 0xFFFC, "OB", b"abcd", explicit=syntax == EXPLICIT)
    for harmless in (bytes(9), padding):
        path.write_bytes(whole + harmless)
        array, _ = read_dicom(folder)
        assert array.shape == stored.shape
    path.write_bytes(whole + bytes.fromhex("9fbf36ce4bad298dace0a04bf509404b"))
    refused(folder, "cannot be read as slices: 0.dcm")
