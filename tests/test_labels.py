"""Label files have exactly the geometry of their scan, or they are not written."""

from __future__ import annotations

import gzip
import struct
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from test_scans import placed, volume

from common.errors import InputError
from datasets.scans.files import ScanFile, scan_file, suffix_of
from datasets.scans.labels import write_like
from datasets.scans.volumes import Geometry, read_header, read_volume, write_volume

PIXDIM, QFORM, SFORM = 76, 252, 254  # offsets in a NIfTI-1 header


def nifti(path: Path, *, signs: tuple[int, int, int], qform: int, sform: int) -> Path:
    """Write a NIfTI file with these signs of its voxel sizes and codes of its two transforms."""
    write_volume(path, volume(), placed("RAS"))
    packed = path.suffix == ".gz"
    content = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    sizes = struct.unpack_from("<3f", content, PIXDIM + 4)
    struct.pack_into("<3f", content, PIXDIM + 4, *np.multiply(sizes, signs))
    struct.pack_into("<h", content, QFORM, qform)
    struct.pack_into("<h", content, SFORM, sform)
    for offset in (148, 228, 328):  # descrip, aux_file, intent_name
        content[offset : offset + 9] = b"Jane Roe\0"
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


def labelled(source: Path, output: Path, channel: int | None = None) -> Path:
    """Write a label file for a scan as `predict.py` does."""
    scan = scan_file(source, suffix_of(source), channel)
    array, geometry = read_volume(source, channel)
    write_like(output, (array > 3).astype(np.uint8), scan, geometry)
    assert np.array_equal(read_volume(output)[0], array > 3)
    assert read_header(output) == read_header(source, channel) == (array.shape, geometry)
    return output


@pytest.mark.parametrize(
    ("signs", "qform", "sform"), list(product(product((1, -1), repeat=3), (0, 1), (0, 1)))
)
def test_signs_of_nifti_voxel_sizes(
    tmp_path: Path, signs: tuple[int, int, int], qform: int, sform: int
):
    source = nifti(tmp_path / "a.nii", signs=signs, qform=qform, sform=sform)
    labels = labelled(source, tmp_path / "out.nii")
    before, after = (path.read_bytes()[:348] for path in (source, labels))
    for start, stop in ((40, 56), (76, 92), (252, 328)):  # size, voxel sizes, transforms
        assert before[start:stop] == after[start:stop]


@pytest.mark.parametrize(("source", "output"), list(product((".nii", ".nii.gz"), repeat=2)))
def test_a_patients_name_is_not_copied(tmp_path: Path, source: str, output: str):
    scan = nifti(tmp_path / f"a{source}", signs=(1, 1, 1), qform=1, sform=1)
    content = labelled(scan, tmp_path / f"out{output}").read_bytes()
    packed = content[:2] == b"\x1f\x8b"
    assert packed == (output == ".nii.gz")
    assert b"Jane" not in (gzip.decompress(content) if packed else content)


def test_an_unpacked_file_named_nii_gz(tmp_path: Path):
    plain = nifti(tmp_path / "a.nii", signs=(1, 1, 1), qform=1, sform=1)
    labelled(plain.rename(tmp_path / "a.nii.gz"), tmp_path / "out.nii.gz")


def test_the_other_byte_order(tmp_path: Path):
    plain = nibabel.load(nifti(tmp_path / "a.nii", signs=(1, 1, 1), qform=1, sform=1))
    header = plain.header.as_byteswapped(">")
    nibabel.Nifti1Image(plain.get_fdata(), plain.affine, header).to_filename(tmp_path / "b.nii")
    labelled(tmp_path / "b.nii", tmp_path / "out.nii")


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".nii.gz", ".mha", ".mhd"])
def test_labels_of_a_channel(tmp_path: Path, suffix: str):
    parts = [sitk.GetImageFromArray(volume() + index) for index in range(2)]
    for part in parts:
        part.SetSpacing((0.7, 0.9, 2.5))
        part.SetOrigin((3.0, -1.0, 0.3))
    sitk.WriteImage(sitk.JoinSeries(parts), str(tmp_path / f"a{suffix}"))
    output = {".nhdr": ".nrrd", ".mhd": ".mha"}.get(suffix, suffix)
    labelled(tmp_path / f"a{suffix}", tmp_path / f"out{output}", channel=1)


def test_a_nrrd_without_directions(tmp_path: Path):
    body = volume().astype("<i2").tobytes()
    head = (
        "NRRD0004",
        "type: int16",
        "dimension: 3",
        "sizes: 7 6 5",
        "endian: little",
        "encoding: raw",
        "spacings: 0.7 0.9 2.5",
    )
    (tmp_path / "a.nrrd").write_bytes("\n".join(head).encode() + b"\n\n" + body)
    labelled(tmp_path / "a.nrrd", tmp_path / "out.nrrd")


def test_labels_with_another_geometry_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    geometry, array = placed("LPS"), volume().astype(np.uint8)
    for suffix in (".nii.gz", ".mha", ".nrrd"):
        source, output = tmp_path / f"a{suffix}", tmp_path / "out" / f"a{suffix}"
        write_volume(source, array, geometry)
        where = read_header(source)[1]
        moved = Geometry(where.spacing, (where.origin[0] + 1, *where.origin[1:]), where.direction)
        other = tmp_path / f"b{suffix}"
        write_volume(other, array, moved)
        # The header of this file differs from what was read.
        scan = ScanFile("a", other, suffix)
        if suffix == ".mha":  # nothing is copied from an MHA header
            monkeypatch.setattr(sitk.Image, "SetOrigin", lambda *_: None)
        with pytest.raises(InputError, match=r"origin .* pass another --format") as caught:
            write_like(output, array, scan, where)
        assert str(other) in str(caught.value) and "partial" not in str(caught.value)
        monkeypatch.undo()
        assert not list(output.parent.iterdir())


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_another_format_changes_only_rounding(tmp_path: Path, suffix: str):
    write_volume(tmp_path / "a.mha", volume(), placed("RAS"))
    array, geometry = read_volume(tmp_path / "a.mha")
    scan = ScanFile("a", tmp_path / "a.mha", ".mha")
    write_like(tmp_path / f"out{suffix}", array, scan, geometry)
    assert read_header(tmp_path / f"out{suffix}")[1].matches(geometry)
