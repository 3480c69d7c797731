"""Damaged or hostile scans are refused in a sentence: no voxel made up, no memory taken."""

from __future__ import annotations

import gzip
import os
import resource
import shutil
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import slice_tags, write_dicom_file, write_series
from PIL import Image

from common.errors import InputError
from datasets.scans.dicom import read_dicom
from datasets.scans.files import DICOM, ScanFile, search, unused_in_series
from datasets.scans.isolated import IsolatedReader
from datasets.scans.nifti import nifti_header
from datasets.scans.pictures import read_picture
from datasets.scans.unused import BROKEN
from datasets.scans.volumes import Geometry, read_header, read_volume, write_volume
from datasets.scans.voxel_size import voxel_size_is_known

VOXELS = np.random.default_rng(0).integers(-1000, 1000, (6, 20, 18)).astype("<i2")
PLACE = Geometry((0.5, 0.75, 3.0), (1.0, 2.0, 3.0), (1, 0, 0, 0, 1, 0, 0, 0, 1))
META = (
    "ObjectType = Image\nNDims = 3\n{}DimSize = 18 20 6\nElementSpacing = 0.5 0.75 3\n"
    "Offset = 1 2 3\nElementType = MET_SHORT\nElementDataFile = {}\n"
)
NRRD = (
    "NRRD0004\ntype: short\ndimension: 3\nsizes: 18 20 6\nspacings: 0.5 0.75 3\n"
    "encoding: {}\nendian: little\n{}\n"
)


def refused(path: Path, *told: str) -> None:
    """Check that header and voxels are refused in one short line that holds these texts."""
    with pytest.raises(InputError) as caught:
        read_volume(path)
    message = str(caught.value)
    assert message.startswith(str(path.parent)) and "\n" not in message and len(message) < 700
    for text in told:
        assert text in message


def with_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def mha(path: Path, extra: str = "", data: str = "LOCAL", voxels: bytes | None = None) -> Path:
    content = META.format(extra, data).encode()
    return with_bytes(path, content + (VOXELS.tobytes() if voxels is None else voxels))


def nrrd(path: Path, encoding: str, voxels: bytes, extra: str = "") -> Path:
    return with_bytes(path, NRRD.format(encoding, extra).encode() + voxels)


def read_well(path: Path) -> None:
    """Check voxels and spacing against those that were written."""
    found, geometry = read_volume(path)
    np.testing.assert_array_equal(found, VOXELS)
    assert geometry.spacing == (0.5, 0.75, 3.0)


@pytest.mark.parametrize("dims", ["0", "-1", "11", "99", "9999999999", "3.5", "many", ""])
@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd"])
def test_a_number_of_dimensions_that_is_none(tmp_path: Path, dims: str, suffix: str):
    path = mha(tmp_path / f"a{suffix}")
    path.write_bytes(path.read_bytes().replace(b"NDims = 3", b"NDims = " + dims.encode()))
    refused(path, "ndims" if not dims.lstrip("-").isdigit() else "dimensions")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("NDims = 3\n", "ndims twice"),
        ("NDims : 3\n", "ndims twice"),
        ("NDims\n", "ndims twice"),
        ("BinaryData = False\n", "as text"),
        ("CompressedData = Maybe\n", "True or False"),
        ("HeaderSize = 5\n", "HeaderSize of 5"),
        ("ElementToIntensityFunctionSlope = 2\n", "rescales"),
        ("BinaryDataByteOrderMSB = True\nElementByteOrderMSB = False\n", "two orders"),
        ("TransformMatrix = 1 0 0\n", "expected 9 finite numbers"),
        ("CenterOfRotation = 0 0 nan\n", "expected 3 finite numbers"),
        ("ElementNumberOfChannels = 99999999999\n", "GiB"),
    ],
)
def test_fields_of_metaimage_that_do_not_fit(tmp_path: Path, line: str, told: str):
    refused(mha(tmp_path / "a.mha", line), told)


@pytest.mark.parametrize("field", ["Name", "Comment", "ObjectSubType", "Modality", "X" * 5000])
def test_fields_of_metaimage_too_long_for_its_library(tmp_path: Path, field: str):
    refused(mha(tmp_path / "a.mha", f"{field} = {'(1,1,1) ' * 41}\n"), "too many")


@pytest.mark.parametrize("field", ["space origin", "kinds", "old min", "A" * 400, "centers"])
@pytest.mark.parametrize("value", ["(1," + "A" * 5000, "(1,1,1) " * 600])
def test_fields_of_nrrd_too_long_for_its_library(tmp_path: Path, field: str, value: str):
    path = nrrd(tmp_path / "a.nrrd", "raw", VOXELS.tobytes(), f"{field}: {value}\n")
    refused(path, "no field of NRRD")


def test_free_text_of_nrrd_may_be_long(tmp_path: Path):
    extra = f"# {'A' * 2000}\ncontent: {'B' * 2000}\nkey:={'C' * 2000}\n"
    read_well(nrrd(tmp_path / "a.nrrd", "raw", VOXELS.tobytes(), extra))


@pytest.mark.parametrize("name", ["a\x01.raw", "A" * 400, "LOCAL\x01"])
def test_names_of_voxels_that_no_file_has(tmp_path: Path, name: str):
    refused(mha(tmp_path / "a.mhd", data=name, voxels=b""), "no name of a file")


@pytest.mark.parametrize("name", ["/etc/hostname", "../a.raw", "x/../../a.raw", "..\\a", "C:\\a"])
@pytest.mark.parametrize("kind", [".mhd", ".nhdr", "list.mhd", "list.nhdr"])
def test_voxels_elsewhere_are_refused(tmp_path: Path, name: str, kind: str):
    (tmp_path / "a.raw").write_bytes(VOXELS.tobytes())
    (tmp_path / "in" / "x").mkdir(parents=True)
    data = f"LIST\n{name}" if kind.startswith("list") else name
    path = tmp_path / "in" / f"a{kind}"
    if path.suffix == ".mhd":
        mha(path, data=data, voxels=b"")
    else:
        with_bytes(path, NRRD.format("raw", f"data file: {data}\n").encode())
    refused(path, "which is not in the folder of the header")


@pytest.mark.parametrize("place", ["a.raw", "below/a.raw", "name with blanks.raw"])
def test_voxels_beside_or_below_the_header_are_read(tmp_path: Path, place: str):
    (tmp_path / "below").mkdir()
    (tmp_path / place).write_bytes(VOXELS.tobytes())
    read_well(mha(tmp_path / "a.mhd", data=place, voxels=b""))
    read_well(with_bytes(tmp_path / "a.nhdr", NRRD.format("raw", f"data file: {place}\n").encode()))
    (tmp_path / place).write_bytes(VOXELS.tobytes()[:-1])
    refused(tmp_path / "a.mhd", "cut short")
    refused(tmp_path / "a.nhdr", "cut short")
    (tmp_path / place).unlink()
    for header in ("a.mhd", "a.nhdr"):
        with pytest.raises(InputError, match="does not exist; put it beside the header"):
            read_volume(tmp_path / header)


def test_lists_and_numbered_files_are_read(tmp_path: Path):
    for index, plane in enumerate(VOXELS):
        (tmp_path / f"s{index}.raw").write_bytes(plane.tobytes())
    names = "\n".join(f"s{index}.raw" for index in range(6))
    for data in ("s%d.raw 0 5 1", f"LIST\n{names}"):
        read_well(mha(tmp_path / "a.mhd", data=data, voxels=b""))
        head = NRRD.format("raw", f"data file: {data}\n").rstrip("\n")
        read_well(with_bytes(tmp_path / "a.nhdr", head.encode() + b"\n"))
    refused(mha(tmp_path / "a.mhd", data="s%d%s%n.raw 0 5 1", voxels=b""), "names its files")
    refused(mha(tmp_path / "a.mhd", data="s%d.raw 0 999999999 1", voxels=b""), "names files")
    (tmp_path / "s3.raw").write_bytes(b"short")
    refused(mha(tmp_path / "a.mhd", data="s%d.raw 0 5 1", voxels=b""), "s3.raw has 5 bytes")


def test_text_and_skipped_bytes_are_read(tmp_path: Path):
    text = " ".join(map(str, VOXELS.ravel())).encode()
    read_well(nrrd(tmp_path / "a.nrrd", "ascii", text))
    read_well(nrrd(tmp_path / "a.nrrd", "hex", VOXELS.tobytes().hex().encode()))
    refused(nrrd(tmp_path / "a.nrrd", "ascii", text[:99]), "cut short")
    refused(nrrd(tmp_path / "a.nrrd", "hex", text[:99]), "cut short")
    for skip in ("3", "-1"):
        read_well(
            nrrd(tmp_path / "a.nrrd", "raw", b"abc" + VOXELS.tobytes(), f"byte skip: {skip}\n")
        )
    packed = gzip.compress(b"abc" + VOXELS.tobytes())
    read_well(nrrd(tmp_path / "a.nrrd", "gzip", packed, "byte skip: 3\n"))
    read_well(nrrd(tmp_path / "a.nrrd", "gz", b"x\n" + packed, "line skip: 1\nbyte skip: 3\n"))
    refused(nrrd(tmp_path / "a.nrrd", "bzip2", b"x" * 9999), "the encoding bzip2")


def packed_scans(folder: Path) -> list[Path]:
    """Write the voxels packed in each format, by SimpleITK and by hand."""
    image = sitk.GetImageFromArray(VOXELS)
    image.SetSpacing(PLACE.spacing)
    paths = [folder / f"a{suffix}" for suffix in (".mha", ".nrrd", ".nii.gz")]
    for path in paths:
        sitk.WriteImage(image, str(path), useCompression=True)
    stream = zlib.compress(VOXELS.tobytes())
    size = f"CompressedData = True\nCompressedDataSize = {len(stream)}\n"
    (folder / "b.zraw").write_bytes(stream)
    half = VOXELS.tobytes()[:1000], VOXELS.tobytes()[1000:]
    return [
        *paths,
        mha(folder / "b.mhd", size, "b.zraw", b""),
        mha(folder / "c.mha", size, voxels=stream),
        nrrd(folder / "c.nrrd", "gzip", b"".join(map(gzip.compress, half))),
    ]


def test_packed_voxels_are_read_and_damaged_ones_never(tmp_path: Path):
    """Flip bytes and fill with zeros, as a download leaves a file whose room was reserved."""
    for path in packed_scans(tmp_path):
        read_well(path)
        stored = path.with_suffix(".zraw") if path.suffix == ".mhd" else path
        good = stored.read_bytes()
        for place in (0.5, 0.7, 0.9, 1 - 3 / len(good)):
            start = int(place * len(good))
            flipped = good[:start] + bytes([good[start] ^ 0x5A]) + good[start + 1 :]
            for bad in (flipped, good[:start], good[:start] + bytes(len(good) - start)):
                stored.write_bytes(bad)
                refused(path)
        stored.write_bytes(good)
        read_well(path)


@pytest.mark.parametrize("size", [1, 10, 10**9, -5])
def test_a_size_of_packed_voxels_that_lies(tmp_path: Path, size: int):
    stream = zlib.compress(VOXELS.tobytes())
    told = f"CompressedData = True\nCompressedDataSize = {size}\n"
    refused(mha(tmp_path / "a.mha", told, voxels=stream))
    refused(mha(tmp_path / "a.mha", "CompressedData = True\n", voxels=stream), "CompressedDataSize")


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".nii.gz", ".nii"])
@pytest.mark.parametrize("sides", [(2000, 2000, 2000), (18, 20, 2**31 - 1), (32000, 32000, 32000)])
def test_tiny_files_that_declare_much_take_no_memory(tmp_path: Path, suffix: str, sides: tuple):
    path = tmp_path / f"a{suffix}"
    write_volume(path, VOXELS, PLACE)
    content = path.read_bytes()
    if suffix.startswith(".nii"):
        content = gzip.decompress(content) if suffix == ".nii.gz" else content
        sides = tuple(min(side, 32767) for side in sides)
        content = content[:42] + struct.pack("<3h", *sides) + content[48:]
        content = gzip.compress(content) if suffix == ".nii.gz" else content
    else:
        content = content.replace(b"18 20 6", " ".join(map(str, sides)).encode())
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path)
    with pytest.raises(InputError):
        read_header(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".nii.gz"])
def test_what_unpacks_to_more_than_is_declared_is_refused(tmp_path: Path, suffix: str):
    bomb = VOXELS.tobytes() + bytes(64 << 20)
    path = tmp_path / f"a{suffix}"
    if suffix == ".mha":
        stream = zlib.compress(bomb, 1)
        told = f"CompressedData = True\nCompressedDataSize = {len(stream)}\n"
        mha(path, told, voxels=stream)
    elif suffix == ".nrrd":
        nrrd(path, "gzip", gzip.compress(bomb, 1))
    else:
        write_volume(path, VOXELS, PLACE)
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bomb, 1))
    refused(path, "damaged or cut short")


def test_formats_are_told_by_content(tmp_path: Path):
    for path in packed_scans(tmp_path):
        if path.suffix == ".mhd":
            continue  # its voxels are in another file
        for suffix in (".nii", ".nii.gz", ".NII.GZ", ".mha", ".nrrd", ".MHA", ".nii.gz.nii.gz"):
            other = tmp_path / f"other_{path.name}{suffix}"
            shutil.copy(path, other)
            read_well(other)
            assert read_header(other) == ((6, 20, 18), read_volume(other)[1])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".mhd", ".nhdr"])
def test_a_nifti_that_was_converted_is_read(tmp_path: Path, suffix: str, packed: bool):
    """SimpleITK keeps the fields of the NIfTI header, such as `vox_offset`, in the new file."""
    write_volume(tmp_path / "a.nii.gz", VOXELS, PLACE)
    image = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    assert image.HasMetaDataKey("vox_offset")
    sitk.WriteImage(image, str(tmp_path / f"b{suffix}"), useCompression=packed)
    read_well(tmp_path / f"b{suffix}")


@pytest.mark.parametrize("other", [".nii", ".hdr", ".img", ".NII", ".nii.gz"])
def test_a_nifti_is_never_read_from_the_file_beside_it(tmp_path: Path, other: str):
    name = "a.nii" if other == ".nii.gz" else "a.nii.gz"
    for path, values in ((tmp_path / "x.nii", VOXELS * 0), (tmp_path / name, VOXELS)):
        write_volume(path, values, PLACE)
    content = (tmp_path / "x.nii").read_bytes()
    (tmp_path / f"a{other}").write_bytes(gzip.compress(content) if other == ".nii.gz" else content)
    read_well(tmp_path / name)


def nifti(path: Path, **fields: object) -> Path:
    """Write a NIfTI with changed fields of the header, which nobody checks."""
    image = nibabel.Nifti1Image(VOXELS.T, np.diag([-0.5, -0.75, 3, 1]))
    nibabel.save(image, path)
    header = nifti_header(path)
    content = path.read_bytes()
    for name, value in fields.items():
        header[name] = value
    return with_bytes(path, header.binaryblock + content[348:])


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("dim", [0, 18, 20, 6, 1, 1, 1, 1], ""),
        ("dim", [9, 18, 20, 6, 1, 1, 1, 1], ""),
        ("dim", [3, 18, -20, 6, 1, 1, 1, 1], "expected 1 to 7 sizes"),
        ("dim", [3, 18, 0, 6, 1, 1, 1, 1], "expected 1 to 7 sizes"),
        ("dim", [4, 18, 20, 6, -3, 1, 1, 1], "expected 1 to 7 sizes"),
        ("vox_offset", np.nan, "vox_offset"),
        ("vox_offset", np.inf, "vox_offset"),
        ("vox_offset", 100, "vox_offset"),
        ("vox_offset", -1, "vox_offset"),
        ("vox_offset", 1e6, "cut short"),
        ("datatype", 77, "type 77"),
        ("datatype", -4, "type -4"),
        ("datatype", 128, "cut short"),
        ("datatype", 32, ""),
        ("scl_slope", np.inf, "scales its voxels"),
        ("magic", b"n+7", "neither NIfTI"),
        ("magic", b"", "neither NIfTI"),
        ("magic", b"ni1", "pair of files"),
    ],
)
def test_nifti_headers_that_do_not_fit(tmp_path: Path, field: str, value: object, told: str):
    refused(nifti(tmp_path / "a.nii", **{field: value}), told)


def test_a_scale_is_applied_and_one_of_nan_is_none(tmp_path: Path):
    read_well(nifti(tmp_path / "a.nii", scl_slope=np.nan, scl_inter=np.nan))
    found, _ = read_volume(nifti(tmp_path / "a.nii", scl_slope=0.5, scl_inter=-3))
    np.testing.assert_array_equal(found, VOXELS * np.float32(0.5) - 3)


@pytest.mark.parametrize("slope", [0, np.nan])
def test_an_offset_without_a_scale_is_refused_because_programs_differ(tmp_path: Path, slope: float):
    refused(nifti(tmp_path / "a.nii", scl_slope=slope, scl_inter=-3), "adds -3")
    read_well(nifti(tmp_path / "a.nii", scl_slope=slope, scl_inter=0))


@pytest.mark.parametrize("size", [np.nan, np.inf, -np.inf, 0.0])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_pixdim_that_is_none_is_never_replaced(tmp_path: Path, size: float, axis: int):
    pixdim = [1, 0.5, 0.75, 3, 0, 0, 0, 0]
    path = nifti(tmp_path / "a.nii", pixdim=pixdim)
    assert voxel_size_is_known(ScanFile("a", path, ".nii"), 6, read_volume(path)[1])
    pixdim[axis] = size
    refused(nifti(path, pixdim=pixdim), f"no size of its voxels along {'xyz'[axis - 1]}")


@pytest.mark.parametrize("unit", ["furlong", "km", "pixel"])
def test_units_that_nobody_knows_are_refused(tmp_path: Path, unit: str):
    line = f'space units: "{unit}" "{unit}" "{unit}"\n'
    refused(nrrd(tmp_path / "a.nrrd", "raw", VOXELS.tobytes(), line), f"in {unit}, expected mm")


STORED = np.arange(3 * 5 * 4, dtype=np.uint16).reshape(3, 5, 4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rows": (0x28, 0x10, "US", 4)}, "whose size differs"),
        ({"columns": (0x28, 0x11, "US", 5)}, "bytes of pixels"),
        ({"rows": (0x28, 0x10, "US", 6)}, "bytes of pixels"),
        ({"allocated": (0x28, 0x100, "US", 8)}, "bytes of pixels"),
        ({"pixels": (0x7FE0, 0x10, "OW", bytes(30))}, "bytes of pixels"),
        ({"frames": (0x28, 0x08, "IS", "999999999")}, "bytes of pixels"),
        ({"frames": (0x28, 0x08, "IS", "9" * 12)}, "frames"),
        ({"frames": (0x28, 0x08, "IS", "0")}, "frames"),
        ({"frames": (0x28, 0x08, "IS", "-1")}, "frames"),
        ({"spacing": (0x28, 0x30, "DS", "nan\\0.7")}, "(0028,0030)"),
        ({"spacing": (0x28, 0x30, "DS", "0\\0.7")}, "pixel spacing"),
        ({"spacing": (0x28, 0x30, "DS", "inf\\0.7")}, "(0028,0030)"),
        ({"position": (0x20, 0x32, "DS", "nan\\0\\0")}, "(0020,0032)"),
        ({"slope": (0x28, 0x1053, "DS", "nan")}, "(0028,1053)"),
    ],
)
def test_dicom_whose_pixels_or_sizes_are_made_up(tmp_path: Path, change: dict, told: str):
    write_series(tmp_path / "s", STORED)
    bad = tmp_path / "s" / "01.dcm"
    tags = slice_tags(STORED[1], position=(-10, -20, 2.5), number=2) | change
    write_dicom_file(bad, tags)
    with pytest.raises(InputError) as caught:
        read_dicom(tmp_path / "s")
    assert told in str(caught.value) and "01.dcm" in str(caught.value)


def test_compressed_dicom_that_is_damaged(tmp_path: Path):
    image = sitk.GetImageFromArray(STORED[:1])
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(tmp_path / "a.dcm"))
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")
    writer.Execute(image)
    np.testing.assert_array_equal(read_dicom(tmp_path)[0], STORED[:1])
    good = (tmp_path / "a.dcm").read_bytes()
    start = good.rindex(b"\xff\xd8")
    for cut in (len(good) - 8, len(good) - 20, start + 20, start - 4):
        for rest in (b"", bytes(len(good) - cut)):
            (tmp_path / "a.dcm").write_bytes(good[:cut] + rest)
            with pytest.raises(InputError, match=r"a\.dcm has compressed pixels"):
                read_dicom(tmp_path)


def test_jpeg_2000_in_a_file_of_its_own_is_read(tmp_path: Path):
    """Some archives put whole .jp2 files into DICOM, with a header before the pixels."""

    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", 8 + len(content)) + kind + content

    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(tmp_path / "a.dcm"))
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG2000")
    stored = np.tile(STORED[:1], (1, 12, 10))  # SimpleITK dies of writing very small ones
    writer.Execute(sitk.GetImageFromArray(stored))
    plain = (tmp_path / "a.dcm").read_bytes()
    start, end = plain.rindex(b"\xff\x4f\xff\x51"), plain.rindex(b"\xff\xd9") + 2
    size = struct.pack(">II", *stored.shape[1:])
    about = box(b"ihdr", size + b"\0\1\x0f\7\0\0") + box(b"colr", b"\1\0\0\0\0\0\x11")
    whole = box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
    whole += box(b"jp2h", about) + box(b"jp2c", plain[start:end])
    whole += bytes(len(whole) % 2)
    after = plain[plain.rindex(b"\xfe\xff\xdd\xe0") :]
    item = struct.pack("<I", len(whole)) + whole
    (tmp_path / "a.dcm").write_bytes(plain[: start - 4] + item + after)
    np.testing.assert_array_equal(read_dicom(tmp_path)[0], stored)


@pytest.mark.parametrize("name", ["z.dcm", "notes"])
@pytest.mark.parametrize("kind", ["pipe", "link to nothing", "link to itself", "device"])
def test_what_is_no_file_in_a_series_is_named_and_never_opened(
    tmp_path: Path, kind: str, name: str
):
    folder = write_series(tmp_path / "s", STORED)
    path = folder / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "link to itself": path}.get(kind, "/nowhere"))
    (scan,), _ = search(tmp_path)
    assert scan.suffix == DICOM
    if name == "z.dcm" or kind.startswith("link"):
        with pytest.raises(InputError, match=f"cannot be read as slices: {name};"):
            read_dicom(folder)
    else:
        np.testing.assert_array_equal(read_dicom(folder)[0], STORED.astype(int) - 1024)
    assert [(one.path, one.reason) for one in unused_in_series(scan)] == [(name, BROKEN)]
    if kind in ("pipe", "device"):
        with pytest.raises(InputError, match="is a pipe or a device"):
            search(path)


def picture(path: Path) -> bytes:
    values = np.random.default_rng(0).integers(0, 255, (60, 50, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
def test_pictures_cut_short(tmp_path: Path, suffix: str):
    path = tmp_path / f"a{suffix}"
    good = picture(path)
    for part in (0.3, 0.6, 0.9):
        cut = good[: int(part * len(good))]
        for bad in (cut, cut + bytes(len(good) - len(cut))):
            if suffix in (".bmp", ".tif") and bad != cut:
                continue  # nothing tells that such zeros are none of the picture
            path.write_bytes(bad)
            with pytest.raises(InputError, match="is not a readable picture"):
                read_picture(path)


@pytest.mark.parametrize("count", [1, 64, 512])
def test_a_whole_jpeg_that_is_filled_with_zeros_is_read(tmp_path: Path, count: int):
    path = tmp_path / "a.jpg"
    good = picture(path)
    expected = read_picture(path)
    path.write_bytes(good + bytes(count))
    np.testing.assert_array_equal(read_picture(path), expected)


def test_a_png_is_compared_with_its_checksum(tmp_path: Path):
    path = tmp_path / "a.png"
    good = picture(path)
    for start in range(60, len(good) - 20, 97):
        path.write_bytes(good[:start] + bytes([good[start] ^ 4]) + good[start + 1 :])
        with pytest.raises(InputError, match="is not a readable picture"):
            read_picture(path)


@pytest.mark.parametrize("sides", [(40_000, 40_000), (2**31 - 1, 2**31 - 1), (0, 5)])
def test_a_picture_of_too_many_pixels_takes_no_memory(tmp_path: Path, sides: tuple[int, int]):
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *sides, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="is not a readable picture") as caught:
        read_picture(tmp_path / "a.png")
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.slow
def test_mutated_scans_end_no_process_and_make_up_nothing(tmp_path: Path):
    """Change bytes of packed scans: each is refused, or has the voxels that were written."""
    rng = np.random.default_rng(0)
    with IsolatedReader(limit_s=30) as reader:
        for path in packed_scans(tmp_path):
            good = path.read_bytes()
            for _ in range(100):
                bad = np.frombuffer(good, np.uint8).copy()
                bad[rng.integers(0, len(bad), rng.integers(1, 6))] = rng.integers(0, 256)
                path.write_bytes(bad)
                try:
                    found, _ = reader.submit(read_volume, path).result()
                except InputError as error:
                    assert "ended the process" not in str(error)
                    continue
                assert found.size != VOXELS.size or (found == VOXELS).all() or found.dtype != "<i2"
            path.write_bytes(good)


def test_a_picture_of_more_pixels_than_its_file_can_hold(tmp_path: Path):
    path = tmp_path / "p.tif"
    Image.new("I;16", (10, 12)).save(path)
    content = bytearray(path.read_bytes())
    place = content.index(struct.pack("<HHI", 257, 4, 1)) + 2  # of the tag for rows
    content[place : place + 10] = struct.pack("<HII", 4, 1, 1 << 24)
    path.write_bytes(content)
    with pytest.raises(InputError, match="10 × 16777216 pixels, far more than a file of its size"):
        read_picture(path)


def test_a_large_picture_of_one_colour_is_read(tmp_path: Path):
    """As densely packed as PNG can."""
    Image.new("L", (5000, 5000), 7).save(tmp_path / "p.png", optimize=True)
    assert (read_picture(tmp_path / "p.png") == 7).all()
