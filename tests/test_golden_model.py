"""Parity of the network with the reference implementation."""

from __future__ import annotations

import pytest
import torch
from golden_rule import (
    MODULES,
    assert_golden,
    golden_images,
    golden_model,
    golden_tensor,
    read_json,
    read_npz,
    set_adapter,
)

from sam_lora_image_encoder import LoRA_Sam
from segment_anything import sam_model_registry

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "variant"), [(224, "encoder"), (224, "encoder_decoder"), (512, "encoder")]
)
@torch.no_grad()
def test_outputs_equal_the_reference(size: int, variant: str):
    expected = read_npz(f"model_vit_b_{size}_{variant}.npz")
    model = golden_model(size, variant).eval()
    images = golden_images(size)
    embeddings = []
    model.sam.image_encoder.register_forward_hook(lambda _, __, out: embeddings.append(out))
    for merged in (False, True):
        if merged:
            model.merge()
        outputs = model(images, True, size)
        assert_golden(embeddings[-1][:, :8], expected["image_embedding_slice"])
        assert_golden(embeddings[-1].mean(dim=(2, 3)), expected["image_embedding_mean"])
        assert_golden(outputs["low_res_logits"], expected["low_res_logits"])
        assert_golden(outputs["iou_predictions"], expected["iou_predictions"])
        assert_golden(outputs["masks"].double().sum(dim=(2, 3)), expected["masks_sum"])


@pytest.mark.parametrize(
    ("size", "variant"), [(224, "encoder"), (224, "encoder_decoder"), (512, "encoder")]
)
def test_parameter_counts(size: int, variant: str):
    expected = read_json(f"params_vit_b_{size}_{variant}.json")
    model = golden_model(size, variant)
    counts = {
        "total": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    assert counts == expected


@pytest.mark.parametrize("vit", ["vit_b", "vit_l", "vit_h"])
def test_state_dict_has_the_public_keys_and_shapes(vit: str):
    with torch.device("meta"):
        sam, side = sam_model_registry[vit](image_size=1024, num_classes=3, checkpoint=None)
    shapes = {key: list(value.shape) for key, value in sam.state_dict().items()}
    assert shapes == read_json(f"sam_{vit}_keys.json")
    assert side == 64


@pytest.mark.parametrize("variant", MODULES)
def test_adapter_file_has_the_published_keys(variant: str, tmp_path):
    model = golden_model(512, variant)
    expected = read_json(f"adapter_keys_{variant}.json")
    model.save_lora_parameters(tmp_path / "plain.pth")
    plain = torch.load(tmp_path / "plain.pth", weights_only=True)
    assert {key: list(value.shape) for key, value in plain.items()} == expected
    model.save_lora_parameters(tmp_path / "with_settings.pth", settings={"num_classes": 8})
    complete = torch.load(tmp_path / "with_settings.pth", weights_only=True)
    assert complete.keys() - expected.keys() == {"samed_settings"}
    assert expected.keys() <= complete.keys()


@pytest.mark.parametrize("size", [224, 512])
@torch.no_grad()
def test_loading_a_1024_px_checkpoint(size: int, tmp_path):
    state = {
        key: golden_tensor(key, tuple(shape))
        for key, shape in read_json("sam_vit_b_keys.json").items()
    }
    torch.save(state, tmp_path / "sam_vit_b.pth")
    sam, _ = sam_model_registry["vit_b"](
        image_size=size,
        num_classes=8,
        checkpoint=tmp_path / "sam_vit_b.pth",
        pixel_mean=[0, 0, 0],
        pixel_std=[1, 1, 1],
    )
    expected = read_npz(f"load_1024_to_{size}.npz")
    blocks = sam.image_encoder.blocks
    assert_golden(sam.image_encoder.pos_embed[..., :16], expected["pos_embed_slice"])
    assert_golden(blocks[2].attn.rel_pos_h, expected["rel_pos_h_2"])
    assert_golden(blocks[11].attn.rel_pos_w, expected["rel_pos_w_11"])
    assert_golden(blocks[0].attn.rel_pos_h, expected["rel_pos_h_0"])

    for name, tensor in sam.state_dict(keep_vars=True).items():
        fresh = ("mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head")
        if any(part in name for part in fresh):
            tensor.copy_(golden_tensor(name, tuple(tensor.shape)))
    model = LoRA_Sam(sam, 4).eval()
    set_adapter(model)
    logits = model(golden_images(size), True, size, full_size_masks=False)["low_res_logits"]
    assert_golden(logits, expected["low_res_logits"])
