"""Unusual data sets: read as their author meant, or refused with a single sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import TINY_FLAGS, tiny_model
from PIL import Image
from test_own_data import NNUNET, cases_of, run_prepare, scan, write_set
from test_scans import placed, write_dicom

from common.errors import InputError
from common.files import load_arrays
from config.flags import test_parser as evaluation_parser
from config.settings import dataset_spec, parse_args
from datasets.dataset_synapse import Synapse_dataset
from datasets.intensity import CT, MR, PICTURE, RANGE, WINDOW, Intensity
from datasets.registry import SYNAPSE, spec_from_json, stored_spec
from datasets.scans.orientation import reorient, reorient_geometry
from datasets.scans.volumes import write_volume

ERRORS = pytest.CaptureFixture[str]


def write_pictures(root: Path, pictures: dict[str, np.ndarray], ending: str = ".png") -> Path:
    """Write pictures, and masks of 0 and 1, into two plain folders; return `root`."""
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(root / "images" / f"{name}{ending}")
        mask = (np.arange(picture.shape[0] * picture.shape[1]) % 2).astype(np.uint8)
        Image.fromarray(mask.reshape(picture.shape[:2])).save(root / "labels" / f"{name}.png")
    return root


def refused(root: Path, output: Path, capfd: ERRORS, *flags: str) -> str:
    """Return the only error line that preparing this data set prints."""
    capfd.readouterr()
    assert run_prepare(root, output, *flags) == 2
    told = capfd.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in told
    return lines[0]


def test_a_case_whose_name_begins_as_anothers_keeps_its_slices(tmp_path: Path):
    root, output = write_set(tmp_path / "raw", NNUNET, cases=3), tmp_path / "data"
    for kind, channel in (("imagesTr", "_0000"), ("labelsTr", "")):
        path = root / kind / f"pat2{channel}.nii.gz"
        path.rename(path.with_name(f"pat1_slice2{channel}.nii.gz"))
    cases = ["--train_cases", "pat1", "pat1_slice2", "--test_cases", "pat0"]
    assert run_prepare(root, output, *cases) == 0
    slices = sorted(path.name for path in (output / "train_npz").iterdir())
    # pat1 is prepared again; its partial file was left by a killed run and is deleted.
    (output / ".done" / "pat1.json").unlink()
    (output / "train_npz" / ".7-0a1b.partial.pat1_slice000.npz").touch()
    # Another process is writing this slice of another case: it stays.
    (output / "train_npz" / ".7-0a1b.partial.pat1_slice2_slice000.npz").touch()
    assert run_prepare(root, output, *cases) == 0
    left = sorted(path.name for path in (output / "train_npz").iterdir())
    assert left == [".7-0a1b.partial.pat1_slice2_slice000.npz", *slices] and len(slices) == 8


def gradient(largest: float, kind: type = np.uint16, side: int = 16) -> np.ndarray:
    """Return a picture with values from 0 to `largest`."""
    return np.linspace(0, largest, side * side).reshape(side, side).astype(kind)


def test_pictures_of_fractions_are_refused_unless_scaled_by_their_own_values(
    tmp_path: Path, capfd: ERRORS
):
    pictures = {name: gradient(1, np.float32) for name in "abc"}
    root, output = write_pictures(tmp_path / "raw", pictures, ".tif"), tmp_path / "data"
    told = refused(root, output, capfd)
    assert "a.tif, b.tif, c.tif" in told and "export them with 8 or 16 bits" in told
    assert run_prepare(root, output, "--intensity", "mr") == 0
    spec = stored_spec(output)
    assert spec.is_pictures and spec.intensity == MR
    with pytest.raises(InputError, match="fractions"):
        PICTURE.limits(gradient(1, np.float32), "new.tif")


def test_twelve_bits_in_sixteen(tmp_path: Path, capfd: ERRORS):
    root = write_pictures(tmp_path / "raw", {name: gradient(4095) for name in "abc"})
    assert run_prepare(root, tmp_path / "dark") == 0
    assert "is 4095 of 65535" in (told := capfd.readouterr().err) and "--window 0 4095" in told
    assert run_prepare(root, tmp_path / "data", "--window", "0", "4095", "--test_cases", "c") == 0
    assert "of 65535" not in capfd.readouterr().err
    spec = stored_spec(tmp_path / "data")
    assert spec.is_pictures and spec.intensity == Intensity(RANGE, 0, 4095)
    slices = load_arrays(tmp_path / "data" / "train_npz" / "a_slice000.npz", ("image",))
    assert slices["image"].max() == 1
    # Brighter pictures are clipped.
    assert spec.intensity.limits(gradient(5000), "brighter.png") == (0, 4095)
    with pytest.raises(InputError, match="8 bits"):
        spec.intensity.limits(gradient(255, np.uint8), "other.png")


def test_a_window_of_pictures_is_one_of_grey_values(tmp_path: Path):
    root = write_pictures(tmp_path / "raw", {name: gradient(255, np.uint8) for name in "abc"})
    assert run_prepare(root, tmp_path / "data", "--window", "30", "200") == 0
    spec = stored_spec(tmp_path / "data")
    assert spec.is_pictures and spec.intensity == Intensity(RANGE, 30, 200)
    with pytest.raises(InputError, match=r"expected 0…255"):
        spec.intensity.limits(gradient(4095), "other.png")


def test_older_specs_show_by_their_intensity_rule_that_they_are_of_pictures():
    spec = replace(SYNAPSE, intensity=PICTURE)
    assert spec.is_pictures and not SYNAPSE.is_pictures and "pictures" not in spec.to_json()
    assert not spec_from_json(replace(spec, pictures=False).to_json(), "spec").is_pictures


NOT_HU = {
    "fractions": gradient(1, np.float32),
    "8 bits": gradient(255, np.uint8),
    "an offset of 1024": gradient(3000),
    "MR": gradient(900) - 40.0,
    "thousandths": gradient(4, np.float32) - 1,
}


@pytest.mark.parametrize("name", NOT_HU)
def test_values_unlike_hu_are_refused_unless_the_user_confirms_them(name: str, capfd: ERRORS):
    with pytest.raises(InputError, match="do not look like Hounsfield units"):
        CT.limits(NOT_HU[name], name)
    sure = replace(CT, sure=True)
    assert sure.limits(NOT_HU[name], name) == (-125, 275)
    assert f"warning: {name} holds" in capfd.readouterr().err
    assert spec_from_json(replace(SYNAPSE, intensity=sure).to_json(), "spec").intensity == sure


def test_cropped_ct_and_a_wide_window_are_accepted(capfd: ERRORS):
    assert CT.limits(gradient(400) - 100.0, "crop") == (-125, 275)
    wide = Intensity(WINDOW, -1024, 300)
    assert wide.limits(gradient(2000) - 1000.0, "scan") == (-1024, 300)
    assert capfd.readouterr().err == ""
    for values in (gradient(100) - 1000.0, gradient(100) + 300.0):
        with pytest.raises(InputError):  # the window shows nothing of these values
            replace(CT, sure=True).limits(values, "scan")


def test_flags_confirm_that_values_are_hu(tmp_path: Path, capfd: ERRORS):
    told = NNUNET | {"channel_names": {"0": "CT"}}
    root = write_set(tmp_path / "raw", told, low=-20)
    assert run_prepare(root, tmp_path / "no") == 2
    assert "--intensity ct" in capfd.readouterr().err
    for flags in (("--intensity", "ct"), ("--window", "-125", "275")):
        output = tmp_path / flags[0]
        assert run_prepare(root, output, *flags) == 0
        assert stored_spec(output).intensity == replace(CT, sure=True)


def test_an_unusual_file_name_does_not_split_scans(tmp_path: Path, capfd: ERRORS):
    names = [f"{scan}_{number}" for scan in "abc" for number in (1, 2)]
    pictures = {name: gradient(255, np.uint8) for name in (*names, "cover", "a")}
    root, output = write_pictures(tmp_path / "raw", pictures), tmp_path / "data"
    assert run_prepare(root, output, "--test_cases", "c", "cover") == 0
    assert "no number at the end of their name, so each is a case: cover" in capfd.readouterr().err
    assert cases_of(output, "train") == {"a", "b"}
    assert cases_of(output, "test_vol") == {"c", "cover"}
    slices = {path.stem for path in (output / "train_npz").iterdir()}
    assert slices == {"a_slice", "a_slice1", "a_slice2", "b_slice1", "b_slice2"}
    write_pictures(root, {"b_slice1": gradient(255, np.uint8)})
    assert "b_1.png and b_slice1.png" in refused(root, tmp_path / "new", capfd)


BAD_NAMES = {
    "empty": "",
    "zero byte": "a\0",
    "quotes": 'the "liver"',
    "two lines": "a\nb",
    "long": 300 * "a",
    "blank at the end": "liver ",
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_class_names_that_no_table_can_store(tmp_path: Path, capfd: ERRORS, name: str):
    wrong = BAD_NAMES[name]
    labels = {"background": 0, wrong: 1, "tumour": 5}
    root = write_set(tmp_path / "raw", NNUNET | {"labels": labels})
    assert "dataset.json has the class name" in refused(root, tmp_path / "data", capfd)
    (root / "dataset.json").unlink()
    told = refused(root, tmp_path / "data", capfd, "--class_names", "liver", wrong)
    assert "--class_names has the class name" in told
    spec = replace(SYNAPSE, class_names=(wrong, *SYNAPSE.class_names[1:]))
    with pytest.raises(InputError, match="adapter has the class name"):
        spec_from_json(spec.to_json(), "adapter")


def test_a_class_name_that_is_there_twice(tmp_path: Path, capfd: ERRORS):
    root = write_set(tmp_path / "raw", None)
    told = refused(root, tmp_path / "data", capfd, "--class_names", "a", "a")
    assert "--class_names has the class name 'a' twice" in told


def test_an_infinite_label_value(tmp_path: Path, capfd: ERRORS):
    root = write_set(tmp_path / "raw", NNUNET)
    text = json.dumps(NNUNET).replace('"liver": 1', '"liver": 1e999')
    (root / "dataset.json").write_text(text)
    assert "1e999 is no finite number" in refused(root, tmp_path / "data", capfd)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path):
    root, output = write_set(tmp_path / "raw", None), tmp_path / "data"
    (root / "dataset.json").write_text(json.dumps(NNUNET), encoding="utf-8-sig")
    assert run_prepare(root, output) == 0
    for path in (output / "dataset_spec.json", output / "lists" / "train.txt"):
        path.write_text(path.read_text("utf-8"), encoding="utf-8-sig")
    assert stored_spec(output).class_names == ("liver", "tumour")
    Synapse_dataset(output, None, "train", num_classes=2).check()


IN_VAIN = {
    "class names": ("described", ("--class_names", "a", "b"), "dataset.json defines"),
    "a data set": ("described", ("--dataset", "bogus"), "dataset.json defines"),
    "BTCV's class names": ("btcv", ("--class_names", "a"), "are known"),
    "BTCV's channel": ("btcv", ("--channel", "1"), "are known"),
    "BTCV's name": ("btcv", ("--name", "mine"), "are known"),
    "a channel of 3-D files": ("plain", ("--channel", "1"), "holds only channel 0"),
    "a channel of pictures": ("pictures", ("--channel", "1"), "holds only channel 0"),
}


@pytest.mark.parametrize("name", IN_VAIN)
def test_flags_without_effect_are_refused(tmp_path: Path, capfd: ERRORS, name: str):
    layout, flags, told = IN_VAIN[name]
    root = tmp_path / "raw"
    if layout == "pictures":
        write_pictures(root, {"a": gradient(255, np.uint8), "b": gradient(255, np.uint8)})
    elif layout == "btcv":
        write_set(root, None, ("img", "label"), channel="", cases=2)
        for path in list(root.glob("*/*")):
            path.rename(path.with_name(path.name.replace("pat", path.parent.name)))
    else:
        write_set(root, NNUNET if layout == "described" else None, channel="", cases=2)
    problems = refused(root, tmp_path / "data", capfd, *flags)
    assert told in problems and flags[0] in problems


def test_a_label_on_the_images_grid_with_other_axes_is_reoriented(tmp_path: Path):
    """DICOM with labels from dcm2niix is an example: the same voxels in another order."""
    image, label = scan(0)
    root = tmp_path / "raw"
    for index, letters in enumerate(("LPS", "RAS", "SAL", "AIR")):
        geometry = placed("LPS")
        there = reorient_geometry(geometry, label.shape, letters)
        reordered = np.ascontiguousarray(reorient(label, "LPS", letters))
        write_dicom(root / "images" / f"a{index}", image, geometry)
        write_volume(root / "labels" / f"a{index}.nii.gz", reordered, there)
    flags = ("--train_cases", "a0", "--test_cases", "a0", "a1", "a2", "a3")
    assert run_prepare(root, tmp_path / "data", *flags) == 0
    for path in (tmp_path / "data" / "test_vol_h5").iterdir():
        with h5py.File(path) as file:
            assert np.array_equal(file["label"][()], np.searchsorted([0, 1, 5], label))


def test_a_label_off_the_images_grid_is_refused(tmp_path: Path, capfd: ERRORS):
    image, label = scan(0)
    geometry = placed("LPS")
    there = reorient_geometry(geometry, label.shape, "RAS")
    there = replace(there, origin=(there.origin[0] + 1, *there.origin[1:]))
    write_volume(tmp_path / "raw" / "images" / "a.nii.gz", image, geometry)
    write_volume(tmp_path / "raw" / "labels" / "a.nii.gz", label, there)
    flags = ("--train_cases", "a", "--test_cases", "a")
    told = refused(tmp_path / "raw", tmp_path / "data", capfd, *flags)
    assert "differ in origin" in told and "on the image's grid" in told


@pytest.mark.parametrize("inside", ["imagesTr", "labelsTr/new"])
def test_the_output_may_not_lie_in_a_folder_that_is_read(
    tmp_path: Path, capfd: ERRORS, inside: str
):
    root = write_set(tmp_path / "raw", NNUNET)
    before = sorted(root.rglob("*"))
    assert "which holds input scans" in refused(root, root / inside, capfd)
    assert sorted(root.rglob("*")) == before
    assert run_prepare(root, root / "prepared") == 0


DIFFERENT_PREPARATION = {
    "limits": ({"intensity": Intensity(WINDOW, -100, 200)}, "HU -100…200"),
    "rule": ({"intensity": MR}, "percentiles"),
    "orientation": ({"orientation": "RAS"}, "orientation RAS and LPS"),
    "colour": ({"channels": 3}, "colour channels 3 and 1"),
    "channel": ({"channel": 2}, "channel 2 and 1"),
    "unknown": ({"orientation": None, "channel": None}, ""),
    "vouched for": ({"intensity": replace(CT, sure=True), "size": 64, "name": "other"}, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT_PREPARATION)
def test_data_prepared_differently_from_the_training_data(tmp_path: Path, name: str):
    changes, told = DIFFERENT_PREPARATION[name]
    trained = replace(SYNAPSE, orientation="LPS", channel=1)
    settings = {"num_classes": 8, "class_names": list(trained.class_names)}
    model = tiny_model(num_classes=8)
    model.save_lora_parameters(tmp_path / "with_spec.pth", settings | {"spec": trained.to_json()})
    model.save_lora_parameters(tmp_path / "published.pth", settings)
    (tmp_path / "data").mkdir()
    prepared = replace(trained, **changes)
    (tmp_path / "data" / "dataset_spec.json").write_text(json.dumps(prepared.to_json()))
    flags = ["--volume_path", str(tmp_path / "data"), *TINY_FLAGS[:2]]
    with_spec = [*flags, "--lora_ckpt", str(tmp_path / "with_spec.pth")]
    if told:
        with pytest.raises(InputError, match="differ in") as caught:
            parse_args(evaluation_parser(), with_spec)
        assert told in str(caught.value)
    else:
        assert dataset_spec(parse_args(evaluation_parser(), with_spec)) == trained
    (tmp_path / "elsewhere").mkdir()  # a folder without a spec
    elsewhere = [*with_spec, "--volume_path", str(tmp_path / "elsewhere")]
    assert dataset_spec(parse_args(evaluation_parser(), elsewhere)) == trained
    published = [*flags, "--lora_ckpt", str(tmp_path / "published.pth")]
    assert dataset_spec(parse_args(evaluation_parser(), published)) == prepared
