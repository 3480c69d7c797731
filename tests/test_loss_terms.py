"""The terms of the loss and the weights of the classes, against independent computations."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_FLAGS, tiny_sam, write_slices
from refused_operators import RefusalWatch
from scipy.ndimage import distance_transform_edt

import train
from common.errors import InputError
from config.flags import train_parser
from config.settings import complete
from datasets.dataset_synapse import Synapse_dataset
from distributed.ranks import ALONE
from training.losses import TERMS, SegmentationLoss, inverse_frequencies
from training.signed_distance import signed_distances
from training.validation import training_data

LOSSES = train_parser().flags["loss"].choices
CLASSES = 4
WEIGHTS = torch.tensor([0.1, 1.0, 2.5, 0.4])


@pytest.fixture
def logits() -> torch.Tensor:
    return (2 * torch.randn(3, CLASSES, 16, 12)).requires_grad_()


@pytest.fixture
def labels() -> torch.Tensor:
    """Blobs of the classes; no slice has all of them."""
    blobs = torch.randint(0, CLASSES, (3, 4, 3)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    blobs[0][blobs[0] == 3] = 0
    blobs[1] = 2
    return blobs


def terms_of(loss: str, logits: torch.Tensor, labels: torch.Tensor, **more: object) -> dict:
    return SegmentationLoss(CLASSES, 0.8, terms=loss, **more)(logits, labels)


def focal_by_hand(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # -> (B, H, W)
    chances = logits.double().softmax(1).gather(1, labels[:, None])[:, 0]
    return -((1 - chances) ** 2) * chances.log()


def dice_by_hand(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    chances = logits.double().softmax(1)
    truth = F.one_hot(labels, CLASSES).movedim(-1, 1).double()
    overlap = (chances * truth).sum((0, 2, 3))
    size = (chances**2).sum((0, 2, 3)) + truth.sum((0, 2, 3))
    return (1 - (2 * overlap + 1e-5) / (size + 1e-5)).mean()


def distances_by_hand(labels: torch.Tensor, n_classes: int) -> np.ndarray:
    """Return (B, n_classes - 1, H, W) as the authors of the boundary loss compute them."""
    found = np.zeros((len(labels), n_classes - 1, *labels.shape[1:]))
    for index, label in enumerate(labels.numpy()):
        for c in range(1, n_classes):
            inside = label == c
            if inside.any() and not inside.all():
                outer, inner = distance_transform_edt(~inside), distance_transform_edt(inside)
                found[index, c - 1] = outer * ~inside - (inner - 1) * inside
    return found


def test_every_choice_consists_of_terms_and_every_term_is_in_a_choice():
    assert {name for loss in LOSSES for name in loss.split("+")} == TERMS.keys()


def test_the_published_loss_has_the_bits_it_had(logits: torch.Tensor, labels: torch.Tensor):
    found = SegmentationLoss(CLASSES, 0.8)(logits, labels)
    assert list(found) == ["loss", "loss_ce", "loss_dice"]
    found["loss"].backward()
    gradient, logits.grad = logits.grad, None

    ce = F.cross_entropy(logits, labels, reduction="none").sum() / labels.numel()
    chances = logits.softmax(dim=1)
    truth = labels[:, None] == torch.arange(CLASSES).view(-1, 1, 1)
    overlap = (chances * truth).sum([0, 2, 3])
    size = chances.square().sum([0, 2, 3]) + truth.sum([0, 2, 3])
    dice = (1 - (2 * overlap + 1e-5) / (size + 1e-5)).sum() / CLASSES
    loss = (1 - 0.8) * ce + 0.8 * dice
    loss.backward()
    assert (found["loss"], found["loss_ce"], found["loss_dice"]) == (loss, ce, dice)
    assert torch.equal(gradient, logits.grad)


def test_one_term_alone_is_the_loss(logits: torch.Tensor, labels: torch.Tensor):
    ce, dice = (terms_of(name, logits, labels) for name in ("ce", "dice"))
    assert list(ce) == ["loss", "loss_ce"] and list(dice) == ["loss", "loss_dice"]
    torch.testing.assert_close(ce["loss"], torch.nn.CrossEntropyLoss()(logits, labels))
    torch.testing.assert_close(dice["loss"].double(), dice_by_hand(logits, labels))


def test_focal_loss(logits: torch.Tensor, labels: torch.Tensor):
    found = terms_of("focal+dice", logits, labels)
    focal, dice = focal_by_hand(logits, labels).mean(), dice_by_hand(logits, labels)
    torch.testing.assert_close(found["loss_focal"].double(), focal)
    torch.testing.assert_close(found["loss"].double(), 0.2 * focal + 0.8 * dice)


def test_class_weights_are_those_of_pytorch(logits: torch.Tensor, labels: torch.Tensor):
    found = terms_of("ce+dice", logits, labels, class_weights=WEIGHTS)
    expected = torch.nn.CrossEntropyLoss(WEIGHTS)(logits, labels)
    torch.testing.assert_close(found["loss_ce"], expected)
    torch.testing.assert_close(found["loss_dice"].double(), dice_by_hand(logits, labels))
    (gradient,) = torch.autograd.grad(found["loss_ce"], logits, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])

    pixels = WEIGHTS.double()[labels]
    focal = terms_of("focal+dice", logits, labels, class_weights=WEIGHTS)["loss_focal"]
    expected = (focal_by_hand(logits, labels) * pixels).sum() / pixels.sum()
    torch.testing.assert_close(focal.double(), expected)


def test_boundary_loss(logits: torch.Tensor, labels: torch.Tensor):
    found = terms_of("ce+dice+boundary", logits, labels, boundary_weight=0.3)
    chances = logits.detach().double().softmax(1)[:, 1:].numpy()
    expected = (chances * distances_by_hand(labels, CLASSES)).mean()
    assert found["loss_boundary"].item() == pytest.approx(expected, rel=1e-5)
    rest = 0.2 * found["loss_ce"] + 0.8 * found["loss_dice"]
    torch.testing.assert_close(found["loss"], rest + 0.3 * found["loss_boundary"])


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (16, 16), (40, 23), (128, 96)])
@pytest.mark.parametrize("density", [0.002, 0.1, 0.9])
def test_distances_are_those_of_scipy(shape: tuple[int, int], density: float):
    labels = torch.where(torch.rand(4, *shape) < density, torch.randint(1, 4, (4, *shape)), 0)
    labels[0] = 0
    found = signed_distances(labels, 5)
    assert found.dtype == torch.float32 and found.shape == (4, 4, *shape)
    assert np.abs(found.numpy() - distances_by_hand(labels, 5)).max() < 1e-4
    assert signed_distances(labels[:0], 5).shape == (0, 4, *shape)


def test_a_step_away_from_the_boundary():
    labels = torch.tensor([[[0, 0, 1, 1, 1, 0]]])
    assert signed_distances(labels, 2).flatten().tolist() == [2, 1, 0, -1, 0, 1]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["none", "inverse"])
def test_ranks_have_the_loss_of_the_whole_batch(
    loss: str, weights: torch.Tensor | None, logits: torch.Tensor, labels: torch.Tensor
):
    """Three ranks, one of them without slices; each adds the others' sums as `Ranks.total` does."""
    more = {"class_weights": weights, "boundary_weight": 0.5}
    whole = terms_of(loss, logits, labels, **more)
    whole["loss"].backward()
    gradient, logits.grad = logits.grad, None
    parts, sums = [slice(0, 2), slice(2, 2), slice(2, 3)], []

    def note(own: torch.Tensor) -> torch.Tensor:
        sums.append(own.detach())
        return own

    for part in parts:
        SegmentationLoss(CLASSES, 0.8, note, terms=loss, **more)(logits[part], labels[part])
    for index, part in enumerate(parts):
        others = sum(own for other, own in enumerate(sums) if other != index)
        criterion = SegmentationLoss(CLASSES, 0.8, others.add, terms=loss, **more)
        found = criterion(logits[part], labels[part])
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        found["loss"].backward()
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_refuses_or_waits_in_strict_mode(
    loss: str, logits: torch.Tensor, labels: torch.Tensor
):
    criterion = SegmentationLoss(CLASSES, 0.8, terms=loss, class_weights=WEIGHTS)
    with RefusalWatch() as watch:
        criterion(logits, labels)["loss"].backward()
    assert watch.refused == set()
    assert {"_local_scalar_dense", "nonzero", "masked_select"} & watch.seen.keys() == set()


def test_inverse_frequencies():
    assert inverse_frequencies([80, 0, 20]).tolist() == pytest.approx([0.4, 1, 1.6])
    assert inverse_frequencies([5, 5, 5]).tolist() == [1, 1, 1]


def args_of(data: Path, **more: object) -> argparse.Namespace:
    return complete(argparse.Namespace(root_path=str(data), num_classes=8, **more))


def test_the_frequencies_are_those_of_the_slices_that_are_trained_on(tmp_path: Path):
    data = write_slices(tmp_path, cases=3)
    # A class that only one case has.
    for path in (data / "train_npz").glob("case0006*"):
        np.savez(path, image=np.zeros((40, 40), np.float32), label=np.full((40, 40), 8.0))
    args = args_of(data, list_dir=str(data / "lists"), class_weights="inverse", val_every=1)
    held_out: dict[str, Synapse_dataset] = {}
    for seed in range(20):
        args.seed = seed
        left, held_out = training_data(args, None)
        if [*held_out] == ["case0006"]:
            break
    assert [*held_out] == ["case0006"]
    counts = sum(np.bincount(left[i]["label"].astype(int).ravel(), minlength=9) for i in range(10))
    assert args.trained_on["voxels"] == counts.tolist()
    ranks = replace(ALONE, rank=0)
    found = SegmentationLoss.from_flags(args, torch.device("cpu"), ranks).class_weights
    inverse = np.where(counts > 0, 1 / np.maximum(counts, 1), 0)
    expected = np.where(counts > 0, inverse / inverse[counts > 0].mean(), 1)
    assert np.allclose(found, expected, rtol=1e-6)


def test_weights_need_the_counts():
    args = complete(argparse.Namespace(root_path="x", num_classes=2, class_weights="inverse"))
    with pytest.raises(InputError, match="needs the voxels of each class"):
        SegmentationLoss.from_flags(args, torch.device("cpu"), ALONE)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--loss dice --class_weights inverse", "--class_weights inverse has no effect with"),
        ("--boundary_param 0.01", "--boundary_param 0.01 has no effect with --loss ce+dice"),
        ("--loss ce --dice_param 0.5", "--dice_param 0.5 has no effect with --loss ce"),
        ("--loss dice --dice_param 0.5", "--dice_param 0.5 has no effect with --loss dice"),
    ],
)
def test_flags_without_effect_are_refused(flags: str, told: str, tmp_path: Path):
    argv = ["--root_path", str(tmp_path), *TINY_FLAGS, *flags.split()]
    with pytest.raises(InputError, match=told.replace("+", r"\+")):
        train.main(argv)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    torch.save(tiny_sam(num_classes=8).state_dict(), folder / "base.pth")
    return write_slices(folder)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["focal+dice", "ce+dice+boundary"])
def test_two_ranks_train_as_one_process_and_the_log_names_the_terms(
    loss: str, data: Path, tmp_path: Path
):
    runs = []
    for ranks, split in ((1, ("--batch_size", "4")), (2, ("--batch_size", "2", "--n_gpu", "2"))):
        flags = [*TINY_FLAGS, "--ckpt", str(data / "base.pth"), *split, "--max_iterations", "4"]
        flags += ["--loss", loss, "--class_weights", "inverse", "--root_path", str(data)]
        output = tmp_path / str(ranks)
        argv, log = [*flags, "--output", str(output)], tmp_path / f"{ranks}.log"
        assert processes.run(argv, log, ranks) == [0] * ranks, log.read_text()
        (folder,) = output.iterdir()
        assert "weights of the classes in the loss: background " in (folder / "log.txt").read_text()
        assert (folder / "curves.png").is_file()
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        runs.append([record for record in records if "lr" in record])
    names = {"loss", *(f"loss_{name}" for name in loss.split("+"))}
    for one, two in zip(*runs, strict=True):
        assert {name for name in one if name.startswith("loss")} == names
        for name in names:
            assert two[name] == pytest.approx(one[name], abs=1e-5)
