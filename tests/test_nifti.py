"""NIfTI and other volume files: where their voxels lie, checked against nibabel's affine."""

from __future__ import annotations

import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.processing import resample_to_output

from common.errors import InputError
from datasets.scans.files import ScanFile
from datasets.scans.labels import write_like
from datasets.scans.volumes import Geometry, read_header, read_volume

VOXELS = np.arange(60, dtype=np.int16).reshape(3, 4, 5)  # (x, y, z), as nibabel has them
AFFINE = np.array([[-0.7, 0, 0, 90], [0, 0.9, 0, -120], [0, 0, 2.5, 33], [0, 0, 0, 1.0]])
SHEARED = np.array([[2, 0, 0, 0], [0, 2, 0.4, 0], [0, 0, 3, 0], [0, 0, 0, 1.0]])


def save(
    path: Path,
    voxels: np.ndarray = VOXELS,
    *,
    sform: np.ndarray | None = AFFINE,
    qform: np.ndarray | None = None,
    units: str = "mm",
    kind: type = nibabel.Nifti1Image,
    pixdim: dict[int, float] | None = None,
) -> Path:
    """Save a file with these forms; other values of `pixdim` by their index, as programs leave."""
    image = kind(voxels, sform if sform is not None else qform)
    image.set_sform(sform, int(sform is not None))
    image.set_qform(qform, int(qform is not None))
    image.header.set_xyzt_units(units)
    nibabel.save(image, path)
    content = bytearray(path.read_bytes())
    for index, size in (pixdim or {}).items():
        struct.pack_into("<f", content, 76 + 4 * index, size)
    path.write_bytes(content)
    return path


def placed(geometry: Geometry) -> np.ndarray:
    """Return the affine matrix to RAS, as nibabel has it."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(geometry.direction, (3, 3)) * geometry.spacing
    affine[:3, 3] = geometry.origin
    return np.diag([-1, -1, 1, 1]) @ affine


def read(path: Path, affine: np.ndarray = AFFINE, voxels: np.ndarray = VOXELS) -> Geometry:
    """Check that a file is read as these voxels at this place."""
    found, geometry = read_volume(path)
    assert np.array_equal(found, voxels.transpose())
    assert np.allclose(placed(geometry), affine, rtol=1e-5, atol=1e-4)
    assert read_header(path) == (found.shape, geometry)
    return geometry


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64", "uint32"])
def test_nifti_2(tmp_path: Path, dtype: str, suffix: str):
    voxels = VOXELS.astype(dtype)
    path = save(tmp_path / f"a{suffix}", voxels, kind=nibabel.Nifti2Image)
    geometry = read(path, voxels=voxels)
    assert read_volume(path)[0].dtype == dtype
    label = tmp_path / f"label{suffix}"
    write_like(label, voxels.T.astype(np.uint8), ScanFile("a", path, suffix), geometry)
    written = nibabel.load(label)
    assert isinstance(written, nibabel.Nifti2Image) and np.array_equal(written.affine, AFFINE)
    assert np.array_equal(np.asarray(written.dataobj), voxels.astype(np.uint8))


def test_a_nifti_2_file_cut_short(tmp_path: Path):
    path = save(tmp_path / "a.nii", kind=nibabel.Nifti2Image)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="damaged or cut short"):
        read_volume(path)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1), (3, 4, 1, 1), (3, 4, 5, 1), (3, 4, 5, 1, 1)])
def test_two_dimensions_and_trailing_axes(tmp_path: Path, shape: tuple, kind: type):
    voxels = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    path = save(tmp_path / "a.nii.gz", voxels, kind=kind)
    volume = voxels.reshape((*shape, 1)[:3])
    geometry = read(path, voxels=volume)
    label = tmp_path / "label.nii.gz"
    array = (volume.transpose() % 3).astype(np.uint8)
    write_like(label, array, ScanFile("a", path, ".nii.gz"), geometry)
    written = nibabel.load(label)
    assert written.shape == (shape if len(shape) == 2 else volume.shape)
    assert np.array_equal(written.affine, nibabel.load(path).affine)
    assert np.array_equal(read_volume(label)[0], array)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_two_dimensions_of_other_formats(tmp_path: Path, suffix: str):
    image = sitk.GetImageFromArray(VOXELS[0])
    image.SetSpacing((0.5, 0.25))
    sitk.WriteImage(image, tmp_path / f"a{suffix}")
    found, geometry = read_volume(tmp_path / f"a{suffix}")
    assert np.array_equal(found, VOXELS[:1]) and geometry.spacing == (0.5, 0.25, 1.0)
    scan = ScanFile("a", tmp_path / f"a{suffix}", suffix)
    write_like(tmp_path / f"l{suffix}", found, scan, geometry)
    assert np.array_equal(read_volume(tmp_path / f"l{suffix}")[0], found)


@pytest.mark.parametrize(("units", "factor"), [("meter", 1e3), ("micron", 1e-3), ("unknown", 1)])
@pytest.mark.parametrize("form", ["sform", "qform"])
def test_units(tmp_path: Path, units: str, factor: float, form: str):
    stored = AFFINE / [factor, factor, factor, factor]
    stored[3, 3] = 1
    forms = {"sform": None, "qform": None} | {form: stored}
    read(save(tmp_path / "a.nii", units=units, **forms))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_size_that_is_missing(tmp_path: Path, bad: float):
    # An sform that has it does not help: other programs, SimpleITK too, take 1 mm then.
    for forms in ({}, {"sform": None, "qform": AFFINE}, {"sform": None}):
        path = save(tmp_path / "b.nii", pixdim={3: bad}, **forms)
        for reader in (read_volume, read_header):
            with pytest.raises(InputError, match="no size of its voxels along z"):
                reader(path)
    one = save(tmp_path / "c.nii", VOXELS[:, :, :1], sform=None, qform=AFFINE, pixdim={3: bad})
    assert read_volume(one)[1].spacing == pytest.approx((0.7, 0.9, 1.0))


def test_two_sizes_are_refused(tmp_path: Path):
    path = save(tmp_path / "a.nii", pixdim={1: 1.0, 2: 1.0, 3: 1.0})
    with pytest.raises(
        InputError, match=r"two sizes of its voxels, \[0\.7 0\.9 2\.5\] mm by the s"
    ):
        read_volume(path)


def test_two_places_are_told(tmp_path: Path, capsys: pytest.CaptureFixture):
    moved = AFFINE.copy()
    moved[:3, 3] += 5
    path = save(tmp_path / "a.nii", sform=AFFINE, qform=moved)
    found = read_volume(path)[1]
    told = capsys.readouterr().err
    used = AFFINE if np.allclose(placed(found), AFFINE, atol=1e-4) else moved
    assert np.allclose(placed(found), used, atol=1e-4)
    assert f"{'sform' if used is AFFINE else 'qform'} used" in told and "origin" in told
    read_volume(save(tmp_path / "b.nii", qform=AFFINE))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("angle", [2e-5, 1e-4, 5e-4])
def test_an_angle_of_rounding_is_accepted(tmp_path: Path, angle: float):
    affine = AFFINE.copy()
    affine[1, 2] = angle * 2.5
    found, geometry = read_volume(save(tmp_path / "a.nii.gz", sform=affine))
    assert np.array_equal(found, VOXELS.transpose())
    assert np.abs(placed(geometry) - affine).max() < angle * 2.5
    axes = np.reshape(geometry.direction, (3, 3))
    assert np.allclose(axes.T @ axes, np.eye(3), rtol=0, atol=1e-4)
    write_like(tmp_path / "l.nii.gz", np.zeros((5, 4, 3), np.uint8),
               ScanFile("a", tmp_path / "a.nii.gz", ".nii.gz"), geometry)  # fmt: skip
    assert np.allclose(nibabel.load(tmp_path / "l.nii.gz").affine, affine, atol=1e-6)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("qform", [None, np.diag([2, 2, 3, 1.0])])
def test_sheared_axes_are_refused_with_a_remedy_that_works(
    tmp_path: Path, qform: np.ndarray | None, kind: type
):
    path = save(tmp_path / "a.nii", sform=SHEARED, qform=qform, kind=kind)
    with pytest.raises(InputError) as caught:
        read_volume(path)
    assert "not at right angles (off by 7.6°" in str(caught.value)
    assert "resample_to_output" in str(caught.value) and "damaged" not in str(caught.value)
    straight = resample_to_output(nibabel.load(path), order=0)
    nibabel.save(straight, tmp_path / "b.nii")
    assert np.allclose(placed(read_volume(tmp_path / "b.nii")[1]), straight.affine)


def test_a_slight_shear_takes_the_qform_that_agrees(tmp_path: Path):
    slight, straight = np.diag([2, 2, 3, 1.0]), np.diag([2, 2, 3, 1.0])
    slight[1, 2] = 0.05  # 0.2 mm over the volume, a tenth of a voxel
    read(save(tmp_path / "a.nii", sform=slight, qform=straight), straight)


def test_an_sform_of_nothing(tmp_path: Path):
    path = save(tmp_path / "a.nii", sform=AFFINE)
    content = bytearray(path.read_bytes())
    content[280:328] = bytes(48)
    path.write_bytes(content)
    with pytest.raises(InputError, match="sform that gives no place"):
        read_volume(path)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_axes_of_other_formats(tmp_path: Path, suffix: str):
    path = tmp_path / f"a{suffix}"
    for axes in ((1, 0, 0, 0, 1, 0.2, 0, 0, 1), (2, 0, 0, 0, 1, 0, 0, 0, 1)):
        image = sitk.GetImageFromArray(VOXELS)
        image.SetDirection(axes)
        sitk.WriteImage(image, path)
        found = np.linalg.norm(np.reshape(sitk.ReadImage(path).GetDirection(), (3, 3)), axis=0)
        if axes[0] == 2 and np.allclose(found, 1):
            continue  # the format stores the product of spacing and direction
        with pytest.raises(InputError, match="not at right angles or not of length 1"):
            read_volume(path)


@pytest.mark.parametrize("handedness", [0.0, 1.0])
def test_a_handedness_of_0_means_1(tmp_path: Path, handedness: float):
    pixdim = {0: handedness}
    affine = np.diag([0.7, 0.9, 2.5, 1.0])
    read(save(tmp_path / "a.nii", sform=None, qform=affine, pixdim=pixdim), affine)
