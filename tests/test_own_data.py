"""Data sets of any origin, from their own folders to segmentations and a report."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import processes
import pytest
from conftest import TINY_FLAGS
from dicom_files import slice_tags, write_dicom_file
from PIL import Image
from test_scans import placed, write_dicom

import predict
import test as test_program
import train
from common.errors import exit_on_bad_input
from common.files import load_arrays
from datasets.intensity import MR, PERCENTILES, PICTURE, RANGE, WINDOW
from datasets.registry import SYNAPSE, stored_spec
from datasets.scans.orientation import orientation_of, reorient
from datasets.scans.volumes import Geometry, read_volume, write_volume
from evaluation import __main__ as report
from evaluation.test_runs import read_json
from preprocess.prepare import main as prepare

pytestmark = pytest.mark.slow

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
SHAPE = (4, 11, 13)
LABELS = {"background": 0, "liver": 1, "tumour": 5}


def scan(seed: int, low: int = -1000) -> tuple[np.ndarray, np.ndarray]:
    """Return random voxels int16 and label values 0, 1, 5 uint8, both (D, H, W)."""
    rng = np.random.default_rng(seed)
    image = rng.integers(low, 600, SHAPE).astype(np.int16)
    return image, rng.choice([0, 1, 5], SHAPE).astype(np.uint8)


def write_set(
    root: Path,
    description: dict | None,
    names: tuple[str, ...] = ("imagesTr", "labelsTr"),
    *,
    ending: str = ".nii.gz",
    channel: str = "_0000",
    cases: int = 5,
    low: int = -1000,
) -> Path:
    """Write volumes in the layout of nnU-Net, of the Decathlon, or in two plain folders."""
    for index in range(cases):
        image, label = scan(index, low)
        write_volume(root / names[0] / f"pat{index}{channel}{ending}", image, placed("RAS"))
        write_volume(root / names[1] / f"pat{index}{ending}", label, placed("RAS"))
    if description is not None:
        (root / "dataset.json").write_text(json.dumps(description))
    return root


def run_prepare(root: Path, output: Path, *flags: str) -> int:
    try:
        prepare(["--input", str(root), "--output", str(output), "--workers", "1", *flags])
    except SystemExit as stop:
        return int(stop.code)
    return 0


def cases_of(output: Path, role: str) -> set[str]:
    """Return the cases in the list of a role."""
    names = (output / "lists" / f"{role}.txt").read_text("utf-8").split()
    return {name.split("_slice")[0] for name in names}


NNUNET = {
    "channel_names": {"0": "CT"},
    "labels": LABELS,
    "numTraining": 5,
    "file_ending": ".nii.gz",
}
DECATHLON = {
    "name": "Liver",
    "modality": {"0": "MRI"},
    "labels": {str(value): name for name, value in LABELS.items()},
    "numTraining": 5,
}
LAYOUTS = {
    "nnU-Net": (NNUNET, {}, WINDOW),
    "nnU-Net, NRRD": (NNUNET, {"ending": ".nrrd"}, WINDOW),
    "Decathlon": (DECATHLON, {"channel": ""}, PERCENTILES),
    "plain folders, MHA": (
        None,
        {"names": ("images", "labels"), "channel": "", "ending": ".mha"},
        WINDOW,
    ),
    "plain folders, MR": (
        None,
        {"names": ("images", "masks"), "channel": "", "low": 0},
        PERCENTILES,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path: Path, name: str):
    description, how, rule = LAYOUTS[name]
    root, output = write_set(tmp_path / "raw", description, **how), tmp_path / "data"
    names = () if description else ("--class_names", "liver", "tumour")
    assert run_prepare(root, output, *names) == 0
    spec = stored_spec(output)
    assert spec.class_names == ("liver", "tumour") and spec.predicted_values == (1, 5)
    assert spec.intensity.rule == rule and spec.orientation == "LPS"
    assert spec.name == ("Liver" if name == "Decathlon" else "raw")
    train_cases, test_cases = cases_of(output, "train"), cases_of(output, "test_vol")
    assert len(train_cases) == 4 and len(test_cases) == 1 and not train_cases & test_cases
    case = next(iter(test_cases))
    image, label = scan(int(case[-1]), how.get("low", -1000))
    with h5py.File(output / "test_vol_h5" / f"{case}.npy.h5") as file:
        assert file.attrs["orientation"] == "LPS"
        stored = Geometry(*(tuple(file.attrs[k]) for k in ("spacing", "origin", "direction")))
        assert orientation_of(stored) == "RAS"  # the orientation of the scan
        classes = reorient(np.searchsorted([0, 1, 5], label), "RAS", "LPS")
        assert np.array_equal(file["label"][()], classes)
        low, high = (-125, 275) if rule == WINDOW else np.percentile(image, (MR.low, MR.high))
        unit = (np.clip(reorient(image, "RAS", "LPS"), low, high) - low) / (high - low)
        assert np.abs(file["image"][()] - unit).max() < 1e-6


def test_channels_are_chosen_by_their_number(tmp_path: Path):
    channels = {"1": "T2", "0": "CT_venous"}
    root = write_set(tmp_path / "raw", NNUNET | {"channel_names": channels})
    for path in sorted((root / "imagesTr").iterdir()):
        shutil.copy(path, path.with_name(path.name.replace("_0000", "_0001")))
    for channel, rule in ((0, WINDOW), (1, PERCENTILES)):
        assert run_prepare(root, tmp_path / f"{channel}", "--channel", str(channel)) == 0
        spec = stored_spec(tmp_path / f"{channel}")
        assert (spec.channel, spec.intensity.rule) == (channel, rule)


def test_folds_test_every_case_once(tmp_path: Path):
    root = write_set(tmp_path / "raw", NNUNET)
    tested = []
    for fold in range(3):
        output = tmp_path / f"fold{fold}"
        assert run_prepare(root, output, "--folds", "3", "--fold", str(fold)) == 0
        assert not cases_of(output, "train") & cases_of(output, "test_vol")
        tested += sorted(cases_of(output, "test_vol"))
    assert sorted(tested) == [f"pat{index}" for index in range(5)]


def test_test_cases_from_the_folders_ts(tmp_path: Path):
    root = write_set(tmp_path / "raw", NNUNET)
    for kind in ("images", "labels"):
        (root / f"{kind}Ts").mkdir()
        for path in list((root / f"{kind}Tr").glob("pat[34]*")):
            path.rename(root / f"{kind}Ts" / path.name)
    assert run_prepare(root, tmp_path / "data") == 0
    assert cases_of(tmp_path / "data", "test_vol") == {"pat3", "pat4"}


def test_dicom_images_with_nifti_labels(tmp_path: Path):
    image, label = scan(0)
    for index in range(2):
        geometry = placed("LPS")
        write_dicom(tmp_path / "raw" / "images" / f"a{index}", image, geometry)
        write_volume(tmp_path / "raw" / "labels" / f"a{index}.nii.gz", label, geometry)
    assert run_prepare(tmp_path / "raw", tmp_path / "data", "--test_cases", "a1") == 0
    with h5py.File(tmp_path / "data" / "test_vol_h5" / "a1.npy.h5") as file:
        assert np.array_equal(file["label"][()], np.searchsorted([0, 1, 5], label))


def test_dicom_files_without_folders_of_their_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    raw, stored = tmp_path / "raw", np.full((6, 8), 1000, np.uint16)
    stored[2:4, 2:5] = 1100
    (raw / "labels").mkdir(parents=True)
    for number, name in enumerate(("p", "q")):
        tags = slice_tags(stored, position=None, spacing=None, number=number)
        tags["series"] = (0x20, 0x0E, "UI", f"1.2.3.{number + 1}")
        write_dicom_file(raw / "images" / f"{name}.dcm", tags)
        Image.fromarray((stored > 1000).astype(np.uint8)).save(raw / "labels" / f"{name}.png")
    flags = ["--input", str(raw), "--output", str(tmp_path / "data"), "--workers", "1"]
    with pytest.raises(SystemExit):
        prepare(flags)
    assert "files of each case into a folder of the case's name" in capfd.readouterr().err
    for name in ("p", "q"):  # as the message says
        (raw / "images" / name).mkdir()
        (raw / "images" / f"{name}.dcm").rename(raw / "images" / name / f"{name}.dcm")
    prepare(flags)
    assert len(list((tmp_path / "data" / "test_vol_h5").iterdir())) == 1


def test_colour_stays_colour_and_grey_is_repeated(tmp_path: Path):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (12, 16, 3), np.uint8)
    grey = rng.integers(0, 256, (12, 16), np.uint8)
    for name, picture in (("colour", colour), ("grey", grey), ("other", colour // 2)):
        for kind, array in (("images", picture), ("labels", (grey > 99).astype(np.uint8) * 255)):
            (tmp_path / "raw" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / "raw" / kind / f"{name}.png")
    output = tmp_path / "data"
    assert run_prepare(tmp_path / "raw", output, "--test_cases", "other") == 0
    spec = stored_spec(output)
    assert (spec.channels, spec.intensity, spec.predicted_values) == (3, PICTURE, (255,))
    for name, expected in (("colour", colour.transpose(2, 0, 1)), ("grey", grey)):
        arrays = load_arrays(output / "train_npz" / f"{name}_slice000.npz", ("image", "label"))
        assert arrays["image"].shape == (3, 12, 16)
        assert np.abs(arrays["image"] * 255 - expected).max() < 1e-4
        assert np.array_equal(arrays["label"], grey > 99)
    flags = ["--batch_size", "2", "--max_epochs", "2", "--val_every", "1", *TINY_FLAGS]
    train.main(["--root_path", str(output), "--output", str(tmp_path / "out"), *flags])
    (run,) = (tmp_path / "out").iterdir()
    test_program.main(["--config", str(run), "--volume_path", str(output), "--is_savenii"])
    assert len(read_json(run / "test" / "results.json").results) == 1


def test_pictures_of_one_scan_stay_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for kind in ("images", "labels"):
        (tmp_path / "raw" / kind).mkdir(parents=True)
        for name in ("a_1", "a_20", "b_1", "b_07", "c_3"):
            picture = np.random.default_rng(1).integers(0, 2, (8, 8)).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / "raw" / kind / f"{name}.png")
    assert run_prepare(tmp_path / "raw", tmp_path / "data", "--test_cases", "b") == 0
    assert cases_of(tmp_path / "data", "train") == {"a", "c"}
    volumes = {p.name for p in (tmp_path / "data" / "test_vol_h5").iterdir()}
    assert volumes == {"b_slice1.npy.h5", "b_slice07.npy.h5"}
    assert "5 pictures of 3 scans" in capsys.readouterr().out
    assert run_prepare(tmp_path / "raw", tmp_path / "each", "--group", "none") == 0
    assert "c_3_slice000" in (tmp_path / "each" / "lists" / "train.txt").read_text("utf-8") or (
        "c_3" in (tmp_path / "each" / "lists" / "test_vol.txt").read_text("utf-8")
    )


def test_results_have_the_scans_orientation(tmp_path: Path):
    root, output = write_set(tmp_path / "raw", NNUNET), tmp_path / "data"
    run_prepare(root, output, "--test_cases", "pat2")
    flags = ["--batch_size", "2", "--max_epochs", "1", *TINY_FLAGS]
    train.main(["--root_path", str(output), "--output", str(tmp_path / "out"), *flags])
    (run,) = (tmp_path / "out").iterdir()
    test_program.main(["--config", str(run), "--volume_path", str(output), "--is_savenii"])
    label, geometry = read_volume(run / "test" / "predictions" / "pat2_gt.nii.gz")
    assert geometry.matches(read_volume(root / "imagesTr" / "pat2_0000.nii.gz")[1])
    assert np.array_equal(label, np.searchsorted([0, 1, 5], scan(2)[1]))
    # predict.py gives the same labels for the scan itself, with the label values of the data set.
    source = root / "imagesTr" / "pat2_0000.nii.gz"
    adapter = next(run.glob("epoch_*.pth"))
    flags = ["--lora_ckpt", str(adapter), "--output", str(tmp_path / "seg"), "--device", "cpu"]
    predict.main(["--input", str(source), *flags])
    tested, _ = read_volume(run / "test" / "predictions" / "pat2_pred.nii.gz")
    segmented, _ = read_volume(tmp_path / "seg" / "pat2_0000.nii.gz")
    assert np.array_equal(np.array([0, 1, 5])[tested], segmented)


UNREADABLE = [
    "raw/dataset.json",
    "raw/labelsTr",
    "raw/imagesTr",
    "data/dataset_spec.json",
    "data/lists/train.txt",
    "data/train_npz",
]


def run_without_rights(program: Callable[[list[str]], None], argv: list[str], log: Path) -> None:
    """Run a program as a user without the rights of root; write its stderr to `log`."""
    processes.bound_by_permissions()
    with log.open("w") as told, contextlib.redirect_stderr(told), exit_on_bad_input():
        program(argv)


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_without_read_permission_is_named_in_the_error_line(tmp_path: Path, name: str):
    root, data, log = write_set(tmp_path / "raw", NNUNET), tmp_path / "data", tmp_path / "log"
    assert run_prepare(root, data) == 0
    program, argv = train.main, ["--root_path", str(data), "--check", *TINY_FLAGS]
    if name.startswith("raw"):
        program = prepare
        argv = ["--input", str(root), "--output", str(tmp_path / "new"), "--workers", "1"]
    (tmp_path / name).chmod(0)
    process = processes.CONTEXT.Process(target=run_without_rights, args=(program, argv, log))
    process.start()
    process.join(timeout=60)
    (tmp_path / name).chmod(0o700)
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert process.exitcode == 2 and str(tmp_path / name) in line, log.read_text()
    assert "ermission denied" in line and "Traceback" not in log.read_text()


def real_set(folder: Path, name: str) -> tuple[Path, list[str]]:
    """Return a folder with a real data set in a known layout, and the flags to prepare it."""
    if name == "heart2d":
        return SHARED / "heart2d", ["--test_cases", "10004"]
    image, modality = {"ct": ("abdomen_crop", "CT"), "mr": ("abdomen_mr", "MRI")}[name]
    for kind, source in (("imagesTr/a_0000", image), ("labelsTr/a", f"{image}_label")):
        target = folder / f"{kind}.nii.gz"
        target.parent.mkdir(parents=True)
        shutil.copy(SHARED / name / f"{source}.nii.gz", target)
    names = ("background", *SYNAPSE.class_names)
    labels = {name: index for index, name in enumerate(names)}
    told = {"channel_names": {"0": modality}, "labels": labels, "numTraining": 1}
    (folder / "dataset.json").write_text(json.dumps(told))
    return folder, ["--train_cases", "a", "--test_cases", "a"]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no sample data in {SHARED}")
@pytest.mark.parametrize(
    ("name", "rule", "scored"), [("ct", WINDOW, 1), ("mr", PERCENTILES, 1), ("heart2d", RANGE, 5)]
)
def test_real_sets_all_the_way(tmp_path: Path, name: str, rule: str, scored: int):
    root, flags = real_set(tmp_path / "raw", name)
    data = tmp_path / "data"
    assert run_prepare(root, data, *flags, "--size", "64") == 0
    spec = stored_spec(data)
    assert spec.num_classes == 8 and spec.intensity.rule == rule
    flags = ["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS]
    train.main([*flags, "--check"])
    train.main([*flags, "--batch_size", "8", "--max_epochs", "1"])
    (run,) = (tmp_path / "out").iterdir()
    test_program.main(["--config", str(run), "--volume_path", str(data)])
    assert len(read_json(run / "test" / "results.json").results) == scored
    if name == "heart2d":
        source = sorted((root / "images").glob("10004_*"))[0]
        expected = tmp_path / "seg" / source.name
    else:
        source = root / "imagesTr" / "a_0000.nii.gz"
        expected = tmp_path / "seg" / "a_0000.nii.gz"
    flags = ["--config", str(run), "--output", str(tmp_path / "seg"), "--device", "cpu"]
    predict.main(["--input", str(source), *flags])
    if name == "heart2d":
        assert Image.open(expected).size == (512, 512)
    else:
        voxels, geometry = read_volume(expected)
        image, where = read_volume(source)
        assert voxels.shape == image.shape and geometry == where
    report.main([str(run), "--output", str(tmp_path / "page.html")])
    assert "Confusion between organs" in (tmp_path / "page.html").read_text("utf-8")
