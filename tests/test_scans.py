"""Finding scans and pictures, sorting their slices, and turning their axes."""

from __future__ import annotations

import locale
from collections.abc import Sequence
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import ExifTags, Image
from scipy.spatial.transform import Rotation

from common.errors import InputError, MissingFileError
from datasets.scans.files import ScanFile, find_scans, read_scan, read_scan_header, select_channel
from datasets.scans.orientation import OPPOSITE, orientation_of, reorient, reorient_geometry
from datasets.scans.pictures import read_index_picture, read_picture
from datasets.scans.volumes import Geometry, write_volume

AXES = {"L": (1, 0, 0), "P": (0, 1, 0), "S": (0, 0, 1)}
ORIENTATIONS = [
    "".join(letters)
    for order in permutations("LPS")
    for letters in product(*((letter, OPPOSITE[letter]) for letter in order))
]


def placed(letters: str, *, oblique: bool = True, seed: int = 0) -> Geometry:
    """Return a geometry with axes towards these letters, rotated a little if oblique."""
    rng = np.random.default_rng(seed)
    columns = [
        np.array(AXES[letter] if letter in AXES else AXES[OPPOSITE[letter]], dtype=float)
        * (1 if letter in AXES else -1)
        for letter in letters
    ]
    direction = np.array(columns).T
    if oblique:
        direction = Rotation.from_euler("xyz", (8, -11, 5), degrees=True).as_matrix() @ direction
    spacing = (0.83, 1.27, 3.1)
    origin = tuple(rng.uniform(-200, 200, 3).tolist())
    return Geometry(spacing, origin, tuple(direction.ravel().tolist()))


def write_dicom(
    folder: Path, array: np.ndarray, geometry: Geometry, places: Sequence[float] | None = None
) -> Path:
    """Write (D, H, W) int16 as a DICOM series whose file names are out of order.

    Args:
        places: positions of the slices along the normal, in slices; None: 0, 1, …
    """
    folder.mkdir(parents=True)
    axes = np.array(geometry.direction).reshape(3, 3)
    count = len(array)
    for index, place in enumerate(places or range(count)):
        image = sitk.GetImageFromArray(array[index][None])
        image.SetSpacing(geometry.spacing)
        image.SetDirection(geometry.direction)
        position = np.array(geometry.origin) + axes[:, 2] * geometry.spacing[2] * place
        image.SetOrigin(position.tolist())
        cosines = (*axes[:, 0], *axes[:, 1])
        for tag, value in (
            ("0008|0060", "CT"),
            ("0020|000e", "1.2.826.0.1.3680043.2.1125.1"),
            ("0020|000d", "1.2.826.0.1.3680043.2.1125"),
            ("0008|0018", f"1.2.826.0.1.3680043.2.1125.1.{index + 1}"),
            ("0020|0032", "\\".join(f"{v:.12g}" for v in position)),
            ("0020|0037", "\\".join(f"{v:.12g}" for v in cosines)),
            ("0020|0013", str(index)),
            ("0018|0050", f"{geometry.spacing[2]}"),
        ):
            image.SetMetaData(tag, value)
        write_slice(image, folder / f"{(index * 7) % 101:03d}.dcm")
    return folder


def write_slice(image: sitk.Image, path: Path) -> None:
    # Writing DICOM switches the process to the C locale, in which output is ASCII.
    before = locale.setlocale(locale.LC_ALL)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(path))
    writer.Execute(image)
    locale.setlocale(locale.LC_ALL, before)


def volume(shape: tuple[int, int, int] = (5, 6, 7)) -> np.ndarray:
    """Return an array in which every voxel has another value."""
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape) - 50


@pytest.mark.parametrize("letters", ORIENTATIONS)
def test_turning_keeps_every_voxel_where_it_is(letters: str):
    geometry, array = placed(letters), volume()
    assert orientation_of(geometry) == letters
    there = reorient(array, letters, "LPS")
    now = reorient_geometry(geometry, array.shape, "LPS")
    assert orientation_of(now) == "LPS"

    def points(shape: tuple[int, ...], where: Geometry) -> np.ndarray:  # (voxels, 3), mm
        indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
        axes = np.array(where.direction).reshape(3, 3)
        return np.array(where.origin) + (indices[:, ::-1] * where.spacing) @ axes.T

    before = points(array.shape, geometry)[np.argsort(array.ravel())]
    after = points(there.shape, now)[np.argsort(there.ravel())]
    assert np.abs(before - after).max() < 1e-9
    assert np.array_equal(reorient(there, "LPS", letters), array)
    # SimpleITK turns it in the same way.
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    expected = sitk.DICOMOrient(image, "LPS")
    assert np.array_equal(sitk.GetArrayFromImage(expected), there)
    assert np.allclose(expected.GetOrigin(), now.origin)
    assert np.allclose(expected.GetDirection(), now.direction)
    assert np.allclose(expected.GetSpacing(), now.spacing)


@pytest.mark.parametrize("letters", ["LPS", "RAS", "PIR", "LPI"])
def test_dicom_is_ordered_by_position(tmp_path: Path, letters: str):
    array, geometry = volume(), placed(letters)
    axes = np.array(geometry.direction).reshape(3, 3)
    folder = write_dicom(tmp_path / "series", array, geometry)
    (scan,) = find_scans(folder)
    assert scan.name == "series"
    found, where = read_scan(scan)
    normal = np.cross(axes[:, 0], axes[:, 1])
    flipped = normal @ axes[:, 2] < 0  # DICOM's third axis is the normal
    assert np.array_equal(found, array[::-1] if flipped else array)
    assert np.allclose(where.spacing, geometry.spacing, atol=1e-6)
    shape, header = read_scan_header(scan)
    assert shape == array.shape and header.matches(where)


BAD_SERIES = {
    "missing": ([0, 1, 3, 4, 5], "missing or unevenly spaced slices: between"),
    "uneven": ([0, 1, 2.1, 3, 4], "missing or unevenly spaced slices"),
    "doubled": ([0, 1, 1, 2, 3], "duplicate slices at"),
}


@pytest.mark.parametrize("name", BAD_SERIES)
def test_bad_dicom_is_refused_with_positions(tmp_path: Path, name: str):
    places, told = BAD_SERIES[name]
    folder = write_dicom(tmp_path / "series", volume(), placed("LPS", oblique=False), places)
    with pytest.raises(InputError, match=told) as caught:
        read_scan(find_scans(folder)[0])
    assert " mm" in str(caught.value)


def test_other_bad_dicom(tmp_path: Path):
    folder = write_dicom(tmp_path / "two", volume(), placed("LPS"))
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        image = sitk.ReadImage(str(file))
        image.SetMetaData("0020|000e", "1.2.3.4.5")
        write_slice(image, folder / f"other{file.name}")
        break
    with pytest.raises(InputError, match="2 DICOM series"):
        read_scan(find_scans(folder)[0])

    tilted = placed("LPS", oblique=False)
    askew = Geometry(tilted.spacing, tilted.origin, (1, 0, 0, 0, 1, 0.3, 0, 0, 1))
    folder = write_dicom(tmp_path / "tilted", volume(), askew)
    with pytest.raises(InputError, match="tilted gantry"):
        read_scan(find_scans(folder)[0])


def test_which_files_are_found(tmp_path: Path):
    array, geometry = volume(), placed("LPS")
    for name in ("a.nii.gz", "b.nrrd", "c.mha", "d.nii"):
        write_volume(tmp_path / name, array, geometry)
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "e.png")
    write_dicom(tmp_path / "f", array, geometry)
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden.nii.gz").touch()
    write_dicom(tmp_path / "patient" / "study" / "series", array, geometry)
    write_dicom(tmp_path / ".trash" / "series", array, geometry)
    (tmp_path / "patient" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    names = [scan.name for scan in find_scans(tmp_path)]
    assert names == ["a", "b", "c", "d", "e", "f", "patient_study_series"]
    (below,) = find_scans(tmp_path / "patient")
    assert below.name == "study_series" and np.array_equal(read_scan(below)[0], array)
    (tmp_path / "IM0").write_bytes(bytes(128) + b"DICM")
    with pytest.raises(InputError, match=r"DICOM slices beside a\.nii\.gz"):
        find_scans(tmp_path)
    (tmp_path / "IM0").unlink()
    write_volume(tmp_path / "a.mha", array, geometry)
    with pytest.raises(InputError, match=r"a\.mha and a\.nii\.gz"):
        find_scans(tmp_path)
    with pytest.raises(MissingFileError, match="does not exist"):
        find_scans(tmp_path / "none")
    with pytest.raises(InputError, match="is not a scan or picture by its suffix"):
        find_scans(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no scan"):
        find_scans(tmp_path / "empty")


def test_pictures(tmp_path: Path):
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (6, 7), np.uint8), rng.integers(0, 256, (6, 7, 3), np.uint8)

    def read(picture: Image.Image, name: str = "a.png") -> np.ndarray:
        picture.save(tmp_path / name)
        return read_picture(tmp_path / name)

    assert np.array_equal(read(Image.fromarray(grey)), grey[None])
    assert np.array_equal(read(Image.fromarray(colour)), colour.transpose(2, 0, 1)[None])
    assert np.array_equal(read(Image.fromarray(np.repeat(grey[..., None], 3, -1))), grey[None])
    with_alpha = np.dstack([colour, grey])
    assert np.array_equal(read(Image.fromarray(with_alpha)), colour.transpose(2, 0, 1)[None])
    deep = rng.integers(0, 65536, (6, 7)).astype(np.uint16)
    assert np.array_equal(read(Image.fromarray(deep)), deep[None])
    index = Image.fromarray(grey % 5)
    index.putpalette([5, 5, 5, 255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    assert read(index).shape == (1, 3, 6, 7)  # an index picture read as an image has colours
    assert np.array_equal(read_index_picture(tmp_path / "a.png"), (grey % 5)[None])
    Image.fromarray(colour).save(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"42 colours .* expected class indices"):
        read_index_picture(tmp_path / "b.png")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_read_as_they_are_displayed(tmp_path: Path, orientation: int, suffix: str):
    """EXIF stores how the camera was held, and programs for drawing masks follow it."""
    stored = np.zeros((16, 24), np.uint8)
    stored[:8, :8] = 240  # a mark at the top left
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a{suffix}"
    Image.fromarray(stored).save(path, exif=exif)
    if suffix == ".tif" and orientation > 4:
        with pytest.raises(InputError, match=r"stored on its side.*export it again"):
            read_picture(path)
        return
    rotated = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].T,
        8: np.rot90(stored),
    }
    found = read_picture(path)[0]
    assert np.array_equal(found > 120, rotated[orientation] > 120)
    assert read_scan_header(find_scans(path)[0])[0] == (1, *found.shape)
    if suffix == ".png":
        assert np.array_equal(read_index_picture(path)[0], found)


def test_a_channel_of_a_4d_file(tmp_path: Path):
    parts = [sitk.GetImageFromArray(volume() + 1000 * index) for index in range(3)]
    for part in parts:
        part.SetSpacing((1.0, 2.0, 3.0))
    sitk.WriteImage(sitk.JoinSeries(parts), str(tmp_path / "a.nii.gz"))
    (scan,) = find_scans(tmp_path)
    with pytest.raises(InputError, match="4 dimensions"):
        read_scan(scan)
    for channel in range(3):
        chosen = type(scan)(scan.name, scan.path, scan.suffix, channel)
        array, geometry = read_scan(chosen)
        assert np.array_equal(array, volume() + 1000 * channel)
        assert geometry.spacing == (1, 2, 3) and read_scan_header(chosen) == (array.shape, geometry)
    with pytest.raises(InputError, match="holds 3 channels"):
        read_scan(type(scan)(scan.name, scan.path, scan.suffix, 3))


@pytest.mark.parametrize(
    ("names", "chosen", "told"),
    [
        ("pat_0001 pat_0002 pat_0004", "pat_0001 pat_0002 pat_0004", ""),  # of one volume each
        (
            "s_0000 s_0001 s_0002 plain",
            "s_0001 plain",
            "of other channels are left out: s_0000, s_0002",
        ),
        ("s_0000 t_0000 t_0001", "s_0000 t_0001", "have the name of another channel: s_0000"),
    ],
)
def test_channel_files_and_numbered_scans_are_distinguished(
    capsys: pytest.CaptureFixture[str], names: str, chosen: str, told: str
):
    scans = [ScanFile(name, Path(f"{name}.nii.gz"), ".nii.gz") for name in names.split()]
    found = select_channel(scans, 1)
    assert [scan.name for scan in found] == chosen.split()
    assert all(scan.channel == 1 for scan in found)
    assert told in (err := capsys.readouterr().err) and bool(err) == bool(told)
