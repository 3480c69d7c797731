"""The values of `--augment`: what each does to images and labels, against numpy and scipy."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, write_slices
from scipy import ndimage

import train
from config.recipe_flags import RECIPE
from datasets import grey_values
from datasets.augmentation import (
    AUGMENTATIONS,
    Augmentation,
    draw_augmentation,
    keyed_rng,
    prepare_batch,
)
from datasets.dataset_synapse import Synapse_dataset
from datasets.grey_values import GreyValues, add_noise, apply_gamma, blur, draw_grey_values
from datasets.registry import SYNAPSE
from datasets.sides import mirror_of
from training.batches import augmented_batch, collate_slices, make_loader

SYNAPSE_LPS = SYNAPSE.to_json() | {"orientation": "LPS"}
SIZES = {"output_size": (32, 32), "low_res": (8, 8)}


def rng(index: int = 0) -> np.random.Generator:
    return keyed_rng(1, 2, index)


def image_of(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


def slices(count: int = 4, channels: int | None = None) -> dict:
    """Raw slices as a loader gives them."""
    drawn = np.random.default_rng(5)
    shape = (24, 28) if channels is None else (channels, 24, 28)
    samples = [
        {
            "image": drawn.random(shape, dtype=np.float32),
            "label": drawn.integers(0, 9, (24, 28)).astype(np.uint8),
            "index": index,
        }
        for index in range(count)
    ]
    return collate_slices(samples)


def flags(augment: str, **changes: object) -> argparse.Namespace:
    known = {"seed": 7, "img_size": 32, "augment": augment, "spec": SYNAPSE_LPS}
    known |= {"lora_dropout": 0, "prompt_prob": 0}
    return argparse.Namespace(**known | changes)


def batch_of(raw: dict, augment: str, epoch: int = 3, **changes: object) -> dict:
    args = flags(augment, **changes)
    return augmented_batch(raw, epoch, args, 8, torch.device("cpu"))


def test_the_table_has_a_row_for_each_choice_of_the_flag():
    (flag,) = [flag for flag in RECIPE if flag.name == "augment"]
    assert set(flag.choices) == AUGMENTATIONS.keys()
    assert flag.default == "samed"


def test_samed_draws_what_it_drew_before_and_nothing_more():
    for index in range(50):
        ours, theirs = rng(index), rng(index)
        assert AUGMENTATIONS["samed"](ours, {}) == draw_augmentation(theirs)
        assert ours.random() == theirs.random()
        untouched = rng(index)
        assert AUGMENTATIONS["none"](untouched, {}) == Augmentation()
        assert untouched.random() == rng(index).random()


def test_samed_and_intensity_moves_pixels_and_labels_as_samed_does():
    for index in range(50):
        drawn = AUGMENTATIONS["samed+intensity"](rng(index), {})
        plain = AUGMENTATIONS["samed"](rng(index), {})
        assert (drawn.quarter_turns, drawn.flip_axis, drawn.angle) == (
            plain.quarter_turns,
            plain.flip_axis,
            plain.angle,
        )
    raw = slices(40)
    with_values, without = batch_of(raw, "samed+intensity"), batch_of(raw, "samed")
    assert torch.equal(with_values["label"], without["label"])
    changed = (with_values["image"] != without["image"]).flatten(1).any(dim=1)
    assert 0.2 < changed.float().mean() < 0.8  # 1 - 0.9 · 0.9 · 0.9 · 0.7 = 0.49
    # The zoom of an unchanged slice is the same up to the order of additions in a batch.
    same = (with_values["image"] - without["image"]).abs().flatten(1).amax(dim=1) < 1e-5
    assert same.any()


def test_grey_values_are_drawn_with_the_stated_probabilities_and_ranges():
    drawn = [draw_grey_values(np.random.default_rng(index)) for index in range(4000)]
    expected = {"noise": 0.1, "blur": 0.1, "inverted_gamma": 0.1, "gamma": 0.3}
    for name, probability in expected.items():
        found = [getattr(one, name) for one in drawn]
        share = np.mean([value is not None for value in found])
        assert share == pytest.approx(probability, abs=0.025)
    gammas = np.array([one.gamma for one in drawn if one.gamma is not None])
    assert 0.7 <= gammas.min() < 0.72 and 1.45 < gammas.max() <= 1.5
    assert np.mean(gammas < 1) == pytest.approx(0.5, abs=0.06)
    sigmas = np.array([one.blur for one in drawn if one.blur is not None])
    assert (
        0.5 <= sigmas.min() < 0.55
        and 0.95 < sigmas.max() <= 1
        and (sigmas[:, 0] != sigmas[:, 1]).all()
    )
    noise = [one.noise for one in drawn if one.noise is not None]
    assert 0 <= min(noise) < 0.01 and 0.09 < max(noise) <= 0.1
    seeds = {one.noise_seed for one in drawn}
    assert len(seeds) == len(drawn)


@pytest.mark.parametrize("shape", [(20, 24), (3, 20, 24), (3, 5), (1, 1)])
def test_blur_equals_scipy(shape: tuple[int, ...]):
    image = image_of(*shape)
    found = blur(image, (0.6, 0.9))
    sigmas = (0, 0.6, 0.9)[-image.ndim :]
    radius = (0, 4, 4)[-image.ndim :]
    expected = ndimage.gaussian_filter(
        image.double().numpy(), sigmas, mode="nearest", radius=radius
    )
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.7, 1.5])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.8, 1.7), (300.0, 4000.0)])
def test_gamma_equals_numpy_within_any_range(gamma: float, low: float, high: float):
    image = low + (high - low) * image_of(3, 16, 12)
    values = image.double().numpy()
    smallest, spread = values.min(), np.ptp(values)
    expected = ((values - smallest) / spread) ** gamma * spread + smallest
    np.testing.assert_allclose(apply_gamma(image, gamma).numpy(), expected, rtol=1e-5, atol=1e-5)
    inverted = GreyValues(inverted_gamma=gamma)(image).numpy()
    largest = values.max()
    expected = largest - ((largest - values) / spread) ** gamma * spread
    np.testing.assert_allclose(inverted, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "image", [image_of(3, 9, 7) * 4 - 2, torch.full((5, 5), -3.0), image_of(1, 1)]
)
def test_no_change_leaves_the_range_of_the_image_or_gives_nan(image: torch.Tensor):
    every = GreyValues(noise=0.1, noise_seed=4, blur=(1.0, 0.5), inverted_gamma=0.7, gamma=1.5)
    before = image.clone()
    found = every(image)
    assert torch.equal(image, before) and found.shape == image.shape
    assert found.isfinite().all()
    assert image.min() <= found.min() and found.max() <= image.max()


def test_noise_has_the_strength_and_is_drawn_for_each_channel():
    image = 0.5 + 0.01 * torch.randn(3, 200, 200, generator=torch.Generator().manual_seed(1))
    image[:, 0, :2] = torch.tensor([0.0, 1.0])  # the range, far away
    noise = add_noise(image, 0.1, seed=8) - image
    assert noise.std() == pytest.approx(0.1 * float(image.std()), rel=0.05)
    correlation = np.corrcoef(noise.flatten(1).numpy())
    assert np.abs(correlation - np.eye(3)).max() < 0.03
    assert torch.equal(add_noise(image, 0.1, seed=8) - image, noise)


def test_blur_and_gamma_are_the_same_for_all_channels():
    grey = image_of(16, 16)
    colour = grey.expand(3, -1, -1).contiguous()
    for change in (
        GreyValues(blur=(0.7, 0.9)),
        GreyValues(gamma=1.4),
        GreyValues(inverted_gamma=0.8),
    ):
        found = change(colour)
        for channel in found:
            assert torch.equal(channel, change(grey))


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_a_slice_is_the_same_alone_and_in_any_batch(augment: str):
    """So ranks, workers and restarts do not change it."""
    raw = slices(24)
    torch.manual_seed(0)
    whole = batch_of(raw, augment)
    torch.manual_seed(99)
    for chosen in ([5], [23, 4, 11]):
        part = {key: raw[key][torch.tensor(chosen)] for key in ("image", "label")}
        found = batch_of(part | {"index": chosen}, augment)
        assert torch.equal(found["label"], whole["label"][chosen])
        np.testing.assert_allclose(found["image"], whole["image"][chosen], atol=1e-5)


def test_augmentation_leaves_the_global_generators_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    batch_of(slices(24), "samed+intensity")
    assert torch.equal(torch.rand(3), expected)


def test_a_mirrored_patient_has_mirrored_labels_with_swapped_sides():
    """Classes 2 and 3 of Synapse are the right and the left kidney; x of LPS runs to the left."""
    raw = slices(60)
    kinds = set()
    for index in range(60):
        image, label = raw["image"][index].numpy(), raw["label"][index].numpy()
        drawn = AUGMENTATIONS["anatomical"](rng(index), SYNAPSE_LPS)
        expected_image, expected_label = image, label
        if drawn.angle is not None:
            assert -20 <= drawn.angle < 20
            turn = {"order": 0, "reshape": False}
            expected_image = ndimage.rotate(image, drawn.angle, **turn)
            expected_label = ndimage.rotate(label, drawn.angle, **turn)
        if drawn.flip_axis is not None:
            expected_image = expected_image[:, ::-1]
            mirrored = expected_label[:, ::-1]
            expected_label = mirrored.copy()
            expected_label[mirrored == 2] = 3
            expected_label[mirrored == 3] = 2
        assert drawn.quarter_turns == 0
        assert np.array_equal(drawn.image(raw["image"][index]).numpy(), expected_image)
        found = drawn.label(raw["label"][index])
        assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), expected_label)
        kinds.add((drawn.angle is not None, drawn.flip_axis is not None))
    assert len(kinds) == 4


def test_the_labels_of_the_loss_are_swapped_too():
    label = torch.zeros(16, 16, dtype=torch.uint8)
    label[:, :8] = 2
    mirror = mirror_of("LPS", SYNAPSE.class_names)
    choice = Augmentation(flip_axis=mirror.axis, classes=mirror.classes)
    batch = prepare_batch([label.float()], [label], [choice], **SIZES)
    assert (batch["low_res_label"][0, :, 4:] == 3).all() and batch["low_res_label"][
        0, :, :4
    ].max() == 0


@pytest.mark.parametrize(
    ("orientation", "axis"), [("LPS", 1), ("RAI", 1), ("LIP", 1), ("PLS", 0), ("ARS", 0)]
)
def test_the_orientation_tells_the_axis_from_left_to_right(orientation: str, axis: int):
    mirror = mirror_of(orientation, SYNAPSE.class_names)
    assert mirror.axis == axis
    assert mirror.classes == (0, 1, 3, 2, 4, 5, 6, 7, 8)
    assert ("rows", "columns")[
        axis
    ] in mirror.told and "left kidney and right kidney" in mirror.told


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("kidney_left", "liver", "kidney_right"), (0, 3, 2, 1)),
        (("kidney L", "kidney R"), (0, 2, 1)),
        (("Lung_L", "Lung_R"), (0, 2, 1)),
        (("lt lung", "lung rt"), (0, 2, 1)),
        (("LeftKidney", "RightKidney"), (0, 2, 1)),
        (("KidneyL", "KidneyR"), (0, 2, 1)),
        (("左肾", "右肾", "肝"), (0, 2, 1, 3)),
        (("Left Lateral Ventricle", "Right Lateral Ventricle"), (0, 2, 1)),
        (("lung upper lobe left", "lung upper lobe right", "liver"), (0, 2, 1, 3)),
        (("linke Niere", "rechte Niere"), (0, 2, 1)),
        (("rein droit", "foie", "rein gauche"), (0, 3, 2, 1)),
        (("левая почка", "правая почка"), (0, 2, 1)),
        (("liver", "spleen"), (0, 1, 2)),
        (("bright spot", "leftover"), (0, 1, 2)),
    ],
)
def test_names_tell_the_pairs_of_sides(names: tuple[str, ...], classes: tuple[int, ...]):
    mirror = mirror_of("LPS", names)
    assert mirror.axis == 1 and mirror.classes == classes


@pytest.mark.parametrize(
    ("orientation", "names", "told"),
    [
        (None, SYNAPSE.class_names, "stores no orientation"),
        ("PIR", SYNAPSE.class_names, "sagittal"),
        ("LPS", ("left kidney", "liver"), "no other class is the other side of left kidney"),
        ("LPS", ("left kidney", "kidney left", "right kidney"), "no other class"),
        ("LPS", ("left and right lung", "liver"), "no other class"),
        ("LPS", ("left ventricle", "right ventricle"), "chambers of the heart"),
        ("LPS", ("LV", "RV", "MYO"), "LV and RV may be"),
        ("LPS", ("lkidney", "rkidney"), "lkidney and rkidney may be"),
        ("LPS", ("leftkidney", "rightkidney"), "leftkidney and rightkidney may be"),
        ("LPS", ("KIDNEYLEFT", "KIDNEYRIGHT"), "KIDNEYLEFT and KIDNEYRIGHT may be"),
        ("LPS", ("rein gauche", "foie"), "no other class is the other side of rein gauche"),
        ("LPS", ("left liver lobe", "right liver lobe"), "lobes of the liver"),
        ("LPS", ("class 1", "class 2"), "no names"),
    ],
)
def test_flips_are_left_out_where_they_may_be_wrong(
    orientation: str | None, names: tuple[str, ...], told: str
):
    mirror = mirror_of(orientation, names)
    assert mirror.axis is None and told in mirror.told and "without flips" in mirror.told
    spec = {"orientation": orientation, "class_names": list(names)}
    known = {"orientation": "LPS", "class_names": ["liver"]}
    for index in range(20):
        drawn = AUGMENTATIONS["anatomical"](rng(index), spec)
        assert drawn.flip_axis is None and drawn.classes is None
        assert drawn.angle == AUGMENTATIONS["anatomical"](rng(index), known).angle


@pytest.mark.parametrize("orientation", ["LPS", None])
def test_the_log_says_once_what_is_flipped(
    orientation: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    dataset = Synapse_dataset(write_slices(tmp_path), None, "train")
    spec = SYNAPSE_LPS | {"orientation": orientation}
    args = flags("anatomical", spec=spec, num_workers=0, batch_size=2, n_gpu=1, global_batch=None)
    with caplog.at_level(logging.INFO):
        loader = make_loader(dataset, args, torch.device("cpu"))
        for raw in loader:
            augmented_batch(raw, 0, args, 8, torch.device("cpu"))
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == f"--augment anatomical: {mirror_of(orientation, SYNAPSE.class_names).told}"


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["samed+intensity", "anatomical"])
def test_a_run_stops_and_goes_on_as_if_it_had_not_stopped(augment: str, tmp_path: Path):
    data = write_slices(tmp_path / "data", count=8)
    common = ["--root_path", str(data), *TINY_FLAGS, "--AdamW", "--base_lr", "1e-3"]
    common += ["--batch_size", "2", "--max_epochs", "2", "--augment", augment]
    train.main([*common, "--output", str(tmp_path / "whole")])
    train.main([*common, "--output", str(tmp_path / "parts"), "--max_iterations", "3"])
    (whole,), (part,) = (list((tmp_path / name).iterdir()) for name in ("whole", "parts"))
    assert augment in whole.name
    train.main(["--resume", str(part), "--max_iterations", "8", "--num_workers", "2"])
    expected, found = (
        torch.load(folder / "epoch_1.pth", weights_only=True) for folder in (whole, part)
    )
    settings = expected.pop("samed_settings")
    assert found.pop("samed_settings")["spec"] == settings["spec"]
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_the_documented_probabilities_are_those_of_the_code():
    table = grey_values.__doc__
    assert f"| Gaussian noise | {grey_values.NOISE[0]} |" in table
    assert f"| Gaussian blur | {grey_values.BLUR[0]} |" in table
    assert f"| gamma | {grey_values.GAMMA} |" in table
