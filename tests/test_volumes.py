"""Scans keep voxels and geometry in a round trip; a bad file is named in an error line."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from common.errors import InputError, MissingFileError
from datasets.scans.volumes import Geometry, read_header, read_volume, write_volume


def oblique_geometry() -> Geometry:
    """Return a geometry with anisotropic spacing and a rotation about two axes."""
    (c, s), (d, t) = [(np.cos(angle), np.sin(angle)) for angle in (0.3, -0.2)]
    about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, d, -t], [0, t, d]])
    direction = tuple((about_z @ about_x).ravel().tolist())
    return Geometry((0.7, 0.9, 2.5), (-137.123, 45.6, 1000.7), direction)


OBLIQUE = oblique_geometry()
# The fields of a NIfTI-1 header: numbers by their width, bytes and text as strings.
HEADER = np.dtype("i4, S35, S1, 8i2, 3f4, 4i2, 11f4, i2, S1, S1, 4f4, 2i4, S104, 2i2, 18f4, S20")
VOXELS = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)  # (D, H, W)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "float32", "float64"])
def test_round_trip(tmp_path: Path, dtype: str, suffix: str):
    path = tmp_path / f"scan{suffix}"
    voxels = VOXELS.astype(dtype)
    write_volume(path, voxels, OBLIQUE)
    found, geometry = read_volume(path)
    assert found.dtype == dtype and np.array_equal(found, voxels)
    for name in ("spacing", "origin", "direction"):
        assert getattr(geometry, name) == pytest.approx(getattr(OBLIQUE, name), rel=1e-6, abs=1e-6)
    assert geometry.matches(OBLIQUE)
    assert read_header(path) == (VOXELS.shape, geometry)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_voxel_keeps_its_place_in_the_patient(tmp_path: Path):
    write_volume(tmp_path / "scan.nii.gz", VOXELS, OBLIQUE)
    image = sitk.ReadImage(str(tmp_path / "scan.nii.gz"))
    axes = np.array(OBLIQUE.direction).reshape(3, 3)
    place = np.array(OBLIQUE.origin) + axes @ (np.array(OBLIQUE.spacing) * (6, 5, 4))  # x, y, z
    assert image.TransformIndexToPhysicalPoint((6, 5, 4)) == pytest.approx(place, abs=1e-3)
    assert image[6, 5, 4] == VOXELS[4, 5, 6]


def test_slices_come_first():
    assert OBLIQUE.voxel_spacing == (2.5, 0.9, 0.7)
    assert Geometry.unknown().voxel_spacing == (1, 1, 1)


@pytest.mark.parametrize(
    ("field", "tolerated", "refused"), [("spacing", 5e-4, 5e-3), ("origin", 5e-3, 5e-2)]
)
def test_matches(field: str, tolerated: float, refused: float):
    first, *others = getattr(OBLIQUE, field)
    assert OBLIQUE.matches(replace(OBLIQUE, **{field: (first + tolerated, *others)}))
    moved = replace(OBLIQUE, **{field: (first + refused, *others)})
    assert not OBLIQUE.matches(moved) and not moved.matches(OBLIQUE)
    assert OBLIQUE.differences(moved)[0].startswith(field)


def test_a_mirrored_axis_does_not_match():
    mirrored = tuple(-value for value in OBLIQUE.direction)
    assert not OBLIQUE.matches(replace(OBLIQUE, direction=mirrored))


def test_one_slice_is_still_a_volume(tmp_path: Path):
    write_volume(tmp_path / "one.nii.gz", VOXELS[:1], OBLIQUE)
    assert np.array_equal(read_volume(tmp_path / "one.nii.gz")[0], VOXELS[:1])


def write_image(path: Path, array: np.ndarray, *, vector: bool = False) -> Path:
    """Write any array as SimpleITK does, without the checks of `write_volume`."""
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(path))
    return path


def cut(path: Path) -> Path:
    """Keep the first two thirds of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    return path


def damage(path: Path) -> Path:
    """Flip the last stored voxel of a packed file but leave its checksum."""
    packed = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0))
    packed[-9] ^= 0xFF  # the checksum and size are the last eight bytes
    path.write_bytes(packed)
    return path


def shear(path: Path) -> Path:
    """Give a NIfTI file axes that are not at right angles."""
    header = bytearray(path.read_bytes())
    struct.pack_into("<hh", header, 252, 0, 1)  # no quaternion, only an affine matrix
    struct.pack_into("<4f", header, 280, 1.0, 0.6, 0.0, 0.0)
    path.write_bytes(header)
    return path


def swap(path: Path) -> Path:
    """Rewrite a float32 NIfTI file in the other byte order."""
    content = path.read_bytes()
    header = np.frombuffer(content[:348], HEADER).byteswap().tobytes()
    voxels = np.frombuffer(content[352:], "<f4").byteswap().tobytes()
    path.write_bytes(header + content[348:352] + voxels)
    return path


def with_nan() -> np.ndarray:
    voxels = VOXELS.astype(np.float32)
    voxels[2, 1, 1], voxels[3, 0, 0] = np.nan, np.inf
    return voxels


def junk(path: Path, content: bytes = b"not a scan") -> Path:
    path.write_bytes(content)
    return path


BAD_FILES = {
    "cut nii.gz": (lambda d: cut(write_image(d / "a.nii.gz", VOXELS)), "cut short"),
    "cut nii": (lambda d: cut(write_image(d / "a.nii", VOXELS)), "cut short"),
    "cut nrrd": (lambda d: cut(write_image(d / "a.nrrd", VOXELS)), "cut short"),
    "damaged": (
        lambda d: damage(write_image(d / "a.nii.gz", np.tile(VOXELS, (8, 8, 8)))),
        "damaged",
    ),
    "sheared": (lambda d: shear(write_image(d / "a.nii", VOXELS)), "not at right angles"),
    "junk": (lambda d: junk(d / "a.nii.gz"), "neither NIfTI nor NRRD"),
    "empty": (
        lambda d: junk(d / "a.nii.gz", b""),
        "neither NIfTI nor NRRD",
    ),
    "4-D": (lambda d: write_image(d / "a.nii.gz", np.zeros((2, 3, 4, 5))), "4 dimensions"),
    "vectors": (
        lambda d: write_image(d / "a.nii.gz", np.zeros((3, 4, 5, 3)), vector=True),
        "one real number",
    ),
    "complex": (
        lambda d: write_image(d / "a.nii.gz", np.zeros((3, 4, 5), np.complex64)),
        "one real number",
    ),
    "NaN": (lambda d: write_image(d / "a.nii.gz", with_nan()), "2 of 5 slices, first in slice 2"),
    "NaN nii": (lambda d: write_image(d / "a.nii", with_nan().astype(float)), "first in slice 2"),
    "NaN nrrd": (lambda d: write_image(d / "a.nrrd", with_nan()), "first in slice 2"),
    "NaN big endian": (lambda d: swap(write_image(d / "a.nii", with_nan())), "first in slice 2"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str):
    make, told = BAD_FILES[name]
    path = make(tmp_path)
    capfd.readouterr()
    with pytest.raises(InputError) as caught:
        read_volume(path)
    message = str(caught.value)
    assert str(path) in message and told in message
    assert "\n" not in message and ".cxx" not in message and "(0x" not in message
    assert "Warning" not in capfd.readouterr().err


def test_either_byte_order_is_read(tmp_path: Path):
    voxels = VOXELS.astype(np.float32)
    path = swap(write_image(tmp_path / "a.nii", voxels))
    assert np.array_equal(read_volume(path)[0], voxels)


def test_missing_file(tmp_path: Path):
    with pytest.raises(MissingFileError, match="does not exist"):
        read_volume(tmp_path / "none.nii.gz")
    with pytest.raises(MissingFileError, match="is a folder"):
        read_volume(tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "told"),
    [
        ("a.nii.gz", VOXELS[0], "expected non-empty"),
        ("a.nii.gz", VOXELS[None], "expected non-empty"),
        ("a.nii.gz", VOXELS[:0], "expected non-empty"),
        ("a.nii.gz", VOXELS > 0, "bool"),
        ("a.scan", VOXELS, "Unable to determine ImageIO writer"),
        ("file/a.nii.gz", VOXELS, "choose another path"),
    ],
)
def test_arrays_and_paths_that_cannot_be_written(
    tmp_path: Path, name: str, array: np.ndarray, told: str
):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=told):
        write_volume(tmp_path / name, array, OBLIQUE)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.nii.gz"
    write_volume(path, VOXELS, OBLIQUE)

    def fail(image: sitk.Image, temporary: Path, **_: bool) -> None:
        Path(temporary).write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(sitk, "WriteImage", fail)
    with pytest.raises(InputError, match="disk full"):
        write_volume(path, VOXELS + 1, OBLIQUE)
    monkeypatch.undo()
    assert np.array_equal(read_volume(path)[0], VOXELS)
    assert len(list(tmp_path.iterdir())) == 1
