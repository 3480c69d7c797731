"""Sizes in NRRD and MetaImage headers that SimpleITK would silently take for mm."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from common.errors import InputError
from datasets.scans.files import scan_file
from datasets.scans.volumes import Geometry, read_header, read_volume, write_volume
from datasets.scans.voxel_size import voxel_size_is_known

VALUES = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
GEOMETRY = Geometry((0.5, 0.6, 3.0), (1.0, 2.0, 3.0), (1, 0, 0, 0, 1, 0, 0, 0, 1))


def written(path: Path, change=lambda header: header) -> Path:
    """Write `VALUES` without compression, and change the header."""
    write_volume(path, VALUES, GEOMETRY)
    image = sitk.ReadImage(str(path))
    sitk.WriteImage(image, str(path), useCompression=False)
    content = path.read_bytes()
    voxels = VALUES.tobytes()
    assert content.endswith(voxels)
    head = content[: -len(voxels)].decode("latin-1")
    path.write_bytes(change(head).encode("latin-1") + voxels)
    return path


def with_line(line: str, before: str):
    return lambda header: header.replace(before, f"{line}\n{before}")


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_plain_headers_are_read_as_they_are(suffix: str, tmp_path: Path):
    path = written(tmp_path / f"a{suffix}")
    array, geometry = read_volume(path)
    assert (array == VALUES).all() and geometry.matches(GEOMETRY)
    assert voxel_size_is_known(scan_file(path, suffix), 2, geometry)


@pytest.mark.parametrize("unit", ["m", "cm", "microns", "um", "\u00b5m", "Inches"])
def test_other_units_of_nrrd_are_refused(unit: str, tmp_path: Path):
    line = f'space units: "{unit}" "{unit}" "{unit}"'
    path = written(tmp_path / "a.nrrd", with_line(line, "encoding:"))
    with pytest.raises(InputError, match="expected mm"):
        read_header(path)


@pytest.mark.parametrize("line", ['space units: "mm" "mm" "mm"', 'units: "" "" ""', "# in cm"])
def test_units_of_mm_or_none_are_read(line: str, tmp_path: Path):
    path = written(tmp_path / "a.nrrd", with_line(line, "encoding:"))
    assert read_volume(path)[1].matches(GEOMETRY)


def test_other_units_of_metaimage_are_refused(tmp_path: Path):
    path = written(tmp_path / "a.mha", with_line("DistanceUnits = m", "ElementType"))
    with pytest.raises(InputError, match="distanceunits in m, expected mm"):
        read_header(path)


@pytest.mark.parametrize("unit", ["?", "UNKNOWN", "mm"])
def test_metaimage_in_mm_or_without_a_unit_is_read(unit: str, tmp_path: Path):
    path = written(tmp_path / "a.mha", with_line(f"DistanceUnits = {unit}", "ElementType"))
    assert read_volume(path)[1].matches(GEOMETRY)


@pytest.mark.parametrize("size", ["0 0.6 3", "nan 0.6 3", "0.5 x 3"])
def test_sizes_of_metaimage_that_are_none_are_refused(size: str, tmp_path: Path):
    path = written(tmp_path / "a.mha", lambda head: re.sub(r"(?<=ElementSpacing = ).*", size, head))
    with pytest.raises(InputError, match="as a size of its voxels"):
        read_header(path)


def test_a_nrrd_with_a_spacing_that_is_none_is_refused(tmp_path: Path):
    head = "NRRD0004\ntype: short\ndimension: 3\nsizes: 4 3 2\nspacings: 2 2 {}\nencoding: raw\n"
    for value, fits in (("5", True), ("nan", False)):
        path = tmp_path / "a.nrrd"
        path.write_bytes(f"{head.format(value)}endian: little\n\n".encode() + VALUES.tobytes())
        if fits:
            assert read_volume(path)[1].spacing == (2.0, 2.0, 5.0)
            continue
        with pytest.raises(InputError, match="gives nan as a size of its voxels"):
            read_volume(path)


@pytest.mark.parametrize("axis", ["(0,0,0)", "(nan,0,0)"])
def test_directions_of_nrrd_that_are_none_are_refused(axis: str, tmp_path: Path):
    path = written(tmp_path / "a.nrrd", lambda head: head.replace("(0.5,0,0)", axis))
    with pytest.raises(InputError, match="as a size of its voxels"):
        read_header(path)


def test_a_header_without_a_size_is_known_to_have_none(tmp_path: Path):
    def without_size(head: str) -> str:
        return "".join(line for line in head.splitlines(True) if "ElementSpacing" not in line)

    path = written(tmp_path / "a.mha", without_size)
    assert not voxel_size_is_known(scan_file(path, ".mha"), 2, read_volume(path)[1])
