"""The folder of corrected scans: a voxel goes from the network to the same training slice."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from test_own_data import run_prepare
from test_predict import SPEC
from test_scans import placed, write_dicom

from common.errors import InputError
from common.files import load_arrays
from correction import folder as corrections
from correction.folder import write_corrected
from datasets.intensity import PICTURE
from datasets.registry import DatasetSpec, stored_spec
from datasets.scans.files import find_scans
from datasets.scans.label_names import named_labels
from datasets.scans.volumes import read_volume, write_volume
from prediction.cases import Case, read_case

pytestmark = pytest.mark.slow

SHAPE = (6, 9, 11)
PLACE = (4, 2, 7)  # of the one bright voxel, in the order (D, H, W) of the file
BRIGHT = 900
PICTURES = replace(SPEC, intensity=PICTURE, orientation=None, pictures=True)


def voxels() -> np.ndarray:
    """Return a scan in which one voxel is bright."""
    array = np.random.default_rng(0).integers(-900, 500, SHAPE).astype(np.int16)
    array[PLACE] = BRIGHT
    return array


def in_format(ending: str, letters: str) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        write_volume(root / f"scan{ending}", voxels(), placed(letters))
        return root / f"scan{ending}"

    return write


def detached(header: str) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        image = sitk.GetImageFromArray(voxels())
        image.SetDirection(placed("PIR").direction)
        image.SetSpacing((0.7, 0.9, 3))
        sitk.WriteImage(image, str(root / f"scan{header}"))
        return root / f"scan{header}"

    return write


def series(root: Path) -> Path:
    folder = write_dicom(root / "scan", voxels(), placed("PIR"))
    (folder / "notes.txt").write_text("no slice")
    return folder


def four_d(root: Path) -> Path:
    channels = np.stack([np.zeros(SHAPE, np.int16), voxels()])
    affine = np.diag([-1.5, 2, 3, 1])
    nibabel.save(nibabel.Nifti1Image(channels.transpose(3, 2, 1, 0), affine), root / "scan.nii.gz")
    return root / "scan.nii.gz"


def picture(ending: str, *, colour: bool = False) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        grey = np.random.default_rng(0).integers(0, 200, SHAPE[1:]).astype(np.uint8)
        grey[PLACE[1:]] = 250
        Image.fromarray(np.stack([grey] * 3, -1) if colour else grey).save(root / f"scan{ending}")
        return root / f"scan{ending}"

    return write


AXIAL, FLIPPED = SPEC, replace(SPEC, orientation="RAI")
KINDS = {
    "nii.gz": (in_format(".nii.gz", "RAS"), AXIAL, "scan.nii.gz"),
    "sagittal nii": (in_format(".nii", "PIR"), AXIAL, "scan.nii"),
    "nrrd": (in_format(".nrrd", "SLP"), AXIAL, "scan.nrrd"),
    "mha": (in_format(".mha", "LPS"), AXIAL, "scan.mha"),
    "nhdr": (detached(".nhdr"), AXIAL, "scan.nrrd"),
    "mhd": (detached(".mhd"), AXIAL, "scan.mha"),
    "other orientation": (in_format(".nii.gz", "LPS"), FLIPPED, "scan.nii.gz"),
    "not turned": (in_format(".mha", "RAS"), replace(SPEC, orientation=None), "scan.mha"),
    "DICOM": (series, AXIAL, "scan.mha"),
    "4-D": (four_d, replace(SPEC, channel=1), "scan.nii.gz"),
    "png": (picture(".png"), PICTURES, "scan.png"),
    "colour bmp": (picture(".bmp", colour=True), replace(PICTURES, channels=3), "scan.png"),
}


def opened(path: Path, spec: DatasetSpec = SPEC) -> Case:
    (scan,) = find_scans(path)
    return read_case(spec, replace(scan, channel=spec.channel))


def corrected(case: Case) -> tuple[np.ndarray, tuple[int, ...]]:
    """Mark the brightest voxel as class 2, where the network sees it; return labels and place."""
    seen = case.slices[: case.slices.shape[0]]
    seen = seen[:, 0] if seen.ndim == 4 else seen
    place = np.unravel_index(seen.argmax(), seen.shape)
    labels = np.zeros(seen.shape, np.uint8)
    labels[place] = 2
    return labels, place


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrected_voxel_arrives_in_the_training_slice(tmp_path: Path, kind: str):
    write, spec, file = KINDS[kind]
    (tmp_path / "raw").mkdir()
    case = opened(write(tmp_path / "raw"), spec)
    labels, (depth, row, column) = corrected(case)
    path = write_corrected(tmp_path / "corrected", spec, case, labels)
    assert path == tmp_path / "corrected" / "labels" / file

    both = ("--train_cases", "scan", "--test_cases", "scan")
    assert run_prepare(tmp_path / "corrected", tmp_path / "data", *both) == 0
    prepared = stored_spec(tmp_path / "data")
    for name in ("class_names", "predicted_values", "intensity", "channels"):
        assert getattr(prepared, name) == getattr(spec, name)
    # Of scans that are not turned, it is recorded how they lie.
    assert prepared.orientation == (spec.orientation or ("RAS" if case.geometry else None))
    slices = sorted((tmp_path / "data" / "train_npz").glob("scan*.npz"))
    assert len(slices) == len(labels)
    for index, prepared_slice in enumerate(slices):
        arrays = load_arrays(prepared_slice, ("image", "label"))
        expected = np.zeros(labels.shape[1:])
        if index == depth:
            expected[row, column] = 2
        assert np.array_equal(arrays["label"], expected)
        assert np.array_equal(arrays["image"], case.slices[index : index + 1][0])

    if case.geometry is not None:
        found, geometry = read_volume(path)
        assert np.argwhere(found).tolist() == [list(PLACE)] and found[PLACE] == 5
        assert geometry.matches(case.geometry)


def test_the_scan_is_copied_byte_by_byte_and_the_label_names_its_classes(tmp_path: Path):
    source = in_format(".nii.gz", "RAS")(tmp_path)
    case = opened(source)
    path = write_corrected(tmp_path / "out", SPEC, case, corrected(case)[0])
    assert (tmp_path / "out" / "images" / "scan.nii.gz").read_bytes() == source.read_bytes()
    text = gzip.decompress(path.read_bytes())
    assert all(label.name.encode() in text for label in named_labels(SPEC))


def test_only_slices_of_a_series_are_copied(tmp_path: Path):
    case = opened(series(tmp_path))
    write_corrected(tmp_path / "out", SPEC, case, corrected(case)[0])
    copied = {p.name: p.read_bytes() for p in (tmp_path / "out" / "images" / "scan").iterdir()}
    assert copied == {p.name: p.read_bytes() for p in (tmp_path / "scan").glob("*.dcm")}


def saved(tmp_path: Path) -> tuple[Case, np.ndarray, Path]:
    case = opened(in_format(".nii.gz", "RAS")(tmp_path))
    labels, _ = corrected(case)
    return case, labels, write_corrected(tmp_path / "out", SPEC, case, labels)


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    seen = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: text for name, text in seen.items() if name not in (".lock", ".written.jsonl")}


def test_a_second_correction_replaces_the_first(tmp_path: Path):
    case, labels, path = saved(tmp_path)
    before = content(tmp_path / "out")
    write_corrected(tmp_path / "out", replace(SPEC, raw_range=(-5.0, 7.0)), case, labels)
    assert content(tmp_path / "out") == before
    write_corrected(tmp_path / "out", SPEC, case, np.full_like(labels, 3))
    assert set(np.unique(read_volume(path)[0])) == {9}
    assert content(tmp_path / "out").keys() == before.keys()


def test_a_failure_leaves_nothing_of_a_new_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise InputError("no room")

    monkeypatch.setattr(corrections, "write_labels", full)
    for write in (in_format(".nrrd", "RAS"), series):
        case = opened(write(tmp_path))
        with pytest.raises(InputError, match="no room"):
            write_corrected(tmp_path / "out", SPEC, case, corrected(case)[0])
        assert content(tmp_path / "out") == {}


def test_what_a_killed_process_left_is_removed(tmp_path: Path):
    left = tmp_path / "out" / "images" / ".1-0000.partial.other"
    left.mkdir(parents=True)
    (left / "0.dcm").touch()
    saved(tmp_path)
    assert not left.exists()


def test_names_that_end_like_channels_are_names(tmp_path: Path):
    """Each label belongs to the image of its own name, not to `NAME_0000`."""
    source = in_format(".nii.gz", "RAS")(tmp_path)
    for number, name in enumerate(("ct", "ct_0000", "ct_0001")):
        path = tmp_path / f"{name}.nii.gz"
        write_volume(path, voxels() - number, placed("RAS"))
        case = opened(path)
        labels, _ = corrected(case)
        write_corrected(tmp_path / "out", SPEC, case, labels)
    assert source.exists()
    names = ("--train_cases", "ct", "ct_0000", "--test_cases", "ct_0001")
    assert run_prepare(tmp_path / "out", tmp_path / "data", *names) == 0
    images = [
        load_arrays(tmp_path / "data" / "train_npz" / f"{name}_slice000.npz", ("image",))["image"]
        for name in ("ct", "ct_0000")
    ]
    expected = [opened(tmp_path / f"{name}.nii.gz").slices[:1][0] for name in ("ct", "ct_0000")]
    assert all(np.array_equal(one, other) for one, other in zip(images, expected, strict=True))
    assert not np.array_equal(*images)


REFUSED: dict[str, Callable[[Path, Case, np.ndarray], tuple]] = {
    "another scan of this name": lambda out, case, labels: (
        SPEC,
        opened(in_format(".nii.gz", "LPS")(out.parent / "other")),
        labels,
    ),
    "scan.nii.gz is another scan": lambda out, case, labels: (
        SPEC,
        opened(in_format(".mha", "RAS")(out.parent / "other")),
        labels,
    ),
    "its class_names differ": lambda out, case, labels: (
        replace(SPEC, class_names=("front mark", "left mark", "tail")),
        case,
        labels,
    ),
    "leads to another folder": lambda out, case, labels: (
        SPEC,
        replace(case, scan=replace(case.scan, name="../scan")),
        labels,
    ),
    "begins with a dot": lambda out, case, labels: (
        SPEC,
        replace(case, scan=replace(case.scan, name=".lock")),
        labels,
    ),
    "up to 4, expected (6, 9, 11) of uint8 up to 3": lambda out, case, labels: (
        SPEC,
        case,
        np.full_like(labels, 4),
    ),
    "of float64": lambda out, case, labels: (SPEC, case, labels.astype(float)),
    "(6, 11, 9)": lambda out, case, labels: (SPEC, case, labels.transpose(0, 2, 1)),
}


@pytest.mark.parametrize("told", REFUSED)
def test_wrong_corrections_are_refused(tmp_path: Path, told: str):
    case, labels, _ = saved(tmp_path)
    (tmp_path / "other").mkdir()
    before = content(tmp_path / "out")
    given = REFUSED[told](tmp_path / "out", case, labels)
    with pytest.raises(InputError) as refused:
        write_corrected(tmp_path / "out", *given)
    assert told in str(refused.value)
    assert content(tmp_path / "out") == before


def test_a_scan_that_changed_is_refused(tmp_path: Path):
    case, labels, _ = saved(tmp_path)
    case.scan.path.unlink()
    with pytest.raises(InputError, match="changed or removed since it was read"):
        write_corrected(tmp_path / "new", SPEC, case, labels)
    assert not (tmp_path / "new").exists()


def test_files_of_the_user_are_not_replaced(tmp_path: Path):
    case, labels, path = saved(tmp_path)
    path.write_bytes(b"drawn by hand")
    with pytest.raises(InputError, match="has not written or which was changed since"):
        write_corrected(tmp_path / "out", SPEC, case, labels)
    raw = tmp_path / "raw" / "images"
    raw.mkdir(parents=True)
    (raw / "mine.nii.gz").touch()
    with pytest.raises(InputError, match=r"mine\.nii\.gz, which are no corrections"):
        write_corrected(raw.parent, SPEC, case, labels)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--class_names", "a", "b", "c"), "--class_names has no effect"),
        (("--label_threshold", "1"), "--label_threshold has no effect"),
        (("--channel", "0"), "--channel has no effect"),
    ],
)
def test_flags_that_the_description_overrules_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], told: str
):
    saved(tmp_path)
    assert run_prepare(tmp_path / "out", tmp_path / "data", *flags) == 2
    assert told in capsys.readouterr().err
