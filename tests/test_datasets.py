"""Properties of reading, augmenting and resizing slices and volumes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import write_slices
from scipy import ndimage

from common.errors import InputError
from datasets.augmentation import Augmentation, draw_augmentation, keyed_rng, prepare_batch
from datasets.dataset_synapse import PUBLISHED_LISTS, RandomGenerator, Synapse_dataset, read_list
from datasets.registry import SYNAPSE
from datasets.resampling import resize_images, resize_labels
from distributed.ranks import Ranks
from training.batches import EpochBatches, collate_slices

SIZES = [
    ((512, 512), (224, 224)),
    ((224, 224), (512, 512)),
    ((480, 232), (224, 224)),
    ((41, 37), (64, 48)),
    ((1, 7), (5, 9)),
    ((7, 1), (3, 4)),
]


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_resizing_equals_scipy(source: tuple[int, int], target: tuple[int, int]):
    rng = np.random.default_rng(0)
    factors = (target[0] / source[0], target[1] / source[1])
    image = rng.random(source).astype(np.float32)
    label = rng.integers(0, 9, source).astype(np.uint8)
    resized = resize_images(torch.from_numpy(image), target).numpy()
    assert np.abs(resized - ndimage.zoom(image, factors, order=3)).max() <= 1e-5
    zoomed = ndimage.zoom(label, factors, order=0)
    assert np.array_equal(resize_labels(torch.from_numpy(label), target), zoomed)


def test_the_published_size_pair_leaves_the_last_row_and_column_zero():
    ones = torch.ones(512, 512)
    for resized in (resize_images(ones, (224, 224)), resize_labels(ones, (224, 224))):
        assert resized[-1].abs().max() == 0 and resized[:, -1].abs().max() == 0
        assert resized[:-1, :-1].min() > 0.99


def test_a_stack_is_resized_slice_by_slice():
    stack = torch.rand(2, 3, 20, 30)
    together = resize_images(stack, (12, 50))
    assert together.shape == (2, 3, 12, 50)
    assert torch.allclose(together[1, 2], resize_images(stack[1, 2], (12, 50)), atol=1e-6)


def test_choices_depend_on_seed_epoch_and_index_alone():
    draws = [draw_augmentation(keyed_rng(1, epoch, i)) for epoch in range(3) for i in range(40)]
    again = [draw_augmentation(keyed_rng(1, epoch, i)) for epoch in range(3) for i in range(40)]
    assert draws == again
    assert draws[:40] != draws[40:80]
    kinds = Counter(
        "rotated" if d.angle is not None else "turned" if d.flip_axis is not None else "none"
        for d in (draw_augmentation(keyed_rng(0, 0, i)) for i in range(2000))
    )
    assert 0.45 < kinds["turned"] / 2000 < 0.55 and 0.2 < kinds["rotated"] / 2000 < 0.3


def test_slices_of_mixed_sizes_make_one_batch():
    slices = [torch.rand(30, 20), torch.rand(16, 16), torch.rand(30, 20)]
    labels = [(image > 0.5).to(torch.uint8) for image in slices]
    choices = [Augmentation(1, 0), Augmentation(angle=7), Augmentation()]
    batch = prepare_batch(slices, labels, choices, output_size=(32, 32), low_res=(8, 8))
    for index in range(3):
        alone = prepare_batch(
            slices[index : index + 1],
            labels[index : index + 1],
            choices[index : index + 1],
            output_size=(32, 32),
            low_res=(8, 8),
        )
        assert torch.allclose(batch["image"][index], alone["image"][0], atol=1e-6)
        assert torch.equal(batch["low_res_label"][index], alone["low_res_label"][0])


@pytest.mark.parametrize(
    ("length", "batch", "count"), [(17, 4, 1), (17, 4, 2), (17, 4, 3), (5, 5, 7)]
)
def test_every_epoch_visits_every_slice_once_on_any_number_of_ranks(
    length: int, batch: int, count: int
):
    alone = EpochBatches(length, batch, seed=3)
    shares = [EpochBatches(length, batch, 3, Ranks(rank, count)) for rank in range(count)]
    orders = []
    for epoch in range(2):
        alone.enter(epoch, 0)
        steps = list(alone)
        assert len(steps) == len(alone) == -(-length // batch)
        assert [alone.step(epoch, number) for number in range(len(steps))] == steps
        orders.append([index for step in steps for index in step])
        assert sorted(orders[-1]) == list(range(length))
        for share in shares:
            share.enter(epoch, 0)
        for whole, parts in zip(steps, zip(*shares, strict=True), strict=True):
            assert [index for part in parts for index in part] == whole
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
        alone.enter(epoch, 2)
        assert list(alone) == steps[2:]
    assert length < 6 or orders[0] != orders[1]


def test_published_lists():
    slices = read_list(PUBLISHED_LISTS / "train.txt")
    assert len(slices) == 2211
    cases = list(dict.fromkeys(name.split("_")[0] for name in slices))
    assert cases == list(SYNAPSE.train_cases)
    per_case = Counter(name.split("_")[0] for name in slices)
    assert (per_case["case0040"], per_case["case0005"], per_case["case0027"]) == (195, 117, 88)
    tests = read_list(PUBLISHED_LISTS / "test_vol.txt")
    assert tests == list(SYNAPSE.test_cases)
    assert not set(SYNAPSE.train_cases) & set(SYNAPSE.test_cases)


def test_samples_have_the_form_that_older_scripts_read(tmp_path: Path):
    folder = write_slices(tmp_path)
    transform = RandomGenerator(output_size=[64, 64], low_res=[16, 16])
    dataset = Synapse_dataset(folder / "train_npz", folder / "lists", "train", transform)
    sample = dataset[2]
    assert sample["image"].shape == (3, 64, 64) and sample["image"].dtype == torch.float32
    assert sample["label"].shape == (64, 64) and sample["label"].dtype == torch.int64
    assert sample["low_res_label"].shape == (16, 16)
    assert sample["case_name"] == "case0005_slice002"
    assert not all(torch.equal(dataset[2]["image"], sample["image"]) for _ in range(8))
    keyed = RandomGenerator([64, 64], [16, 16], seed=5)
    raw = {"image": np.random.rand(40, 40).astype(np.float32), "index": 1}
    raw["label"] = (raw["image"] > 0.5).astype(np.uint8)
    assert torch.equal(keyed(raw)["image"], keyed(raw)["image"])


def test_raw_samples_are_stacked(tmp_path: Path):
    dataset = Synapse_dataset(write_slices(tmp_path), None, "train")
    batch = collate_slices([dataset[0], dataset[3]])
    assert batch["image"].shape == (2, 40, 40) and batch["label"].dtype == torch.uint8
    assert batch["index"] == [0, 3]
    dataset.check()


def change_slice(folder: Path, **arrays: np.ndarray) -> Path:
    """Overwrite arrays of the third slice; return its file."""
    path = folder / "train_npz" / "case0005_slice002.npz"
    with np.load(path) as archive:
        content = dict(archive) | arrays
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"label": np.full((40, 40), 255.0)}, r"label values 255, expected 0…8"),
        ({"label": np.full((40, 40), -1.0)}, r"label values -1"),
        ({"label": np.full((40, 40), 1.5)}, r"label values 1\.5"),
        ({"label": np.zeros((40, 41))}, r"image \(40, 40\) and a label \(40, 41\)"),
        ({"image": np.zeros((2, 40, 40), "f4"), "label": np.zeros((2, 40, 40))}, "2-D"),
        ({"image": np.full((40, 40), np.nan, "f4")}, "NaN"),
        ({"image": np.full((40, 40), np.inf, "f4")}, "infinite"),
        ({"image": np.full((40, 40), -1000.0, "f4")}, "raw HU"),
        ({"image": np.full((40, 40), 180.0, "f4")}, "raw HU"),
        ({"image": None}, "no array named image"),
        ({"image": np.array([["a"]])}, "image"),
        ({"image": np.array([{"a": 1}], dtype=object)}, "readable"),
        # Large ones are refused before they are read.
        ({"image": np.zeros((4300, 4300), "f4")}, r"image \(4300, 4300\) and a label \(40, 40\)"),
        ({"image": np.zeros((40, 40), "M8[s]")}, "type datetime64.*expected numbers"),
        ({"image": np.zeros((40, 40), [("r", "f4"), ("g", "f4")])}, "expected numbers"),
        ({"image": np.zeros((40, 40), complex)}, "type complex128, expected numbers"),
        ({"image": np.zeros(()), "label": np.zeros(())}, "2-D"),
        ({"image": np.zeros((0, 40)), "label": np.zeros((0, 40))}, "non-empty"),
        ({"label": np.full((40, 40), np.nan)}, "label values nan"),
        ({"label": np.full((40, 40), 2**63, "u8")}, "label values 9.22337e"),
    ],
)
def test_a_faulty_slice_is_named(arrays: dict, message: str, tmp_path: Path):
    path = change_slice(write_slices(tmp_path), **arrays)
    dataset = Synapse_dataset(tmp_path, None, "train", num_classes=8)
    with pytest.raises(InputError, match=message) as caught:
        dataset.check()
    assert str(path) in str(caught.value)


def test_a_truncated_slice_is_named(tmp_path: Path):
    write_slices(tmp_path)
    path = tmp_path / "train_npz" / "case0005_slice001.npz"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r"slice001\.npz is not a readable npz"):
        Synapse_dataset(tmp_path, None, "train").check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case0005_slice000\n../../etc/passwd\n", r"'\.\./\.\./etc/passwd'.*plain"),
        ("/etc/passwd\n", "plain"),
        ("", "empty"),
        ("case0005_slice000\ncase0005_slice000\n", "more than once"),
        (
            "".join(f"case0009_slice{i:03d}\n" for i in range(7)) + "case0005_slice000\n",
            r"7 of the 8 files .*slice000\.npz, .*slice004\.npz and 2 more",
        ),
    ],
)
def test_a_faulty_list_is_refused(text: str, message: str, tmp_path: Path):
    write_slices(tmp_path)
    (tmp_path / "lists" / "train.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        Synapse_dataset(tmp_path, None, "train", num_classes=8)


def write_volume_h5(folder: Path, case: str = "case0001", **attributes: tuple) -> Path:
    """Write a small test volume with random labels; return its file."""
    rng = np.random.default_rng(1)
    path = folder / "test_vol_h5" / f"{case}.npy.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image"] = rng.random((3, 20, 24), dtype=np.float32)
        file["label"] = rng.integers(0, 9, (3, 20, 24)).astype(np.float32)
        file.attrs.update(attributes)
    return path


def test_the_geometry_of_a_volume_is_read_if_it_is_stored(tmp_path: Path):
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "test_vol.txt").write_text("case0001\ncase0002\n")
    geometry = {"spacing": (0.7, 0.8, 5.0), "origin": (1.0, 2.0, 3.0)}
    geometry["direction"] = (-1.0, 0, 0, 0, -1, 0, 0, 0, 1)
    write_volume_h5(tmp_path, "case0001", **geometry)
    write_volume_h5(tmp_path, "case0002")
    dataset = Synapse_dataset(tmp_path, None, "test_vol")
    sample = dataset[0]
    assert sample["image"].shape == (3, 20, 24) and sample["case_name"] == "case0001"
    assert dataset.geometry(0) == geometry
    assert dataset.geometry(1) is None


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "not a readable h5"),
        (lambda path: path.write_text("hello"), "not a readable h5"),
        (lambda path: h5py.File(path, "w").close(), "no data set named image"),
    ],
)
def test_a_faulty_volume_is_named(fault, message: str, tmp_path: Path):
    path = write_volume_h5(tmp_path)
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "test_vol.txt").write_text("case0001\n")
    fault(path)
    with pytest.raises(InputError, match=message) as caught:
        Synapse_dataset(tmp_path, tmp_path / "list", "test_vol").check()
    assert str(path) in str(caught.value)
