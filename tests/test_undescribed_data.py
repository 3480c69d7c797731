"""Prepared data that say nothing of themselves: what was trained on is measured, not assumed."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import TINY_FLAGS, tiny_model

import predict
import test as test_script
import train
from config.flags import test_parser as parser_of_test
from config.settings import complete, parse_args
from datasets.dataset_synapse import Synapse_dataset
from datasets.prepared_files import SampleFacts
from datasets.registry import SYNAPSE, undescribed
from datasets.scans.volumes import Geometry, write_volume
from datasets.trained_on import TrainedOn, check_test_data
from lora.adapter_file import read_adapter


def disc(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a slice with one bright disc, and its label."""
    y, x = np.mgrid[:side, :side] / side
    row, column = rng.uniform(0.4, 0.6, 2)
    label = ((y - row) ** 2 + (x - column) ** 2 < 0.04).astype(np.uint8)
    return (0.2 + 0.6 * label + rng.normal(0, 0.02, label.shape)).astype(np.float32), label


def write_data(folder: Path, side: int, cases: tuple[str, ...] = ("p1", "p2", "p3")) -> Path:
    """Write training slices of all cases but the last, and a volume of the last, without a spec."""
    rng = np.random.default_rng(0)
    for name in ("train_npz", "test_vol_h5", "lists"):
        (folder / name).mkdir(parents=True)
    names = []
    for case in cases[:-1]:
        for index in range(4):
            names.append(f"{case}_slice{index:03d}")
            image, label = disc(rng, side)
            np.savez(folder / f"train_npz/{names[-1]}.npz", image=image, label=label)
    (folder / "lists/train.txt").write_text("\n".join(names))
    write_test_volume(folder, cases[-1], [disc(rng, side) for _ in range(3)])
    return folder


def write_test_volume(folder: Path, case: str, slices: list[tuple[np.ndarray, np.ndarray]]) -> None:
    (folder / "lists/test_vol.txt").write_text(case)
    with h5py.File(folder / f"test_vol_h5/{case}.npy.h5", "w") as file:
        file["image"], file["label"] = (np.stack(arrays) for arrays in zip(*slices, strict=True))


def trained(data: Path, *flags: str) -> Path:
    """Train for two steps; return the run folder."""
    output = data.parent / "runs"
    steps = ["--batch_size", "4", "--max_epochs", "1", "--stop_epoch", "1", *flags]
    given = ["--root_path", str(data), "--output", str(output), "--name", "one"]
    train.main([*given, *TINY_FLAGS, *steps])
    return output / "one"


def facts(name: str, shape: tuple[int, ...], low=0.0, high=1.0, voxels=(9, 1)) -> SampleFacts:
    return SampleFacts(name, shape, colour=False, low=low, high=high, voxels=voxels, digest="")


def test_the_size_range_and_classes_of_the_slices_are_recorded_and_used(tmp_path: Path):
    data = write_data(tmp_path / "ACDC", side=80)
    run = trained(data, "--num_classes", "1")
    adapter = run / "epoch_0.pth"
    settings = read_adapter(adapter)[1]
    found = TrainedOn.from_json(settings["trained_on"])
    images = [np.load(path) for path in sorted((data / "train_npz").iterdir())]
    assert found.cases == ("p1", "p2") and found.sizes == ((80, 80),)
    assert found.low == min(float(file["image"].min()) for file in images)
    assert found.high == max(float(file["image"].max()) for file in images)
    assert found.voxels[1] == sum(int(file["label"].sum()) for file in images)
    assert settings["spec"]["name"] == "ACDC" and settings["class_names"] == ["class 1"]
    assert json.loads((run / "config.json").read_text())["trained_on"] == settings["trained_on"]
    # 80 px, not Synapse's 224: the slices reach the network as they did in training.
    for argv in (["--config", str(run)], ["--lora_ckpt", str(adapter), "--ckpt", "none"]):
        assert parse_args(parser_of_test(), argv).input_size == 80


def test_published_names_are_synapse_at_the_size_that_they_have(tmp_path: Path):
    cases = ("case0005", "case0006", "case0001")
    run = trained(write_data(tmp_path / "own", side=64, cases=cases))
    args = parse_args(parser_of_test(), ["--config", str(run)])
    assert args.spec["name"] == "Synapse" and args.spec["intensity"]["low"] == -125
    assert args.input_size == 64
    assert undescribed("own", SYNAPSE.train_cases) == SYNAPSE  # and 224 as published


def test_published_names_with_other_classes_are_not_synapse(tmp_path: Path):
    data = write_data(tmp_path / "own", side=64, cases=("case0005", "case0006"))
    args = parse_args(parser_of_test(), ["--config", str(trained(data, "--num_classes", "1"))])
    assert args.spec["name"] == "own" and args.spec["intensity"]["rule"] == "unknown"


def test_predict_needs_to_be_told_how_unknown_intensities_were_scaled(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    run = trained(write_data(tmp_path / "ACDC", side=64), "--num_classes", "1")
    scan = tmp_path / "scan.nii.gz"
    values = np.random.default_rng(0).integers(-900, 900, (2, 32, 32)).astype(np.int16)
    write_volume(scan, values, Geometry.unknown())
    given = ["--input", str(scan), "--output", str(tmp_path / "out"), "--config", str(run)]
    with pytest.raises(SystemExit):
        predict.main(given)
    assert "pass --intensity" in capsys.readouterr().err
    predict.main([*given, "--intensity", "ct", "--window", "-500", "500"])
    record = json.loads((tmp_path / "out/predictions.json").read_text())
    assert record["flags"]["spec"]["intensity"]["low"] == -500


def test_volumes_stored_as_row_column_slice_are_refused(tmp_path: Path, capsys):
    data = write_data(tmp_path / "ACDC", side=64)
    run = trained(data, "--num_classes", "1")
    rng = np.random.default_rng(1)
    image, label = (
        np.stack(a, axis=-1) for a in zip(*[disc(rng, 64) for _ in range(6)], strict=True)
    )
    write_test_volume(data, "p9", list(zip(image, label, strict=True)))
    with pytest.raises(
        ValueError, match=r"p9 has the shape \(64, 64, 6\).*transpose it to \(6, 64, 64\)"
    ):
        test_script.main(["--config", str(run), "--volume_path", str(data)])


SQUARE = TrainedOn(("a",), ((64, 64),), low=0.0, high=1.0, voxels=(9, 1, 0))


@pytest.mark.parametrize(
    ("volume", "told"),
    [
        (facts("v", (6, 64, 64)), None),
        (facts("v", (96, 96, 80)), None),
        (facts("v", (6, 128, 80)), "order of their axes"),
        (facts("v", (64, 64, 54)), "order of their axes"),  # perhaps (row, column, slice)
        (facts("v", (6, 64, 64), high=1 / 255), "prepare both in the same way"),
        (facts("v", (6, 64, 64), low=-0.9), "prepare both in the same way"),
        (facts("v", (6, 64, 64), low=0.5), "leave out one end"),  # trained in -1…1, tested in 0…1
        (facts("v", (6, 64, 64), voxels=(9, 1, 3)), "no training slice had stomach"),
    ],
)
def test_other_shapes_ranges_and_classes_are_warned_of(volume: SampleFacts, told: str | None):
    found = check_test_data([volume], SQUARE, ["liver", "stomach"])
    assert (told is None and not found) or (len(found) == 1 and told in found[0])


def test_long_slices_are_right_where_the_training_slices_were_long(tmp_path: Path):
    long = TrainedOn(("a",), ((300, 100), (64, 64)), low=0.0, high=1.0, voxels=(9, 1))
    assert check_test_data([facts("v", (7, 310, 100))], long, ["liver"]) == []
    # Nothing is recorded in published adapters; a picture may have any shape.
    assert check_test_data([facts("v", (147, 512, 512))], None, ["liver"]) == []
    assert len(check_test_data([facts("v", (1, 300, 100))], None, ["liver"])) == 1


@pytest.mark.parametrize(
    "wrong", [None, {}, [], {"cases": 3}, SQUARE.to_json() | {"sizes": [[0, 4]]}]
)
def test_what_is_not_of_the_recorded_form_counts_as_unknown(wrong):
    assert TrainedOn.from_json(wrong) is None
    assert TrainedOn.from_json(json.loads(json.dumps(SQUARE.to_json()))) == SQUARE


def write_ssl4mis(root: Path) -> Path:
    """Write ACDC as SSL4MIS prepares it: `data/slices/*.h5`, `data/*.h5`, lists in the folder."""
    rng = np.random.default_rng(0)
    (root / "data/slices").mkdir(parents=True)
    names = [f"patient{p:03}_frame01_slice_{k}" for p in (1, 2) for k in (1, 2, 10)]
    for name in names:
        with h5py.File(root / f"data/slices/{name}.h5", "w") as file:
            file["image"], file["label"] = disc(rng, 64)
    (root / "train_slices.list").write_text("\n".join(names) + "\n")
    with h5py.File(root / "data/patient003_frame01.h5", "w") as file:
        slices = [disc(rng, 64) for _ in range(3)]
        file["image"], file["label"] = (np.stack(a) for a in zip(*slices, strict=True))
    (root / "test.list").write_text("patient003_frame01\n")
    return root


def test_slices_and_volumes_as_ssl4mis_prepares_acdc(tmp_path: Path):
    data = write_ssl4mis(tmp_path / "ACDC")
    slices = Synapse_dataset(data, None, "train", num_classes=3)
    with h5py.File(data / "data/slices/patient002_frame01_slice_10.h5") as file:
        index = slices.sample_list.index("patient002_frame01_slice_10")
        assert (slices[index]["image"] == file["image"][()]).all()
        assert (slices[index]["label"] == file["label"][()]).all()
    run = trained(data, "--num_classes", "3")
    assert read_adapter(run / "epoch_0.pth")[1]["trained_on"]["cases"] == [
        "patient001_frame01",
        "patient002_frame01",
    ]
    test_script.main(["--config", str(run), "--volume_path", str(data)])
    results = json.loads((run / "test/results.json").read_text())
    assert [case["case"] for case in results["cases"]] == ["patient003_frame01"]


def test_names_in_a_list_may_have_the_suffix_of_their_files(tmp_path: Path):
    data = write_data(tmp_path / "own", side=64)
    names = Synapse_dataset(data, None, "train").sample_list
    (data / "lists/train.txt").write_text("\n".join(f"{name}.npz" for name in names))
    assert Synapse_dataset(data, None, "train").sample_list == names
    (data / "lists/test_vol.txt").write_text("p3.npy.h5")
    assert Synapse_dataset(data, None, "test_vol")[0]["case_name"] == "p3"


def test_an_adapter_without_a_record_is_tested_at_the_size_of_the_original(tmp_path: Path, capsys):
    """Whatever the number of classes, and whether it is passed or not."""
    adapter = tmp_path / "epoch_159.pth"
    for classes, warned in ((8, False), (3, True)):
        tiny_model(num_classes=classes).save_lora_parameters(adapter)
        for flags in ([], ["--num_classes", str(classes)])[classes != 8 :]:
            args = parse_args(parser_of_test(), ["--lora_ckpt", str(adapter), *flags])
            assert args.input_size == 224
            assert ("pass --input_size" in capsys.readouterr().err) == warned
        given = ["--lora_ckpt", str(adapter), "--num_classes", str(classes), "--input_size", "320"]
        assert parse_args(parser_of_test(), given).input_size == 320
        assert capsys.readouterr().err == ""


def test_scripts_of_the_original_record_what_they_train_on(tmp_path: Path):
    """They say dataset="Synapse" of all data; the data show whether they are."""
    for name, cases, expected in (
        ("ACDC", ("p1", "p2"), "ACDC"),
        ("own", ("case0005", "case0001"), "Synapse"),
    ):
        data = write_data(tmp_path / name, side=64, cases=cases)
        args = complete(Namespace(root_path=str(data), dataset="Synapse", num_classes=8))
        assert args.spec["name"] == expected
        assert (args.spec["intensity"]["rule"] == "window") == (expected == "Synapse")


def test_the_cases_of_the_adapter_to_start_from_count_as_trained_on(tmp_path: Path):
    first = trained(write_data(tmp_path / "one", side=64, cases=("p1", "p2")), "--num_classes", "1")
    second = write_data(tmp_path / "two", side=64, cases=("q1", "q2"))
    start = ["--lora_ckpt", str(first / "epoch_0.pth"), "--name", "tuned"]
    run = trained(second, "--num_classes", "1", *start).parent / "tuned"
    assert read_adapter(run / "epoch_0.pth")[1]["trained_on"]["cases"] == ["p1", "q1"]
