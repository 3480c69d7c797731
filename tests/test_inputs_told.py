"""What `predict.py` tells: unused files, names of series, volumes, organs cut by the edge."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from test_predict import SPEC, make_adapter, marked, run
from test_scans import placed, volume, write_dicom, write_slice

from common.errors import InputError
from datasets.scans.files import find_scans, read_scan, search
from datasets.scans.identity import names_patient
from datasets.scans.series_header import BIRTH_DATE, IDENTITY_REMOVED, PATIENT_ID, PATIENT_NAME
from datasets.scans.unused import Unused
from datasets.scans.volumes import write_volume
from prediction.cases import read_case
from prediction.results import cut_classes
from prediction.summary import shown_ml

UNKNOWN = "of an unknown suffix, and not DICOM"
SUBFOLDER = "in a subfolder, where only DICOM is looked for"


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "adapter").mkdir()
    return make_adapter(tmp_path / "adapter", SPEC, monkeypatch)


def write_series(folder: Path, tags: dict[str, str], array: np.ndarray | None = None) -> Path:
    """Write a DICOM series whose slices have these tags too; an empty text removes a tag."""
    write_dicom(folder, volume() if array is None else array, placed("LPS", oblique=False))
    for file in sorted(folder.iterdir()):
        image = sitk.ReadImage(str(file))
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        write_slice(image, file)
    return folder


def told_of(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the cases and the reason for each unused file that predictions.json lists."""
    content = json.loads((folder / "predictions.json").read_text("utf-8"))
    return content["cases"], {one["path"]: one["reason"] for one in content["not_used"]}


def test_every_file_that_is_not_used_is_named(
    tmp_path: Path, adapter: Path, capfd: pytest.CaptureFixture[str]
):
    scans = tmp_path / "in"
    for name in ("a.nii.gz", ".b.nii.gz", "p1/c.nii.gz", "p1/labels/c.mha"):
        write_volume(scans / name, marked((3, 20, 20))[0], placed("LPS"))
    sitk.WriteImage(sitk.GetImageFromArray(marked((3, 20, 20))[0]), str(scans / "d.mhd"))
    for name in ("README.txt", "e.mgz", "p1/f.npy", ".cache/g.nii", "DICOMDIR"):
        (scans / name).parent.mkdir(exist_ok=True)
        (scans / name).write_bytes(b"x")
    (scans / "h.nii.gz").symlink_to(tmp_path / "nothing.nii.gz")
    expected = {
        ".b.nii.gz": "hidden",
        ".cache/": "hidden",
        "DICOMDIR": UNKNOWN,
        "README.txt": UNKNOWN,
        "e.mgz": UNKNOWN,
        "h.nii.gz": "a link to nothing, or not a file",
        "p1/c.nii.gz": SUBFOLDER,
        "p1/f.npy": UNKNOWN,
        "p1/labels/c.mha": SUBFOLDER,
    }
    for _ in range(2):  # results in the input are not listed by the second run
        assert run(scans, scans / "out", adapter) == 0
        cases, unused = told_of(scans / "out")
        assert [(case["case"], case["input"]) for case in cases] == [
            ("a", "a.nii.gz"),
            ("d", "d.mhd"),
        ]
        assert unused == expected
        warnings = [line for line in capfd.readouterr().err.splitlines() if "is used" in line]
        assert len(warnings) == 1 and "predictions.json lists all of them" in warnings[0]
        for part in (
            "2 hidden (.b.nii.gz, .cache/)",
            f"4 {UNKNOWN} (DICOMDIR, README.txt, e.mgz and 1 more)",
            f"2 {SUBFOLDER} (p1/c.nii.gz, p1/labels/c.mha)",
        ):
            assert part in warnings[0]


@pytest.mark.parametrize("name", ["README.txt", "labels.txt", "Thumbs.db", ".DS_Store", "t1.json"])
def test_notes_are_listed_without_a_warning(
    tmp_path: Path, adapter: Path, capfd: pytest.CaptureFixture[str], name: str
):
    write_volume(tmp_path / "in" / "a.nii.gz", marked((3, 20, 20))[0], placed("LPS"))
    (tmp_path / "in" / name).touch()
    assert run(tmp_path / "in", tmp_path / "out", adapter) == 0
    assert list(told_of(tmp_path / "out")[1]) == [name]
    said = capfd.readouterr()
    assert "warning" not in said.err and "1 files not used" in said.out


def test_files_beside_slices_and_of_other_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    adapter = make_adapter(tmp_path, replace(SPEC, channel=1), monkeypatch)
    series = write_dicom(tmp_path / "in" / "p" / "s", marked((3, 20, 20))[0], placed("LPS"))
    for name in ("dose.dat", "notes.txt"):
        (series / name).write_bytes(b"x")
    for name in ("b_0000", "b_0001"):
        write_volume(tmp_path / "in" / f"{name}.nii.gz", marked((3, 20, 20))[0], placed("LPS"))
    expected = {
        "b_0000.nii.gz": "of another channel",
        "p/s/dose.dat": "not DICOM, beside DICOM slices",
        "p/s/notes.txt": "not DICOM, beside DICOM slices",
    }
    for _ in range(2):  # the second run has the series from its record
        assert run(tmp_path / "in", tmp_path / "out", adapter) == 0
        cases, unused = told_of(tmp_path / "out")
        assert [case["input"] for case in cases] == ["b_0001.nii.gz", "p/s"]
        assert unused == expected
        assert "2 not DICOM, beside DICOM slices (p/s/dose.dat" in capfd.readouterr().err


def test_linked_folders_are_searched_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    write_dicom(tmp_path / "archive" / "s", volume(), placed("LPS"))
    (tmp_path / "in" / "p").mkdir(parents=True)
    (tmp_path / "in" / "p" / "link").symlink_to(tmp_path / "archive")
    (tmp_path / "archive" / "loop").symlink_to(tmp_path / "in")
    scans, unused = search(tmp_path / "in")
    assert [scan.name for scan in scans] == ["p_link_s"]
    assert unused == [Unused("p/link/loop/", "a link to a folder that is searched already")]


def test_a_folder_without_scans_says_what_it_holds(tmp_path: Path):
    for name in ("p1/a.ima", "p2/a.ima", "p3/b.nii.gz"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=rf"2 {UNKNOWN} \(p1/a.ima, p2/a.ima\); 1 {SUBFOLDER}"):
        find_scans(tmp_path)


def test_a_folder_of_unknown_files_says_how_to_convert_them(tmp_path: Path):
    for name in ("a.hdr", "a.img", "b.mgz"):
        (tmp_path / name).write_bytes(bytes(400))
    with pytest.raises(InputError, match=r"convert its files to one of these.*3 of an unknown"):
        find_scans(tmp_path)


def test_one_file_of_a_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_dicom(tmp_path / "s", volume(), placed("LPS"))
    first, *others = sorted(folder.iterdir())
    for name, expected in (("000.dcm", "000"), ("IM1.5", "IM1.5")):
        file = first = first.rename(folder / name)
        assert [(scan.name, scan.path) for scan in find_scans(file)] == [(expected, file)]
        assert f"only {file} is read; pass its folder" in capsys.readouterr().err
    array, _ = read_scan(find_scans(folder / "IM1.5")[0])
    assert np.array_equal(array, volume()[:1])
    for file in others:
        file.unlink()
    capsys.readouterr()
    assert len(find_scans(folder / "IM1.5")) == 1 and not capsys.readouterr().err


def test_dicom_without_an_image_is_named(
    tmp_path: Path, adapter: Path, capfd: pytest.CaptureFixture[str]
):
    head = bytes(128) + b"DICM"
    structures = head + b"".join(
        tag + b"UI" + len(value).to_bytes(2, "little") + value
        for tag, value in (
            (b"\x02\x00\x10\x00", b"1.2.840.10008.1.2.1\0"),
            (b"\x08\x00\x16\x00", b"1.2.840.10008.5.1.4.1.1.481.3\0"),
        )
    )
    series = write_dicom(tmp_path / "in" / "p", marked((3, 20, 20))[0], placed("LPS"))
    (tmp_path / "in" / "rt").mkdir()
    for file in (series / "rt.dcm", tmp_path / "in" / "rt" / "1", tmp_path / "in" / "2.dcm"):
        file.write_bytes(structures)
    assert run(tmp_path / "in", tmp_path / "out", adapter) == 0
    cases, unused = told_of(tmp_path / "out")
    assert [case["case"] for case in cases] == ["p"]
    no_image = "DICOM without an image of a scan"
    assert unused == {"2.dcm": no_image, "p/rt.dcm": no_image, "rt/1": no_image}
    assert f"2 {no_image} (2.dcm, rt/1)" in capfd.readouterr().err


@pytest.mark.parametrize("missing", ["", "0018|0050", "0028|0030"])
def test_one_slice_of_dicom_states_its_size_or_has_no_ml(tmp_path: Path, missing: str):
    folder = write_dicom(tmp_path / "s", marked((1, 20, 20))[0], placed("LPS"))
    file = next(folder.iterdir())
    if missing:
        group, element = (int(part, 16).to_bytes(2, "little") for part in missing.split("|"))
        content = file.read_bytes()
        assert content.count(group + element) == 1
        file.write_bytes(content.replace(group + element, group + b"\xfe\xff"))
    expected = None if missing else pytest.approx(0.83 * 1.27 * 3.1 / 1000)
    assert read_case(SPEC, find_scans(folder)[0]).voxel_ml == expected


NAMES = {
    "surname": ("study/MUELLER_A/ct", {PATIENT_NAME: "Müller^Anna"}, True),
    "accents": ("Jose Perez", {PATIENT_NAME: "Pérez^José"}, True),
    "umlaut in the folder": ("Müller", {PATIENT_NAME: "Mueller^Anna"}, True),
    "joined": ("annameier_ct", {PATIENT_NAME: "Meier^Anna"}, True),
    "ID": ("12-34-567", {PATIENT_ID: "1234567"}, True),
    "birthday": ("ct_1953-07-04", {BIRTH_DATE: "19530704"}, True),
    "birthday, day first": ("p 04.07.1953", {BIRTH_DATE: "19530704"}, True),
    "plain": ("ct/thorax", {PATIENT_NAME: "Müller^Anna", PATIENT_ID: "1234567"}, False),
    "short ID": ("patient1", {PATIENT_ID: "P1"}, False),
    "pseudonym": ("patient2", {PATIENT_ID: "patient2", PATIENT_NAME: "Anonymous"}, False),
    "numbered": ("case_0012", {PATIENT_ID: "case_0012"}, False),
    "no tags": ("MUELLER", {}, False),
    "removed": ("LIDC-0001", {PATIENT_ID: "LIDC-0001", IDENTITY_REMOVED: "YES"}, False),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_tells_the_patient_is_recognised(name: str):
    folder, tags, expected = NAMES[name]
    assert names_patient(folder, tags) is expected


def test_a_patients_name_is_not_in_the_results(
    tmp_path: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    patient = {"0010|0010": "Meier^Anna", "0010|0020": "77"}
    array = marked((3, 20, 20))[0]
    write_series(tmp_path / "in" / "Meier" / "s1", patient, array)
    write_series(tmp_path / "in" / "ward3" / "s2", patient | {"0020|000e": "1.2.3.4"}, array)
    assert run(tmp_path / "in", tmp_path / "out", adapter) == 0
    cases, _ = told_of(tmp_path / "out")
    by_input = {case["input"]: case["case"] for case in cases}
    short = by_input["Meier/s1"]
    assert short.startswith("series_") and by_input["ward3/s2"] == "ward3_s2"
    assert f"Meier/s1 is called {short} in the results" in capfd.readouterr().err
    files = {path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("out/**/*")}
    assert {f"{short}.mha", f"overlays/{short}.png", "ward3_s2.mha"} <= files
    assert not any("meier" in file.lower() for file in files)
    assert "Meier" not in (tmp_path / "out" / "volumes.csv").read_text("utf-8")
    # The name depends on the series alone, also where its folder is the input.
    monkeypatch.chdir(tmp_path / "in" / "Meier")
    Path("s1").rename("Anna")
    for source in (Path("Anna"), tmp_path / "in" / "Meier" / "Anna"):
        assert run(source, tmp_path / "one", adapter) == 0
        assert f"Anna is called {short} in the results" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "one").glob("*.mha")] == [f"{short}.mha"]
    (tmp_path / "in" / "ward3").rename(tmp_path / "in" / "anna")
    assert run(tmp_path / "in", tmp_path / "kept", adapter, "--keep_names") == 0
    assert {path.name for path in (tmp_path / "kept").glob("*.mha")} == {
        "Meier_Anna.mha",
        "anna_s2.mha",
    }


def test_copies_of_a_series_are_refused(tmp_path: Path):
    for name in ("Meier_1", "Meier_2"):
        write_series(tmp_path / name, {"0010|0010": "Meier^Anna"})
    with pytest.raises(InputError, match="Meier_1 and Meier_2, whose results would have the same"):
        search(tmp_path, keep_names=False)
    assert len(find_scans(tmp_path)) == 2


def test_organs_at_the_edge_of_the_scan_are_marked(
    tmp_path: Path, adapter: Path, capfd: pytest.CaptureFixture[str]
):
    labels = np.zeros((5, 8, 9), np.uint8)
    labels[1, 2, 3], labels[4, 5, 5], labels[2, 0, 4], labels[2, 3, 8] = 1, 2, 3, 4
    assert cut_classes(labels) == {0, 2, 3, 4}
    assert cut_classes(labels[2:3]) == {0, 3, 4}  # one slice has no first and last slice
    scan = np.full((9, 40, 40), -1000, np.int16)
    scan[6:, 10:20, 10:20], scan[3:6, 25:35, 25:35] = -400, 200
    write_volume(tmp_path / "a.nii.gz", scan, placed("LPS"))
    assert run(tmp_path / "a.nii.gz", tmp_path / "out", adapter) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "volumes.csv").open(encoding="utf-8")))
    assert [row["cut_by_edge"] for row in rows] == ["yes", "no", "no"]
    voxel = 0.83 * 1.27 * 3.1 / 1000
    assert [row["ml"] for row in rows] == [shown_ml(int(row["voxels"]) * voxel) for row in rows]
    said = capfd.readouterr().out
    assert f"  a  front mark {int(rows[0]['voxels']) * voxel:.3g}*, left mark " in said
    assert f"left mark {int(rows[1]['voxels']) * voxel:.3g}; not found: top mark" in said
    assert "labels.txt" in said and f"{tmp_path / 'out' / 'overlays'}" in said


def test_volumes_have_few_digits():
    values = {1523.4567: "1523.46", 1.005001: "1.01", 0.77117: "0.771", 0.0012345: "0.00123"}
    assert {value: shown_ml(value) for value in values} == values
    assert shown_ml(0.0) == "0"


NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: 20 20 3\n{}encoding: raw\nendian: little\n\n"
MHA = (
    "ObjectType = Image\nNDims = 3\nDimSize = 20 20 3\nElementType = MET_SHORT\n"
    "ElementByteOrderMSB = False\n{}ElementDataFile = LOCAL\n"
)
HEADERS = {
    ".nrrd": (NRRD, "", None),
    "known.nrrd": (NRRD, "spacings: 2 2 5\n", 0.02),
    ".mha": (MHA, "", None),
    "known.mha": (MHA, "ElementSpacing = 2 2 5\n", 0.02),
}


@pytest.mark.parametrize("name", HEADERS)
def test_no_size_is_made_up_for_voxels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    head, size, expected = HEADERS[name]
    voxels = marked((3, 20, 20))[0].astype("<i2").tobytes()
    (tmp_path / f"a{name}").write_bytes(head.format(size).encode() + voxels)
    check_voxel_ml(tmp_path / f"a{name}", expected, capsys)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nii.gz"])
def test_a_plane_without_a_thickness_has_no_ml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
):
    image = sitk.GetImageFromArray(marked((1, 20, 20))[0][0])
    image.SetSpacing((0.3, 0.4))
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
    check_voxel_ml(tmp_path / f"a{suffix}", None, capsys)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nii.gz"])
def test_one_volume_in_four_dimensions_is_a_scan(tmp_path: Path, adapter: Path, suffix: str):
    image = sitk.GetImageFromArray(marked((3, 20, 20))[0])
    image.SetSpacing((2, 2, 5))
    image.SetOrigin((-7, 8, 9))
    sitk.WriteImage(sitk.JoinSeries([image]), str(tmp_path / f"a{suffix}"))
    array, geometry = read_scan(find_scans(tmp_path / f"a{suffix}")[0])
    assert np.array_equal(array, marked((3, 20, 20))[0])
    assert geometry.spacing == (2, 2, 5) and geometry.origin == (-7, 8, 9)
    assert run(tmp_path / f"a{suffix}", tmp_path / "out", adapter) == 0
    label = sitk.ReadImage(str(tmp_path / "out" / f"a{suffix}"))
    assert label.GetSize() == (20, 20, 3) and label.GetOrigin() == (-7, 8, 9)


def test_the_size_of_nifti_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_volume(tmp_path / "a.nii", marked((3, 20, 20))[0], placed("LPS"))
    check_voxel_ml(tmp_path / "a.nii", 0.83 * 1.27 * 3.1 / 1000, capsys)


def check_voxel_ml(path: Path, expected: float | None, capsys: pytest.CaptureFixture[str]) -> None:
    case = read_case(SPEC, find_scans(path)[0])
    assert case.voxel_ml == (expected and pytest.approx(expected, rel=1e-6))
    told = "the file does not state the size of its voxels, so volumes have no ml"
    assert (told in capsys.readouterr().err) == (expected is None)


def test_volumes_without_a_voxel_size_are_in_voxels(tmp_path: Path, adapter: Path):
    voxels = marked((3, 20, 20))[0].astype("<i2").tobytes()
    (tmp_path / "a.mha").write_bytes(MHA.format("").encode() + voxels)
    assert run(tmp_path / "a.mha", tmp_path / "out", adapter) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "volumes.csv").open(encoding="utf-8")))
    assert [row["ml"] for row in rows] == ["", "", ""] and int(rows[0]["voxels"]) > 0
    cases, _ = told_of(tmp_path / "out")
    assert cases[0]["ml"] is None and "no ml" in cases[0]["warnings"][0]
