"""`--input_slices 3`: a slice between its neighbours, the same in training, test and predict."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, tiny_model, write_slices
from test_scans import placed

import predict
import test as test_program
import train
from common.errors import InputError
from config.settings import complete
from datasets.augmentation import Augmentation
from datasets.dataset_synapse import Synapse_dataset
from datasets.neighbours import BetweenNeighbours, network_slices, slices_around
from datasets.scans.volumes import read_volume, write_volume
from evaluation.predict_volume import predict_volume
from prediction import segmenting
from preprocess import prepare
from training import validation
from training.batches import augmented_batch, make_loader, seen_slices
from training.validation import hold_out, training_data, validate


def write_numbered(folder: Path, cases: dict[str, list[int]], size: int = 16) -> Path:
    """Write slices whose image holds the number of the slice, in hundredths."""
    (folder / "train_npz").mkdir(parents=True)
    (folder / "lists").mkdir()
    names = []
    for case, numbers in cases.items():
        for number in numbers:
            names.append(f"{case}_slice{number:03d}")
            image = np.full((size, size), number / 100, np.float32)
            np.savez(folder / "train_npz" / f"{names[-1]}.npz", image=image, label=image * 0)
    (folder / "lists" / "train.txt").write_text("".join(f"{name}\n" for name in names[::-1]))
    return folder


def channels(dataset: Synapse_dataset) -> dict[str, list[int]]:
    """The numbers of the slices in the three channels of each sample."""
    samples = [dataset[index] for index in range(len(dataset))]
    assert all(sample["image"].shape[0] == 3 for sample in samples)
    return {
        s["case_name"]: (s["image"][:, 0, 0] * 100).round().astype(int).tolist() for s in samples
    }


def test_the_channels_are_the_slice_before_the_slice_and_the_slice_after(tmp_path: Path):
    cases = {"case0005": [8, 9, 10, 11], "case0006": [9], "patient1_frame01": [0, 1]}
    plain = Synapse_dataset(write_numbered(tmp_path, cases), None, "train")
    dataset = plain.between_neighbours()
    expected = {
        "case0005_slice008": [8, 8, 9],
        "case0005_slice009": [8, 9, 10],
        "case0005_slice010": [9, 10, 11],
        "case0005_slice011": [10, 11, 11],
        "case0006_slice009": [9, 9, 9],
        "patient1_frame01_slice000": [0, 0, 1],
        "patient1_frame01_slice001": [0, 1, 1],
    }
    assert channels(dataset) == expected
    assert dataset.between_neighbours() is dataset
    part = dataset.subset([3, 0])
    assert channels(part) == {name: expected[name] for name in part.sample_list}
    # the raw slice stays what the data set reads and checks, and the first data set stays plain
    assert dataset.read(2)["image"].shape == plain[2]["image"].shape == (16, 16)
    assert dataset.check() == plain.check()


def test_slices_without_a_neighbour_in_the_list_stand_in_for_it_and_are_counted(
    capsys: pytest.CaptureFixture,
):
    names = [f"a_slice{number}" for number in (0, 2, 3, 9)]
    around = slices_around(names, "train.txt")
    assert around == {
        "a_slice0": ("a_slice0", "a_slice0"),
        "a_slice2": ("a_slice2", "a_slice3"),
        "a_slice3": ("a_slice2", "a_slice3"),
        "a_slice9": ("a_slice9", "a_slice9"),
    }
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and "4 of 4 slices lack a neighbour inside" in told
    slices_around(["a_slice_7", "a_slice_8", "b_slice_1"], "train.txt")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["p1", "case_slice1"], "1 slices without a number"),
        (["case_slice1", "case_slice001"], "the same slice"),
    ],
)
def test_names_that_tell_no_neighbours_are_refused(names: list[str], told: str):
    with pytest.raises(InputError, match=told):
        slices_around(names, "train.txt")


def test_neighbours_of_another_size_and_in_colour_are_refused(tmp_path: Path):
    folder = write_numbered(tmp_path, {"a": [0, 1], "b": [0, 1]})
    dataset = Synapse_dataset(folder, None, "train").between_neighbours()
    path = folder / "train_npz" / "b_slice001.npz"
    np.savez(path, image=np.zeros((16, 8), np.float32), label=np.zeros((16, 8)))
    for read in (dataset.check, lambda: channels(dataset)):
        with pytest.raises(InputError, match=r"b_slice00\d.* differ in size"):
            read()
    np.savez(path, image=np.zeros((3, 16, 16), np.float32), label=np.zeros((16, 16)))
    for read in (dataset.check, lambda: channels(dataset)):
        with pytest.raises(InputError, match=r"colour|differ in size"):
            read()


@pytest.mark.parametrize("depth", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 2, 3, 12])
def test_a_view_of_a_volume_gives_the_same_channels(depth: int, batch: int):
    volume = np.random.default_rng(0).random((depth, 4, 5), dtype=np.float32)
    view = BetweenNeighbours(volume)
    edges = np.concatenate([volume[:1], volume, volume[-1:]])
    expected = np.stack([edges[:-2], volume, edges[2:]], axis=1)
    assert view.shape == expected.shape
    found = [view[start : start + batch] for start in range(0, depth, batch)]
    assert np.array_equal(np.concatenate(found), expected)


def test_a_view_reads_only_the_slices_that_it_needs():
    class Lazy:
        shape, read = (30, 4, 5), []

        def __getitem__(self, part: slice) -> np.ndarray:
            self.read.append((part.start, part.stop))
            return np.zeros((30, 4, 5), np.float32)[part]

    view = network_slices(Lazy(), 3, "scan")
    assert view[10:12].shape == (2, 3, 4, 5)
    assert view[28:40].shape == (2, 3, 4, 5)
    assert Lazy.read == [(9, 13), (27, 30)]
    assert network_slices(lazy := Lazy(), 1, "scan") is lazy
    with pytest.raises(InputError, match="scan is in colour"):
        network_slices(np.zeros((2, 3, 4, 5)), 3, "scan")


@pytest.mark.parametrize("flips", [(), (0, 1)])
@torch.no_grad()
def test_validation_and_volumes_see_the_same_images(flips: tuple, tmp_path: Path):
    folder = write_slices(tmp_path, count=5)
    dataset = Synapse_dataset(folder, None, "train").between_neighbours()
    volume = np.stack([dataset.read(index)["image"] for index in range(5)])
    stacked = np.stack([dataset[index]["image"] for index in range(5)])
    model = tiny_model(num_classes=8).eval()
    probabilities: list[list[torch.Tensor]] = []
    for images in (stacked, network_slices(volume, 3, "volume"), volume):
        probabilities.append([])
        predict_volume(
            model,
            images,
            input_size=(40, 40),
            image_size=(64, 64),
            flips=flips,
            on_probabilities=lambda start, part: probabilities[-1].append(part.clone()),
        )
    ours, theirs, single = (torch.cat(part) for part in probabilities)
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, single, atol=1e-4)


def args_for(folder: Path, **changes: object) -> argparse.Namespace:
    known = {"root_path": str(folder), "img_size": 32, "input_slices": 3, "seed": 3}
    return complete(argparse.Namespace(**known | {"batch_size": 3, "n_gpu": 1} | changes))


def test_workers_give_the_batches_of_one_process_and_all_channels_move_together(tmp_path: Path):
    folder = write_slices(tmp_path, count=6)
    args = args_for(folder)
    dataset = seen_slices(Synapse_dataset(folder, None, "train"), args)
    device, found = torch.device("cpu"), []
    for workers in (0, 2):
        args.num_workers = workers
        batches = list(make_loader(dataset, args, device))
        found.append([augmented_batch(raw, 0, args, 8, device) for raw in batches])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one["image"], two["image"]) and one["image"].shape[1] == 3
        assert torch.equal(one["low_res_label"], two["low_res_label"])
    turn = Augmentation(quarter_turns=1, flip_axis=0)
    stacked = torch.from_numpy(dataset[2]["image"])
    for channel, moved in zip(stacked, turn.image(stacked), strict=True):
        assert torch.equal(moved, turn(channel))


def test_held_out_cases_see_their_neighbours_once(tmp_path: Path):
    folder = write_slices(tmp_path, count=3, cases=3)
    args = args_for(folder, val_every=1, val_cases=1)
    left, held_out = training_data(args, Synapse_dataset(folder, None, "train"))
    (case,) = held_out.values()
    assert left[0]["image"].shape == case[0]["image"].shape == (3, 40, 40)
    assert np.array_equal(case[1]["image"][0], case.read(0)["image"])
    model = tiny_model(num_classes=8)
    found = validate(model, held_out, num_classes=8, img_size=64)
    _, again = hold_out(Synapse_dataset(folder, None, "train").between_neighbours(), 1, args.seed)
    assert found == validate(model, again, num_classes=8, img_size=64)


def test_a_script_whose_slices_do_not_fit_its_flag_is_told(tmp_path: Path):
    dataset = Synapse_dataset(write_slices(tmp_path), None, "train").between_neighbours()
    with pytest.raises(InputError, match="pass --input_slices 3"):
        seen_slices(dataset, args_for(tmp_path, input_slices=1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw scans, the data prepared from them, and a run of `--input_slices 3`."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    for index in range(3):
        image = rng.integers(-150, 300, (5, 20, 24)).astype(np.int16)
        label = rng.integers(0, 3, image.shape).astype(np.uint8)
        write_volume(folder / f"raw/imagesTr/s{index}_0000.nii.gz", image, placed("RAI"))
        write_volume(folder / f"raw/labelsTr/s{index}.nii.gz", label, placed("RAI"))
    told = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "tumour": 2}}
    told |= {"numTraining": 3, "name": "Tiny"}
    (folder / "raw" / "dataset.json").write_text(json.dumps(told))
    data = str(folder / "data")
    prepare.main(["--input", str(folder / "raw"), "--output", data, "--workers", "1"])
    recipe = ["--AdamW", "--base_lr", "0.01", "--batch_size", "3", "--max_iterations", "3"]
    recipe += ["--output", str(folder / "out"), "--name", "run", "--input_slices", "3"]
    train.main(["--root_path", data, *TINY_FLAGS, *recipe])
    return folder


@pytest.mark.slow
def test_train_test_and_predict_agree_without_naming_the_flag(
    trained: Path, monkeypatch: pytest.MonkeyPatch
):
    """The scan is stored from the other end than the training slices, so predict.py turns it."""
    monkeypatch.chdir(trained)
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def watched(net, volume, **settings):
        labels = predict_volume(net, volume, **settings)
        seen.append((np.asarray(volume[0 : volume.shape[0]]), labels))
        return labels

    for program in (test_program, segmenting, validation):
        monkeypatch.setattr(program, "predict_volume", watched)
    config = ["--config", "out/run", "--device", "cpu"]
    test_program.main([*config, "--volume_path", "data", "--is_savenii"])
    case = json.loads(Path("out/run/test/results.json").read_text())["cases"][0]["case"]
    ((tested, labels),) = seen[:1]
    assert tested.shape[1] == 3
    assert np.array_equal(tested[1:, 0], tested[:-1, 1]) and np.array_equal(
        tested[0, 0], tested[0, 1]
    )

    raw = f"raw/imagesTr/{case}_0000.nii.gz"
    predict.main([*config, "--input", raw, "--output", "predicted"])
    assert np.array_equal(seen[-1][0], tested) and np.array_equal(seen[-1][1], labels)
    written, _ = read_volume(next(Path("predicted").glob("*.nii.gz")))
    saved, _ = read_volume(f"out/run/test/predictions/{case}_pred.nii.gz")
    assert np.array_equal(written, saved)

    # Axis z of the scan runs down and that of the slices up: "before" is below.
    stored, _ = read_volume(raw)
    below = stored[::-1, ::-1, ::-1][2]
    assert np.corrcoef(tested[3, 0].ravel(), below.clip(-125, 275).ravel())[0, 1] > 0.999

    # a training slice sees the same as the slice of its volume
    slices = Synapse_dataset("data", None, "train").between_neighbours()
    first = slices.sample_list[2]
    scan = f"raw/imagesTr/{first.rsplit('_slice', 1)[0]}_0000.nii.gz"
    predict.main([*config, "--input", scan, "--output", "again"])
    sample = slices[2]["image"]
    assert np.allclose(sample, seen[-1][0][int(first[-3:])], atol=1e-6)


@pytest.mark.slow
def test_the_adapter_records_the_flag(trained: Path):
    settings = torch.load(trained / "out/run/epoch_0.pth", weights_only=True)["samed_settings"]
    assert settings["input_slices"] == 3
