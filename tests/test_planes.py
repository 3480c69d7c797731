"""The plane of the slices: across the thick axis, and results back on the grid of the scan."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from test_own_data import run_prepare as prepare
from test_predict import SPEC
from test_scans import placed, write_dicom

from common.files import load_arrays
from common.written import Written
from datasets.dataset_synapse import Synapse_dataset
from datasets.registry import SYNAPSE, stored_spec
from datasets.scans.files import find_scans
from datasets.scans.planes import PLANES, taken_plane
from datasets.scans.volumes import Geometry, read_volume, write_volume
from evaluation import volume_results
from prediction import cases, results
from prediction.records import RECORDS

# Letters of a scan that was taken in a plane: in the order of DICOM, and turned as files have it.
TAKEN = {
    "sagittal": ("PIR", "ASL", "RAS", "SAR", "LPI"),
    "coronal": ("LIP", "RSA", "RAS", "ASR"),
    "axial": ("LPS", "RAS", "RAI", "SLP"),
}
MARKS = (-400, 100, 700)  # the least value of each class
PAIRS = {"sagittal": "LR", "coronal": "AP", "axial": "IS"}


def across(letters: str, plane: str, *, oblique: bool = True, thick: float = 4.4) -> Geometry:
    """Return a geometry with these axes whose thick axis is across the plane."""
    fine = iter((0.6, 0.7))
    spacing = tuple(thick if letter in PAIRS[plane] else next(fine) for letter in letters)
    return replace(placed(letters, oblique=oblique), spacing=spacing)


def add_scan(root: Path, name: str, geometry: Geometry, seed: int = 0) -> Path:
    """Write a scan of random values and its label, (5, 9, 11); return the file of the scan."""
    image = np.random.default_rng(seed).integers(1, 900, (5, 9, 11)).astype(np.int16)
    write_volume(root / "images" / f"{name}.nii.gz", image, geometry)
    write_volume(root / "labels" / f"{name}.nii.gz", (image > 450).astype(np.uint8), geometry)
    return root / "images" / f"{name}.nii.gz"


def expected_slices(path: Path, plane: str) -> np.ndarray:  # (D, H, W)
    """Cut a file by nibabel alone: axes to the right, front and head, then as radiologists look."""
    right_front_head = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
    if plane == "sagittal":  # front at the left, head at the top, slices towards the right
        return right_front_head[:, ::-1, ::-1].transpose(0, 2, 1)
    if plane == "coronal":  # right at the left, head at the top, slices towards the back
        return right_front_head[::-1, ::-1, ::-1].transpose(1, 2, 0)
    return right_front_head[::-1, ::-1].transpose(2, 1, 0)


@pytest.mark.parametrize(
    ("plane", "letters"), [(plane, one) for plane, many in TAKEN.items() for one in many]
)
def test_slices_lie_across_the_thick_axis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plane: str, letters: str
):
    root, output = tmp_path / "raw", tmp_path / "data"
    files = [add_scan(root, f"knee{n}", across(letters, plane), n) for n in range(2)]
    assert prepare(root, output, "--test_cases", "knee1") == 0
    told = capsys.readouterr()
    assert "plane" not in told.err
    assert (f"the slices are {plane}" in told.out) == (plane != "axial")
    assert stored_spec(output).orientation == PLANES[plane]
    # The table shows the spacing of the slices: the thick axis last, as z.
    (row,) = [line for line in told.out.splitlines() if line.startswith("knee0")]
    assert row.split()[row.split().index("x") + 4] == "4.400"

    image = expected_slices(files[0], plane)
    low, high = np.percentile(image, (0.5, 99.5))
    paths = sorted((output / "train_npz").iterdir())
    found = [load_arrays(path, ("image", "label")) for path in paths]
    assert np.array_equal(np.stack([part["label"] for part in found]), image > 450)
    unit = np.stack([part["image"] for part in found])
    assert np.abs(unit - (image.clip(low, high) - low) / (high - low)).max() < 1e-5
    with h5py.File(output / "test_vol_h5" / "knee1.npy.h5") as file:
        assert file.attrs["orientation"] == PLANES[plane]
        assert np.array_equal(file["label"], expected_slices(files[1], plane) > 450)
        assert tuple(file.attrs["spacing"]) == read_volume(files[1])[1].spacing


@pytest.mark.parametrize(("thick", "plane"), [(1.04, "axial"), (1.06, "sagittal")])
def test_nearly_isotropic_scans_stay_axial(tmp_path: Path, thick: float, plane: str):
    geometry = across("RAS", "sagittal", thick=thick)  # beside 0.7 mm: 1.49 or 1.51 times
    add_scan(tmp_path / "raw", "a", geometry)
    add_scan(tmp_path / "raw", "b", replace(geometry, spacing=(0.7, 0.7, 0.7)), 1)
    assert prepare(tmp_path / "raw", tmp_path / "data") == 0
    assert stored_spec(tmp_path / "data").orientation == PLANES[plane]


def test_mixed_planes_need_the_users_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = tmp_path / "raw"
    add_scan(root, "a", across("PIR", "sagittal"))
    add_scan(root, "b", across("LPS", "axial"), 1)
    add_scan(root, "c", across("LPS", "axial"), 2)
    assert prepare(root, tmp_path / "mixed") == 2
    told = capsys.readouterr().err
    assert "1 sagittal (a); 2 axial (b, c)" in told and "--plane axial, coronal or sagittal" in told
    for plane, wrong in (("axial", 1), ("sagittal", 2), ("coronal", 3)):
        output = tmp_path / plane
        assert prepare(root, output, "--plane", plane) == 0
        assert stored_spec(output).orientation == PLANES[plane]
        assert f"{wrong} of 3 scans were taken in another plane" in capsys.readouterr().err
    assert prepare(root, tmp_path / "stored", "--plane", "stored", "--test_cases", "b") == 0
    assert stored_spec(tmp_path / "stored").orientation is None
    told = capsys.readouterr().err
    assert "different orientations" in told and "another plane" not in told
    slices = list((tmp_path / "stored" / "train_npz").glob("a_slice*"))
    assert len(slices) == 5  # the last axis of the file


def test_known_data_stay_as_stored_but_not_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    hu = np.random.default_rng(0).integers(-900, 900, (5, 9, 11)).astype(np.int16)
    for letters, told in (("LPS", False), ("PIR", False), ("RAS", True)):
        root, plane = tmp_path / letters, "axial" if letters == "LPS" else "sagittal"
        for number in (1, 5):
            for kind, array in (("img", hu), ("label", (hu > 0).astype(np.uint8))):
                path = root / kind / f"{kind}{number:04d}.nii.gz"
                write_volume(path, array, across(letters, plane))
        assert prepare(root, tmp_path / f"{letters}_data") == 0
        assert ("taken in another plane" in capsys.readouterr().err) == told
        with h5py.File(tmp_path / f"{letters}_data" / "test_vol_h5" / "case0001.npy.h5") as file:
            assert np.array_equal(file["label"], hu > 0) and "orientation" not in file.attrs
    assert prepare(root, tmp_path / "turned", "--plane", "sagittal") == 0
    expected = expected_slices(root / "label" / "label0001.nii.gz", "sagittal")
    with h5py.File(tmp_path / "turned" / "test_vol_h5" / "case0001.npy.h5") as file:
        assert np.array_equal(file["label"], expected)


def test_a_scan_of_one_slice_is_that_slice():
    flat = replace(placed("RAS"), spacing=(1.0, 1.0, 1.0))
    assert taken_plane((9, 8, 1), flat) == "sagittal"  # one voxel along x
    assert taken_plane((9, 1, 8), flat) == "coronal"
    assert taken_plane((1, 9, 8), replace(flat, spacing=(3.0, 1.0, 1.0))) == "axial"
    assert taken_plane((9, 8, 7), flat) is None


def test_very_oblong_slices_without_a_spacing_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    image = np.random.default_rng(0).integers(1, 900, (40, 40, 6)).astype(np.int16)
    for name in "ab":  # 6 sagittal slices, but the header tells 1 mm
        for kind, array in (("images", image), ("labels", (image > 450).astype(np.uint8))):
            write_volume(tmp_path / kind / f"{name}.nii.gz", array, Geometry.unknown())
    assert prepare(tmp_path, tmp_path / "data") == 0
    told = capsys.readouterr().err
    assert "very oblong: a 40 × 6, b 40 × 6 pixels; --plane axial, coronal or sagittal" in told
    assert prepare(tmp_path, tmp_path / "data", "--plane", "sagittal") == 0
    assert "oblong" not in capsys.readouterr().err


def test_finished_cases_are_converted_again_only_if_they_change(tmp_path: Path):
    output = tmp_path / "data"
    for plane in ("axial", "sagittal"):
        root = tmp_path / plane
        for n in range(2):
            add_scan(root, f"s{n}", across("RAS", plane), n)
        flags = ("--test_cases", "s1", "--name", "set")
        # Before, every scan was cut into axial slices, and records knew no digests.
        assert prepare(root, output / plane, *flags, "--plane", "axial") == 0
        before = {p: p.stat().st_mtime_ns for p in (output / plane).rglob("*.h5")}
        assert prepare(root, output / plane, *flags) == 0
        kept = all(path.stat().st_mtime_ns == time for path, time in before.items())
        assert kept == (plane == "axial")


@pytest.mark.parametrize("kind", ["nifti", "dicom"])
@pytest.mark.parametrize("letters", ["PIR", "RAS", "LIP", "ASL"])
@pytest.mark.parametrize("plane", PLANES)
def test_predict_cuts_and_turns_back_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plane: str, letters: str, kind: str
):
    """What is done voxel by voxel to the slices lies exactly over the scan, oblique as it is."""
    image = np.random.default_rng(1).integers(-900, 900, (6, 9, 11)).astype(np.int16)
    geometry = placed(letters)
    if kind == "dicom":
        source = write_dicom(tmp_path / "scan", image, geometry)
    else:
        source = tmp_path / "scan.nii.gz"
        write_volume(source, image, geometry)
    (scan,) = find_scans(source)
    spec = replace(SPEC, orientation=PLANES[plane])
    case = cases.read_case(spec, scan)
    slices = np.asarray(case.slices.array)
    if kind == "nifti":
        assert np.array_equal(slices, expected_slices(source, plane))
    labels = np.digitize(slices, MARKS).astype(np.uint8)
    args = Namespace(
        input=str(tmp_path),
        format=".nii.gz",
        probabilities=False,
        overwrite=False,
        dicom_seg=False,
        no_viewer=True,
    )
    out = Written(tmp_path / "out")
    (tmp_path / "out" / RECORDS).mkdir(parents=True)
    monkeypatch.setattr(results, "save_picture", lambda *_: None)
    result = results.write_case(args, spec, case, labels, None, key={}, written=out)
    written, there = read_volume(tmp_path / "out" / result["file"])
    array, where = cases.read_scan(scan)
    assert np.array_equal(written, np.array([0, 2, 5, 9])[np.digitize(array, MARKS)])
    assert there.spacing == pytest.approx(where.spacing, rel=1e-6)
    assert there.matches(where)
    if kind == "nifti":
        same = nibabel.load(tmp_path / "out" / result["file"]).affine == nibabel.load(source).affine
        assert same.all()


@pytest.mark.parametrize("plane", PLANES)
def test_distances_are_in_mm_of_the_scan_and_files_lie_on_its_grid(tmp_path: Path, plane: str):
    root, output = tmp_path / "raw", tmp_path / "data"
    geometry = across("RAS", plane)
    for name in ("a", "b"):
        add_scan(root, name, geometry)
    label = np.zeros((5, 9, 11), np.uint8)  # (z, y, x) of the file
    label[1, 2, 3] = 1
    file = root / "labels" / "b.nii.gz"
    write_volume(file, label, geometry)
    assert prepare(root, output, "--test_cases", "b") == 0
    case = volume_results.read_case(Synapse_dataset(output, None, "test_vol", num_classes=1), 0)

    moved = np.zeros_like(label)
    moved[3, 6, 4] = 1
    write_volume(tmp_path / "moved.nii.gz", moved, geometry)
    prediction = np.ascontiguousarray(expected_slices(tmp_path / "moved.nii.gz", plane), np.uint8)
    spec = SYNAPSE.of_plain_classes(1).to_json()
    args = Namespace(num_classes=1, nsd_tolerance=2.0, spec=spec)
    result = volume_results.score_case(case, prediction, args, tmp_path, None)
    places = []  # mm
    for path in (file, tmp_path / "moved.nii.gz"):
        (voxel,) = np.argwhere(nibabel.load(path).get_fdata())
        places.append(nibabel.affines.apply_affine(nibabel.load(path).affine, voxel))
    (score,) = result.scores
    assert score.hd95_mm == pytest.approx(np.linalg.norm(places[0] - places[1]), rel=1e-5)

    volume_results.write_case(case, prediction, tmp_path / "nii")
    for suffix, source in (("pred", tmp_path / "moved.nii.gz"), ("gt", file)):
        written = nibabel.load(tmp_path / "nii" / f"b_{suffix}.nii.gz")
        assert np.array_equal(written.dataobj, nibabel.load(source).dataobj)
        assert np.allclose(written.affine, nibabel.load(source).affine, atol=1e-4)
    summary = json.loads((output / "preprocess.json").read_text("utf-8"))
    assert summary["spec"]["orientation"] == PLANES[plane]
