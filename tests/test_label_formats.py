"""Names and colours inside label files, read by other libraries; voxels and geometry are exact."""

from __future__ import annotations

import gzip
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from test_scans import placed, volume

from datasets.colours import label_colours
from datasets.registry import SYNAPSE
from datasets.scans.files import scan_file, suffix_of
from datasets.scans.geometry import Geometry
from datasets.scans.labels import write_labels, write_like
from datasets.scans.volumes import read_header, read_volume, write_volume
from evaluation.volume_results import Case, write_case

NAMES = ("spleen", "Leber & <Gallenblase> ü", "a\\b")
SPEC = replace(
    SYNAPSE,
    class_names=NAMES,
    raw_labels={1: 1, 7: 2, 300: 3},
    ignored_labels=(),
    predicted_values=(1, 7, 200),
)
LABELS = (volume() % 4).astype(np.uint8)
VALUES = np.array([0, 1, 7, 200], np.uint8)[LABELS]


def table(path: Path) -> dict[int, tuple[str, tuple[float, ...], float]]:
    """Read the label table of a NIfTI file as TotalSegmentator does: the first extension is XML."""
    first, second = nibabel.load(path).header.extensions
    # TotalSegmentator's code, and NIFTI_ECODE_CARET, the only one that Connectome Workbench reads.
    assert (first.get_code(), second.get_code()) == (0, 30)
    assert first.content == second.content
    root = ElementTree.fromstring(first.get_content())
    assert root.tag == "CaretExtension"
    assert root.find("VolumeInformation").get("Index") == "0"
    assert root.findtext("VolumeInformation/VolumeType") == "Label"
    return {
        int(one.get("Key")): (
            one.text,
            tuple(float(one.get(name)) for name in ("Red", "Green", "Blue")),
            float(one.get("Alpha")),
        )
        for one in root.findall("VolumeInformation/LabelTable/Label")
    }


def assert_table(path: Path, values: tuple[int, ...], names: tuple[str, ...] = NAMES) -> None:
    found = table(path)
    assert {value: row[0] for value, row in found.items()} == dict(
        zip((0, *values), ("background", *names), strict=True)
    )
    colours = np.array([found[value][1] for value in (0, *values)])
    assert np.abs(colours * 255 - label_colours(names)).max() < 1e-3
    assert [found[value][2] for value in (0, *values)] == [0] + [1] * len(values)


def plain(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_labels_hold_their_names_and_nothing_else_changes(
    tmp_path: Path, suffix: str, version: int
):
    source = tmp_path / f"a{suffix}"
    if version == 1:
        write_volume(source, volume(), placed("RAS"))
    else:
        image = nibabel.Nifti2Image(volume().T, np.diag([-0.8, 1.5, 2.5, 1]))
        nibabel.save(image, source)
    scan, geometry = scan_file(source, suffix_of(source)), read_header(source)[1]
    output, unnamed = tmp_path / "out" / source.name, tmp_path / "unnamed" / source.name
    write_labels(output, LABELS, scan, geometry, SPEC)
    write_like(unnamed, VALUES, scan, geometry)
    assert_table(output, (1, 7, 200))
    # Header and voxels are the bytes of the file without names, but for where the voxels begin.
    size, place = (348, slice(108, 112)) if version == 1 else (540, slice(168, 176))
    named, without = bytearray(plain(output)), bytearray(plain(unnamed))
    start, before = (int(nibabel.load(path).dataobj.offset) for path in (output, unnamed))
    assert start % 16 == 0 and before == size + 4
    assert named[start:] == without[before:] == VALUES.tobytes()
    named[place] = without[place] = bytes(place.stop - place.start)
    assert named[:size] == without[:size]
    # Four readers.
    assert np.array_equal(nibabel.load(output).get_fdata().T, VALUES)
    assert read_volume(output)[0].tolist() == VALUES.tolist()
    assert read_volume(output)[1] == geometry
    if version == 1:
        image = sitk.ReadImage(str(output))
        assert np.array_equal(sitk.GetArrayFromImage(image), VALUES)
        assert image.GetOrigin() == sitk.ReadImage(str(source)).GetOrigin()
        medpy_io = pytest.importorskip("medpy.io")
        assert np.array_equal(medpy_io.load(str(output))[0].T, VALUES)


def test_extensions_of_the_scan_are_not_copied(tmp_path: Path):
    image = nibabel.Nifti1Image(volume().T, np.diag([-1, -1, 2, 1]))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Jane Roe"))
    nibabel.save(image, tmp_path / "a.nii")
    array, geometry = read_volume(tmp_path / "a.nii")  # a scan with an extension is read
    assert np.array_equal(array, volume())
    write_labels(
        tmp_path / "out.nii", LABELS, scan_file(tmp_path / "a.nii", ".nii"), geometry, SPEC
    )
    assert b"Jane" not in (tmp_path / "out.nii").read_bytes()
    assert_table(tmp_path / "out.nii", (1, 7, 200))


def test_nifti_labels_of_another_format_hold_their_names(tmp_path: Path):
    write_volume(tmp_path / "a.mha", volume(), placed("LPS"))
    output = tmp_path / "out.nii.gz"
    write_labels(output, LABELS, scan_file(tmp_path / "a.mha", ".mha"), placed("LPS"), SPEC)
    assert_table(output, (1, 7, 200))
    assert np.array_equal(read_volume(output)[0], VALUES)
    assert read_volume(output)[1].matches(placed("LPS"))


def test_a_table_of_255_classes(tmp_path: Path):
    names = tuple(f"class {value}" for value in range(1, 256))
    spec = SPEC.of_plain_classes(255)
    write_volume(tmp_path / "a.nii.gz", volume(), placed("RAS"))
    scan = scan_file(tmp_path / "a.nii.gz", ".nii.gz")
    write_labels(tmp_path / "out.nii.gz", LABELS, scan, read_header(scan.path)[1], spec)
    assert_table(tmp_path / "out.nii.gz", tuple(range(1, 256)), names)
    assert np.array_equal(read_volume(tmp_path / "out.nii.gz")[0], LABELS)


def test_files_of_test_py_hold_names_in_prediction_and_label_alone(tmp_path: Path):
    image = volume().astype(np.float32)
    case = Case("c", image, LABELS, placed("LPS"), None)
    write_case(case, LABELS[::-1].copy(), tmp_path / "named", SPEC)
    write_case(case, LABELS[::-1].copy(), tmp_path / "plain")
    for kind in ("pred", "gt"):
        named, without = (tmp_path / part / f"c_{kind}.nii.gz" for part in ("named", "plain"))
        assert_table(named, (1, 2, 3))
        first, second = (sitk.ReadImage(str(path)) for path in (named, without))
        assert np.array_equal(sitk.GetArrayFromImage(first), sitk.GetArrayFromImage(second))
        for what in ("GetSpacing", "GetOrigin", "GetDirection", "GetPixelID"):
            assert getattr(first, what)() == getattr(second, what)()
        assert nibabel.load(named).affine.tolist() == nibabel.load(without).affine.tolist()
    assert not nibabel.load(tmp_path / "named" / "c_img.nii.gz").header.extensions
    image_files = [plain(tmp_path / part / "c_img.nii.gz") for part in ("named", "plain")]
    assert image_files[0] == image_files[1]


@pytest.mark.parametrize("source", [".nii.gz", ".nrrd", ".mha"])
def test_a_segmentation_for_slicer(tmp_path: Path, source: str):
    nrrd = pytest.importorskip("nrrd", reason="pynrrd is not installed")
    geometry = placed("LAS")
    write_volume(tmp_path / f"a{source}", volume(), geometry)
    scan = scan_file(tmp_path / f"a{source}", source)
    geometry = read_header(scan.path)[1]
    output = tmp_path / "out.seg.nrrd"
    write_labels(output, LABELS, scan, geometry, SPEC)
    array, header = nrrd.read(str(output))
    assert array.dtype == np.uint8 and np.array_equal(array.T, VALUES)
    assert header["space"] == "left-posterior-superior"
    axes = np.reshape(geometry.direction, (3, 3)) * geometry.spacing
    assert np.abs(header["space directions"] - axes.T).max() < 1e-12
    assert np.abs(header["space origin"] - geometry.origin).max() < 1e-12
    assert header["Segmentation_MasterRepresentation"] == "Binary labelmap"
    assert header["Segmentation_ReferenceImageExtentOffset"] == "0 0 0"
    image = sitk.ReadImage(str(output))
    assert np.array_equal(sitk.GetArrayFromImage(image), VALUES)
    colours = label_colours(NAMES)[1:] / 255
    for index, (name, value) in enumerate(zip(NAMES, (1, 7, 200), strict=True)):

        def field(key: str, index: int = index) -> str:
            return image.GetMetaData(f"Segment{index}_{key}")

        assert field("Name") == name and field("LabelValue") == str(value)
        assert field("ID") == f"Segment_{value}" and field("Layer") == "0"
        assert np.allclose(np.fromstring(field("Color"), sep=" "), colours[index], atol=1e-5)
        # Slicer cuts all segments of a layer to the extent of its first segment.
        assert field("Extent") == "0 6 0 5 0 4"
    assert not image.HasMetaDataKey("Segment3_ID")
    found, there = read_volume(output)
    assert np.array_equal(found, VALUES) and there.matches(geometry)
    if source == ".nrrd":
        assert there == geometry


def test_other_formats_stay_as_they_were(tmp_path: Path):
    for suffix in (".nrrd", ".mha"):
        write_volume(tmp_path / f"a{suffix}", volume(), placed("LPS"))
        scan = scan_file(tmp_path / f"a{suffix}", suffix)
        geometry: Geometry = read_header(scan.path)[1]
        write_labels(tmp_path / "named" / f"a{suffix}", LABELS, scan, geometry, SPEC)
        write_like(tmp_path / "plain" / f"a{suffix}", VALUES, scan, geometry)
        files = [tmp_path / folder / f"a{suffix}" for folder in ("named", "plain")]
        assert files[0].read_bytes() == files[1].read_bytes()
