"""Names that scripts of the field import: they exist, and do what they did there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_sam, write_slices
from medpy import metric
from scipy import ndimage
from test_datasets import change_slice, write_volume_h5
from torch.utils.data import DataLoader

import segment_anything
import utils
from common.errors import InputError
from config.flags import train_parser
from config.settings import complete
from datasets.dataset_synapse import Synapse_dataset, random_rot_flip, random_rotate
from segment_anything import (
    build_sam,
    build_sam_vit_b,
    build_sam_vit_h,
    build_sam_vit_l,
    sam_model_registry,
)
from segment_anything.utils.transforms import ResizeLongestSide
from trainer import calc_loss
from training.losses import DiceLoss, dice_sums


@pytest.mark.parametrize(
    ("build", "depth"),
    [
        (build_sam_vit_b, 12),
        (build_sam_vit_l, 24),
        (build_sam_vit_h, 32),
        (build_sam, 32),
        (sam_model_registry["default"], 32),
        (segment_anything.build_sam, 32),
    ],
)
def test_builders_take_the_originals_arguments(build, depth: int):
    with torch.device("meta"):
        sam, side = build(512, 8, [0, 0, 0], [1, 1, 1], None)
        again, _ = build(image_size=512, num_classes=8, checkpoint=None)
    assert side == 32 and len(sam.image_encoder.blocks) == len(again.image_encoder.blocks) == depth
    assert sam.mask_decoder.num_mask_tokens == 9


def test_build_sam_takes_a_name_too():
    assert len(build_sam("vit_tiny", 64, 2)[0].image_encoder.blocks) == 4
    assert len(build_sam(name="vit_tiny", image_size=64)[0].image_encoder.blocks) == 4
    with pytest.raises(InputError, match=r"unknown encoder 'vit_g', expected vit_tiny, vit_b"):
        build_sam("vit_g", 64)


@pytest.mark.parametrize("shape", [(5,), (5, 4), (1, 5, 4), (3, 5, 4), (2, 2, 5, 4)])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_dice_is_right_for_any_number_of_axes(shape: tuple[int, ...], classes: int):
    """Against the same pixels laid out as one row, class by class."""
    scores = torch.randn(2, classes, *shape).double().softmax(dim=1)
    target = torch.randint(0, classes, (2, *shape))
    expected = 0.0
    for index in range(classes):
        p, t = scores[:, index].flatten(), (target == index).double().flatten()
        expected += 1 - (2 * (p * t).sum() + 1e-5) / ((p * p).sum() + (t * t).sum() + 1e-5)
    found = DiceLoss(classes)(scores, target)
    assert found.item() == pytest.approx(expected.item() / classes, rel=1e-12)
    assert dice_sums(scores, target).shape == (2, classes)


def test_calc_loss_weighs_the_terms():
    outputs = {"low_res_logits": torch.randn(2, 3, 8, 8)}
    labels = torch.randint(0, 3, (2, 8, 8)).float()
    loss, ce, dice = calc_loss(outputs, labels, torch.nn.CrossEntropyLoss(), DiceLoss(3), 0.7)
    logits = outputs["low_res_logits"]
    assert ce.item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels.long()).item()
    )
    assert dice.item() == pytest.approx(DiceLoss(3)(logits.softmax(1), labels).item())
    assert loss.item() == pytest.approx(0.3 * ce.item() + 0.7 * dice.item())


def test_augmentations_draw_and_turn_as_numpy_and_scipy():
    image, label = np.random.default_rng(0).random((9, 12)), np.arange(108).reshape(9, 12) % 5
    for seed in range(12):
        np.random.seed(seed)
        turned, turned_label = random_rot_flip(image, label)
        rotated, rotated_label = random_rotate(image, label)
        np.random.seed(seed)
        k, axis = np.random.randint(0, 4), np.random.randint(0, 2)
        angle = np.random.randint(-20, 20)
        for found, array in ((turned, image), (turned_label, label)):
            assert np.array_equal(found, np.flip(np.rot90(array, k), axis=axis))
        for found, array in ((rotated, image), (rotated_label, label)):
            expected = ndimage.rotate(array, angle, order=0, reshape=False)
            assert np.array_equal(found, expected) and found.dtype == array.dtype


class BrightBlocks(torch.nn.Module):
    """A network that labels bright pixels 1, so that a prediction follows from the resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor, multimask_output: bool, size: int) -> dict:
        assert images.shape[-2:] == (size, size)
        return {"masks": torch.stack([0.5 - images[:, 0], images[:, 0] - 0.5], dim=1)}


@pytest.fixture
def slice_and_label() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    image = ndimage.gaussian_filter(rng.random((40, 56)), 3).astype(np.float32)
    image = (image - image.min()) / (image.max() - image.min())
    return image, (ndimage.gaussian_filter(image, 2) > 0.5).astype(np.uint8)


def scores_of(prediction: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """DSC and HD95 by medpy."""
    return metric.binary.dc(prediction, label), metric.binary.hd95(prediction, label)


def zoomed(image: np.ndarray, size: tuple[int, int], order: int) -> np.ndarray:
    factors = (size[0] / image.shape[0], size[1] / image.shape[1])
    return ndimage.zoom(image, factors, order=order)


@pytest.mark.parametrize("batch", [True, False])
def test_one_slice_is_resized_at_once_and_scored_in_its_plane(slice_and_label, batch: bool):
    image, label = slice_and_label
    seen = (zoomed(image, (64, 64), 3) > 0.5).astype(np.uint8)
    expected = scores_of(zoomed(seen, (40, 56), 0), label)
    if batch:  # as a loader gives it
        image, label = torch.from_numpy(image)[None], torch.from_numpy(label)[None]
    found = utils.test_single_volume(image, label, BrightBlocks(), 1, True, [64, 64], [20, 20])
    assert found == [pytest.approx(expected, abs=1e-9)]
    assert expected[1] > 0


def test_a_volume_of_one_slice_is_resized_twice_and_scored_in_space(slice_and_label):
    image, label = slice_and_label
    seen = zoomed(zoomed(image, (20, 20), 3), (64, 64), 3) > 0.5
    prediction = zoomed(seen.astype(np.uint8), (40, 56), 0)
    expected = scores_of(prediction[None], label[None])
    found = utils.test_single_volume(
        image[None, None], label[None, None], BrightBlocks(), 1, True, [64, 64], [20, 20]
    )
    assert found == [pytest.approx(expected, abs=1e-9)]
    assert expected[1] < scores_of(prediction, label)[1]  # all of an organ is surface


def test_one_slice_is_saved_as_a_volume(slice_and_label, tmp_path: Path):
    utils.test_single_volume(
        *slice_and_label, BrightBlocks(), 1, True, [64, 64], [20, 20], tmp_path, "a"
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        f"a_{kind}.nii.gz" for kind in ("pred", "img", "gt")
    }


def test_a_slice_in_colour(slice_and_label):
    image, label = slice_and_label
    colour = np.stack([image] * 3)
    arguments = (BrightBlocks(), 1, True, [64, 64], [20, 20])
    grey = utils.test_single_volume(image, label, *arguments)
    assert utils.test_single_volume(colour, label, *arguments) == grey
    assert utils.test_single_volume(colour[None], label[None], *arguments) == grey


class TestLenientDataset:
    """`Synapse_dataset` without `num_classes`, as scripts written against the original call it."""

    def test_labels_have_no_bound(self, tmp_path: Path):
        label = np.tile(np.arange(14.0), (40, 3))[:, :40]
        change_slice(write_slices(tmp_path), label=label)
        sample = Synapse_dataset(tmp_path / "train_npz", tmp_path / "lists", "train")[2]
        assert np.array_equal(sample["label"], label)
        with pytest.raises(InputError, match="expected 0…8"):
            Synapse_dataset(tmp_path, None, "train", num_classes=8)[2]

    def test_another_split_names_volumes(self, tmp_path: Path, capsys):
        write_volume_h5(tmp_path)
        (tmp_path / "lists").mkdir()
        (tmp_path / "lists" / "val.txt").write_text("case0001\n")
        dataset = Synapse_dataset(tmp_path / "test_vol_h5", tmp_path / "lists", "val")
        assert dataset[0]["image"].shape == (3, 20, 24) and dataset[0]["case_name"] == "case0001"
        assert "warning: split is 'val'" in capsys.readouterr().err
        with pytest.raises(InputError, match="split is 'val'"):
            Synapse_dataset(tmp_path, None, "val", num_classes=8)
        with pytest.raises(InputError, match=r"lists_Synapse/none\.txt does not exist"):
            Synapse_dataset(tmp_path / "test_vol_h5", None, "none")

    def test_a_repeated_name_counts_twice(self, tmp_path: Path, capsys):
        write_slices(tmp_path)
        names = ["case0005_slice001", "case0005_slice002", "case0005_slice001"]
        (tmp_path / "lists" / "train.txt").write_text("\n".join(names))
        dataset = Synapse_dataset(tmp_path, None, "train")
        assert [sample["case_name"] for sample in map(dataset.__getitem__, range(3))] == names
        assert "names case0005_slice001 more than once" in capsys.readouterr().err

    def test_volumes_are_transformed(self, tmp_path: Path):
        write_volume_h5(tmp_path)
        (tmp_path / "lists").mkdir()
        (tmp_path / "lists" / "test_vol.txt").write_text("case0001\n")

        def crop(sample: dict) -> dict:
            return {"image": sample["image"][:, :5], "label": sample["label"]}

        dataset = Synapse_dataset(tmp_path, None, "test_vol", crop)
        (batch,) = DataLoader(dataset)
        assert batch["image"].shape == (1, 3, 5, 24) and batch["case_name"] == ["case0001"]

    def test_other_intensities_are_warned_of_once(self, tmp_path: Path, capsys):
        write_slices(tmp_path)
        for index in (1, 2):
            path = tmp_path / "train_npz" / f"case0005_slice00{index}.npz"
            np.savez(path, image=np.full((40, 40), 3.0, "f4"), label=np.zeros((40, 40)))
        dataset = Synapse_dataset(tmp_path, None, "train")
        assert dataset[1]["image"].max() == dataset[2]["image"].max() == 3
        assert capsys.readouterr().err.count("far outside [0, 1]") == 1
        with pytest.raises(InputError, match="intensities from 3 to 3"):
            Synapse_dataset(tmp_path, None, "train", num_classes=8)[1]


def test_max_iterations_of_an_older_script_has_no_effect():
    """Its parser's default was 30000; the original computed the number of steps itself."""
    ours = train_parser().parse_args(["--root_path", "x", "--max_iterations", "5"])
    older = type(ours)(root_path="x", max_iterations=30000, dataset="Synapse")
    assert complete(older).max_iterations is None
    ours.spec, ours.code = complete(older).spec, {}
    assert complete(ours).max_iterations == 5  # train.py's own flag stops training


def test_a_predictor_brings_a_picture_to_the_networks_range():
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sam = tiny_sam(num_classes=3).eval()  # takes [0, 1]
    predictor = segment_anything.SamPredictor(sam)
    predictor.set_image(picture)
    with torch.no_grad():
        expected = sam.image_encoder(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)
    assert torch.allclose(predictor.get_image_embedding(), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(48, 64), (300, 100), (7, 7)])
def test_resize_longest_side(size: tuple[int, int]):
    transform = ResizeLongestSide(64)
    rows, columns = ResizeLongestSide.get_preprocess_shape(*size, 64)
    assert (rows, columns) == {(48, 64): (48, 64), (300, 100): (64, 21), (7, 7): (64, 64)}[size]
    ramp = np.tile(np.linspace(0, 255, size[1]).astype(np.uint8)[:, None], (size[0], 1, 3))
    small = transform.apply_image(ramp)
    assert small.shape == (rows, columns, 3) and small.dtype == np.uint8
    as_batch = torch.from_numpy(ramp).permute(2, 0, 1)[None].float()
    resized = transform.apply_image_torch(as_batch)[0].permute(1, 2, 0).numpy()
    assert np.abs(resized - small).max() <= 1
    corners = np.array([[0.0, 0.0, size[1], size[0]]])
    boxes = transform.apply_boxes(corners, size)
    assert boxes.tolist() == [[0, 0, columns, rows]]
    found = transform.apply_boxes_torch(torch.tensor(corners), size)
    assert np.allclose(found, boxes)
    predictor = segment_anything.SamPredictor(tiny_sam())
    assert predictor.transform.target_length == 64
