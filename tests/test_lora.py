"""Properties of the low-rank updates and of the adapter file."""

from __future__ import annotations

import pytest
import torch
from conftest import randomise_updates, tiny_model, tiny_sam
from torch import nn

import sam_lora_image_encoder
import sam_lora_image_encoder_mask_decoder
from common.errors import InputError
from lora.layers import LoRALinear

VARIANTS = [sam_lora_image_encoder, sam_lora_image_encoder_mask_decoder]


def test_key_projection_never_moves():
    linear = nn.Linear(8, 24)
    layer = LoRALinear(linear, rank=2, parts=3, updated=(0, 2))
    tokens = torch.randn(1, 3, 3, 8)  # (B, H, W, C)
    before = linear(tokens)
    assert torch.equal(layer(tokens), before)
    for update in layer.updates.values():
        nn.init.normal_(update.up.weight)
    moved = (layer(tokens) - before).abs().amax(dim=(0, 1, 2)).reshape(3, 8)  # (q|k|v, C)
    assert moved[1].max() == 0
    assert moved[0].min() > 0 and moved[2].min() > 0


@pytest.mark.parametrize("module", VARIANTS)
def test_updates_start_at_zero(module):
    sam, images = tiny_sam().eval(), torch.rand(1, 3, 64, 64)
    before = sam(images)["low_res_logits"]
    assert torch.equal(module.LoRA_Sam(sam, 2)(images)["low_res_logits"], before)


@pytest.mark.parametrize("module", VARIANTS)
def test_merging_keeps_the_output_and_is_undone_exactly(module):
    model = module.LoRA_Sam(tiny_sam(), 2).eval()
    randomise_updates(model)
    images = torch.rand(2, 3, 64, 64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = model(images)["low_res_logits"]
    model.merge()
    merged = model(images)["low_res_logits"]
    assert not torch.equal(merged, before)
    assert (merged - before).abs().max() <= 1e-4 * before.abs().max()
    model.unmerge()
    assert torch.equal(model(images)["low_res_logits"], before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("module", VARIANTS)
def test_only_the_adapter_trains(module):
    model = module.LoRA_Sam(tiny_sam(), 2)
    trained = {
        id(tensor)
        for tensor in model._adapter_tensors().values()
        if isinstance(tensor, nn.Parameter)
    }
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("module", VARIANTS)
def test_save_and_load_give_the_same_logits(module, tmp_path):
    sam = tiny_sam()
    base = {key: value.clone() for key, value in sam.state_dict().items()}
    model = module.LoRA_Sam(sam, 2).eval()
    randomise_updates(model)
    model.save_lora_parameters(tmp_path / "adapter.pth", settings={"num_classes": 2})

    other = tiny_sam()
    encoder_and_frozen = [key for key in base if key.startswith("image_encoder.")]
    encoder_and_frozen += [key for key in base if "mask_decoder.transformer" in key]
    other.load_state_dict({key: base[key] for key in encoder_and_frozen}, strict=False)
    restored = module.LoRA_Sam(other, 2).eval()
    settings = restored.load_lora_parameters(tmp_path / "adapter.pth")
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(restored(images)["masks"], model(images)["masks"])
    assert settings["num_classes"] == 2 and settings["rank"] == 2


def test_loading_undoes_a_merge(tmp_path):
    model, images = tiny_model().eval(), torch.rand(1, 3, 64, 64)
    model.save_lora_parameters(tmp_path / "adapter.pth")
    expected = model(images)["masks"]
    randomise_updates(model)
    model.merge()
    model.load_lora_parameters(tmp_path / "adapter.pth")
    assert torch.equal(model(images)["masks"], expected)


def test_an_adapter_of_a_network_trained_from_scratch_needs_nothing_else(tmp_path):
    model = tiny_model().eval()
    model.train_all_weights()
    model.save_lora_parameters(tmp_path / "all.pth")
    torch.manual_seed(99)
    restored = tiny_model().eval()
    restored.load_lora_parameters(tmp_path / "all.pth")
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(restored(images)["masks"], model(images)["masks"])


@pytest.mark.parametrize("module", VARIANTS)
@pytest.mark.parametrize("lora_layer", [[1, 3], [3, 1], (3, 1, 3), {1, 3}])
def test_lora_layer_selects_blocks_in_the_order_of_the_network(module, lora_layer):
    model = module.LoRA_Sam(tiny_sam(), 2, lora_layer=lora_layer)
    updates = [update for update in model.updates if update.down.startswith("w_a_")]
    assert [(u.layer.split(".")[2], u.part, u.down) for u in updates] == [
        ("1", 0, "w_a_000"),
        ("1", 2, "w_a_001"),
        ("3", 0, "w_a_002"),
        ("3", 2, "w_a_003"),
    ]
    assert "w_a_003" in model.adapter_state() and "w_a_004" not in model.adapter_state()
    assert isinstance(model.sam.image_encoder.blocks[0].attn.qkv, nn.Linear)


def test_an_empty_lora_layer_means_all_blocks():
    model = sam_lora_image_encoder.LoRA_Sam(tiny_sam(), 2, lora_layer=[])
    assert len(model.updates) == 2 * 4


def test_a_block_that_the_encoder_lacks_is_refused():
    with pytest.raises(InputError, match=r"blocks 4, expected 0…3"):
        sam_lora_image_encoder.LoRA_Sam(tiny_sam(), 2, lora_layer=[0, 4])


@pytest.mark.parametrize("module", VARIANTS)
def test_the_matrices_stand_in_the_originals_lists(module):
    """q of the first block, v of the first block, q of the second block, …"""
    model = module.LoRA_Sam(tiny_sam(), 2)
    state = model.adapter_state()
    for letter, layers in (("a", model.w_As), ("b", model.w_Bs)):
        assert len(layers) == 8 and all(isinstance(layer, nn.Linear) for layer in layers)
        for index, layer in enumerate(layers):
            key = f"w_{letter}_{index:03d}"
            assert layer.weight.data_ptr() == state[key].data_ptr()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {f"module.{k}": v for k, v in state.items()},
    ],
)
def test_an_adapter_inside_a_checkpoint_is_found(wrap, tmp_path):
    model = tiny_model()
    model.save_lora_parameters(tmp_path / "adapter.pth")
    expected = torch.load(tmp_path / "adapter.pth", weights_only=True)
    torch.save(wrap(expected), tmp_path / "wrapped.pth")
    other = tiny_model()
    randomise_updates(other)
    other.load_lora_parameters(tmp_path / "wrapped.pth")
    assert all(torch.equal(value, expected[k]) for k, value in other.adapter_state().items())


def test_a_whole_network_with_lora_layers_is_no_adapter(tmp_path):
    torch.save(tiny_model().state_dict(), tmp_path / "all.pth")
    with pytest.raises(InputError, match="whole network with LoRA layers; pass the file that save"):
        tiny_model().load_lora_parameters(tmp_path / "all.pth")


@pytest.mark.parametrize(
    ("build", "cause"),
    [
        (lambda: tiny_model(rank=3), r"LoRA rank 2.*--rank 2"),
        (lambda: tiny_model(num_classes=5), r"number of classes 2.*--num_classes 2"),
        (
            lambda: sam_lora_image_encoder_mask_decoder.LoRA_Sam(tiny_sam(), 2),
            r"variant sam_lora_image_encoder.*--module sam_lora_image_encoder$",
        ),
        (
            lambda: sam_lora_image_encoder.LoRA_Sam(tiny_sam(), 2, lora_layer=[0]),
            r"does not fit.*w_a_002",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(build, cause, tmp_path):
    tiny_model().save_lora_parameters(tmp_path / "adapter.pth")
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=cause):
        model.load_lora_parameters(tmp_path / "adapter.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_adapter_of_other_base_weights_is_refused(tmp_path):
    model = tiny_model()
    model.sam.base_fingerprint = "a" * 16
    model.save_lora_parameters(tmp_path / "adapter.pth", settings={})
    model.load_lora_parameters(tmp_path / "adapter.pth")
    model.sam.base_fingerprint = "b" * 16
    with pytest.raises(InputError, match="base weights"):
        model.load_lora_parameters(tmp_path / "adapter.pth")


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_must_be_positive(rank: int):
    with pytest.raises(InputError, match="rank"):
        tiny_model(rank=rank)
