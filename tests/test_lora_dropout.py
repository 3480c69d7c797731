"""Dropout before the updates: what is dropped, and that only slice and layer decide it."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import TINY_FLAGS, randomise_updates, tiny_sam, write_slices
from test_ranks import trained

import sam_lora_image_encoder
import sam_lora_image_encoder_mask_decoder
import train
from common.errors import InputError
from common.tensors import load_tensors
from config.flags import train_parser
from config.settings import complete
from datasets.augmentation import keyed_rng
from lora import LoRAModel
from lora.form import SliceDropout, UpdateForm
from lora.layers import LoRALinear
from trainer import StepOptions, freeze_unreached, make_optimizer, training_step
from training import batches
from training.losses import SegmentationLoss

VARIANTS = [sam_lora_image_encoder, sam_lora_image_encoder_mask_decoder]
SEEDS = [3, 2**62 + 11, 5, 2**40]


def network(module=sam_lora_image_encoder_mask_decoder, side: int = 64, share: float = 0.3):
    """Return a network in training whose updates are not zero."""
    torch.manual_seed(5)
    model = module.LoRA_Sam(tiny_sam(image_size=side), 2)
    randomise_updates(model)
    model.set_form(UpdateForm(alpha=16, dropout=share))
    freeze_unreached(model)
    return model.train()


def low_res(model: LoRAModel, images: torch.Tensor, seeds: list[int]) -> torch.Tensor:
    model.seed_dropout(seeds)
    return model(images, full_size_masks=False)["low_res_logits"]


def gradients(model: LoRAModel, options: StepOptions) -> list[torch.Tensor]:
    """Return the gradients of one step with four slices, and its logits."""
    generator = torch.Generator().manual_seed(1)
    batch = {
        "image": torch.rand(4, 3, 64, 64, generator=generator),
        "low_res_label": torch.randint(0, 3, (4, 16, 16), generator=generator),
        "seeds": SEEDS,
    }
    twin = copy.deepcopy(model)
    optimizer = make_optimizer(twin, "sgd", 0)
    _, logits = training_step(twin, batch, SegmentationLoss(3, 0.8), optimizer, 0, options)
    return [logits, *(p.grad for p in twin.parameters() if p.requires_grad)]


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_of_the_values_is_zero_and_the_others_grow(share: float, dtype: torch.dtype):
    drop = SliceDropout(share)
    tokens = torch.rand(4 * 50, 96).to(dtype) + 1
    for drop.seeds in (SEEDS, None):  # None: PyTorch's own generator
        found = drop(tokens, 0)
        zeros = found == 0
        for part in zeros.chunk(4):
            deviation = math.sqrt(share * (1 - share) / part.numel())
            assert abs(float(part.float().mean()) - share) < 5 * deviation
        assert found.dtype == dtype
        assert torch.equal(found[~zeros], (tokens * (1 / (1 - share)))[~zeros])


def test_slices_and_layers_have_masks_of_their_own_and_keep_them():
    drop = SliceDropout(0.5)
    ones = torch.ones(4, 64)

    def masks(seeds: list[int], layer: int) -> torch.Tensor:
        drop.seeds = seeds
        return drop(ones[: len(seeds)], layer)

    rows = [row for layer in range(40) for row in masks(SEEDS, layer)]
    for index, row in enumerate(rows):
        for other in rows[:index]:
            # Two of 64 fair coins agree in 32 places, and in 58 once in 10 billion pairs.
            assert 6 < int((row == other).sum()) < 58
    assert torch.equal(masks(SEEDS, 3), masks(SEEDS[::-1], 3).flip(0))
    assert torch.equal(masks(SEEDS[1:3], 3), masks(SEEDS, 3)[1:3])


def test_a_layer_drops_the_input_of_a_alone():
    layer = LoRALinear(torch.nn.Linear(8, 15), rank=2, parts=3, updated=(0, 2))
    for branch in layer.updates.values():
        torch.nn.init.normal_(branch.up.weight)
    drop = SliceDropout(0.4)
    drop.seeds = [7, 8]
    layer.set_form(UpdateForm(alpha=6, dropout=0.4), 2, drop, 5)
    x = torch.randn(6, 3, 8)  # two slices of three windows
    down, up = layer.low_rank()
    dropped = drop(x.flatten(0, 1), 5)
    expected = torch.nn.functional.linear(x.flatten(0, 1), layer.weight, layer.bias)
    expected = (expected + dropped @ down.T @ up.T).view(6, 3, 15)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    layer.eval()
    whole = torch.nn.functional.linear(x, layer.weight + up @ down, layer.bias)
    assert torch.allclose(layer(x), whole, atol=1e-6)


@pytest.mark.parametrize("module", VARIANTS)
@pytest.mark.parametrize("side", [64, 240])  # 240: windows with padding
@torch.no_grad()
def test_a_slice_drops_the_same_alone_and_among_others(module, side: int):
    model = network(module, side)
    images = torch.rand(3, 3, side, side)
    together = low_res(model, images, SEEDS[:3])
    for index in range(3):
        alone = low_res(model, images[index : index + 1], SEEDS[index : index + 1])
        assert torch.allclose(alone[0], together[index], atol=1e-4)
    other = low_res(model, images, [SEEDS[0], SEEDS[1], 99])
    assert torch.allclose(other[:2], together[:2], atol=1e-4)
    assert not torch.allclose(other[2], together[2], atol=4e-3)


@torch.no_grad()
def test_evaluation_and_a_merged_network_drop_nothing():
    model, images = network(), torch.rand(2, 3, 64, 64)
    model.seed_dropout(SEEDS[:2])
    dropped = model(images)["low_res_logits"]
    model.eval()
    expected = model(images)["low_res_logits"]
    assert not torch.allclose(dropped, expected, atol=1e-2)
    model.set_form(UpdateForm(alpha=16))
    assert torch.equal(model(images)["low_res_logits"], expected)
    assert torch.equal(model.train()(images)["low_res_logits"], expected)


@pytest.mark.parametrize("form", ["lora", "dora"])
def test_parts_and_computing_blocks_again_give_the_same_gradients(form: str):
    model = network()
    model.set_form(UpdateForm(form, dropout=0.3))
    whole = gradients(model, StepOptions())
    for at_once in (1, 3):
        for one, other in zip(whole, gradients(model, StepOptions(at_once=at_once)), strict=True):
            atol = 2e-5 * float(one.abs().max()) + 1e-9
            assert torch.allclose(one, other, rtol=1e-3, atol=atol)
    for amp_dtype in (None, torch.bfloat16):
        options = StepOptions(amp_dtype=amp_dtype)
        model.sam.image_encoder.checkpoint_blocks = False
        kept = gradients(model, options)
        model.sam.image_encoder.checkpoint_blocks = True
        again = gradients(model, options)
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_the_seeds_of_a_batch_follow_from_the_slices_and_change_no_augmentation(tmp_path: Path):
    data = write_slices(tmp_path / "data", count=4)
    parsed = train_parser().parse_args(["--root_path", str(data), *TINY_FLAGS])
    args = complete(parsed)
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 3, (40, 40)).astype(np.float32) for _ in range(3)]

    def batch(indices: list[int], epoch: int = 2) -> dict:
        samples = [{"image": labels[i], "label": labels[i], "index": i} for i in indices]
        slices = batches.collate_slices(samples)
        return batches.augmented_batch(slices, epoch, args, 16, torch.device("cpu"))

    plain = batch([0, 1, 2])
    assert "seeds" not in plain
    args.lora_dropout = 0.1
    found = batch([0, 1, 2])
    assert torch.equal(found["image"], plain["image"])
    assert len(set(found["seeds"])) == 3 and all(0 <= seed < 2**63 for seed in found["seeds"])
    assert batch([2, 0])["seeds"] == [found["seeds"][2], found["seeds"][0]]
    assert not set(batch([0, 1, 2], epoch=3)["seeds"]) & set(found["seeds"])
    assert "seeds" not in batch([]) and len(batch([])["image"]) == 0
    args.augment = "none"
    assert batch([1])["seeds"] == [int(keyed_rng(args.seed, 2, 1).integers(2**63))]


def test_without_dropout_nothing_is_drawn_and_seeds_are_refused(monkeypatch):
    model = network(share=0.0)
    assert model.dropout is None
    monkeypatch.setattr(torch, "Generator", None)
    before = torch.get_rng_state()
    model(torch.rand(1, 3, 64, 64, generator=None))
    torch.set_rng_state(before)
    with pytest.raises(InputError, match="built without dropout"):
        model.seed_dropout([1])


def test_it_cannot_be_compiled(tmp_path: Path):
    data = write_slices(tmp_path / "data", count=2)
    argv = ["--root_path", str(data), *TINY_FLAGS, "--output", str(tmp_path / "out")]
    with pytest.raises(InputError, match=r"--lora_dropout .* --compile"):
        train.main([*argv, "--lora_dropout", "0.1", "--compile"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_ranks_and_parts_train_as_one_process_and_a_resumed_run_has_the_same_bits(
    tmp_path: Path,
):
    data = write_slices(tmp_path / "data", count=7)
    torch.save(tiny_sam(num_classes=8).state_dict(), data / "base.pth")
    common = "--lora_dropout 0.4 --lora_alpha 512 --AdamW --warmup".split()
    common += ["--module", "sam_lora_image_encoder_mask_decoder", "--max_iterations", "5"]
    records, weights = trained(data, tmp_path / "one", 1, "--batch_size", "4", *common)
    plain = [flag if flag != "0.4" else "0" for flag in common]
    found, _ = trained(data, tmp_path / "plain", 1, "--batch_size", "4", *plain)
    changed = [abs(a["loss"] - b["loss"]) for a, b in zip(records, found, strict=True)]
    assert max(changed) > 1e-4  # far more than the rounding that is allowed below
    for ranks, flags in (
        (2, ("--batch_size", "2", "--n_gpu", "2")),
        (1, ("--batch_size", "3", "--global_batch", "4")),
    ):
        found, same = trained(data, tmp_path / f"ranks{ranks}", ranks, *flags, *common)
        losses = [[record["loss"] for record in run] for run in (records, found)]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
        for key, value in weights.items():
            if isinstance(value, torch.Tensor):
                assert torch.allclose(value, same[key], rtol=0, atol=1e-4), (ranks, key)
    first = ["--batch_size", "4", *common[:-1]]
    trained(data, tmp_path / "two", 1, *first, "3")
    (folder,) = (tmp_path / "two").iterdir()
    # As many threads as the run before had: sums of another order round differently.
    log = tmp_path / "resumed.log"
    argv = ["--resume", str(folder), "--max_iterations", "5"]
    assert processes.run(argv, log, 1) == [0], log.read_text()
    resumed = load_tensors(max(folder.glob("epoch_*.pth")))
    for key, value in weights.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed[key]), key
