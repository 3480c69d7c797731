"""Properties of the network beyond the golden numbers."""

from __future__ import annotations

import re
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import randomise_updates, tiny_model, tiny_sam
from golden_rule import MODULES
from safetensors.torch import save_file

from benchmarks.plain import PlainAttention, plain_copy
from common.errors import InputError, MissingFileError
from evaluation.cpu_speed import can_pack, pack_encoder
from segment_anything import ENCODERS, Sam, SamPredictor, sam_model_registry
from segment_anything.modeling import relative_attention
from segment_anything.modeling.relative_attention import Attention
from trainer import freeze_unreached

PLAIN_GRIDS = [  # grid, window
    (14, None),
    (1, None),  # one token
    (14, 14),  # one whole window
    (28, 14),  # whole windows
    (5, 14),  # one window, mostly padding
    (16, 7),
    (15, 14),  # windows of one row and one column
]


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize(("grid", "window"), PLAIN_GRIDS)
def test_attention_equals_the_plain_form(
    grid: int, window: int | None, device_type: str, monkeypatch: pytest.MonkeyPatch
):
    """A GPU's form and a CPU's: what SAM writes down, and its gradients."""
    monkeypatch.setattr(relative_attention, "CHUNK", 3 * min(grid, window or grid) ** 4 // 2)
    layer = Attention(12, 3, grid, window).double()
    layer.device_type = device_type
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, grid, grid, 12, dtype=torch.double, requires_grad=True)
    weights = torch.randn(2, grid, grid, 12, dtype=torch.double)
    found, expected = layer(x), PlainAttention(layer)(x)
    assert torch.allclose(found, expected, atol=1e-12)
    inputs = [x, *layer.parameters()]
    pairs = zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    )
    assert all(torch.allclose(fast, plain, atol=1e-10) for fast, plain in pairs)


@pytest.mark.parametrize("variant", ["encoder", "encoder_decoder"])
def test_the_network_and_its_gradients_equal_the_plain_form(variant: str):
    model = import_module(MODULES[variant]).LoRA_Sam(tiny_sam(image_size=240), 2)
    randomise_updates(model)
    freeze_unreached(model)
    images = torch.rand(2, 3, 240, 240)
    plain = plain_copy(model)
    gradients = []
    for network in (model, plain):
        outputs = network(images)
        outputs["low_res_logits"].square().mean().backward()
        gradients.append((outputs, [p.grad for p in network.parameters() if p.requires_grad]))
    (fast, fast_grads), (slow, slow_grads) = gradients
    assert torch.allclose(fast["masks"], slow["masks"], atol=1e-4)
    for one, other in zip(fast_grads, slow_grads, strict=True):
        assert torch.allclose(one, other, atol=1e-3 * float(other.abs().max()) + 1e-9)
    model.merge()
    with torch.inference_mode():
        assert torch.allclose(model(images)["masks"], slow["masks"], atol=1e-4)


@torch.inference_mode()
@pytest.mark.skipif(not can_pack(torch.device("cpu")), reason="this PyTorch packs no weights")
@pytest.mark.parametrize("size", [16, 64, 240])
def test_packed_weights_give_the_same_output(size: int):
    model, images = tiny_model(image_size=size).eval(), torch.rand(3, 3, size, size)
    model.merge()
    expected = model(images)["masks"]
    pack_encoder(model)
    layers = [m for m in model.sam.image_encoder.modules() if isinstance(m, torch.nn.Linear)]
    assert layers == []
    for batch in (3, 1):  # another number of rows than the first
        found = model(images[:batch])["masks"]
        assert torch.allclose(found, expected[:batch], atol=1e-5)


def test_checkpointed_blocks_give_the_same_gradients():
    model, images = tiny_model(), torch.rand(2, 3, 64, 64)
    gradients = []
    for checkpointed in (False, True):
        model.sam.image_encoder.checkpoint_blocks = checkpointed
        model.zero_grad()
        model(images, full_size_masks=False)["low_res_logits"].square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_batch_equals_its_images_one_by_one():
    sam, images = tiny_sam().eval(), torch.rand(3, 3, 64, 64)
    together = sam(images)
    for index in range(3):
        alone = sam(images[index : index + 1])
        for key in ("low_res_logits", "iou_predictions", "masks"):
            assert torch.allclose(together[key][index], alone[key][0], atol=1e-5)


def test_all_classes_are_returned_whatever_multimask_output_says():
    sam, images = tiny_sam(num_classes=4).eval(), torch.rand(1, 3, 64, 64)
    first, second = sam(images, True, 64), sam(images, False, 64)
    assert first["masks"].shape == (1, 5, 64, 64)
    assert first["low_res_logits"].shape == (1, 5, 16, 16)
    assert torch.equal(first["masks"], second["masks"])
    assert "masks" not in sam(images, full_size_masks=False)


def test_a_smaller_image_is_padded_at_the_bottom_and_right():
    sam, image = tiny_sam(), torch.rand(1, 3, 40, 50)
    padded = sam.preprocess(image)
    assert padded.shape == (1, 3, 64, 64)
    assert torch.equal(padded[..., :40, :50], image)
    assert padded[..., 40:, :].abs().sum() == 0 and padded[..., 50:].abs().sum() == 0


def test_records_equal_the_predictor():
    sam = tiny_sam(image_size=64, num_classes=3).eval()
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    points, labels = np.array([[10.0, 20.0], [40.0, 30.0]]), np.array([1, 0])
    box = np.array([5.0, 6.0, 30.0, 40.0])
    mask_input = rng.standard_normal((1, 16, 16)).astype(np.float32)
    masks, iou, logits = predictor.predict(points, labels, box, mask_input, return_logits=True)
    assert masks.shape == (4, 48, 64) and iou.shape == (4,) and logits.shape == (4, 16, 16)
    record = {
        "image": torch.from_numpy(image).permute(2, 0, 1) / 255,  # tiny_sam takes [0, 1]
        "original_size": (48, 64),
        "point_coords": torch.tensor(points, dtype=torch.float32)[None],
        "point_labels": torch.tensor(labels)[None],
        "boxes": torch.tensor(box, dtype=torch.float32)[None],
        "mask_inputs": torch.from_numpy(mask_input)[None],
    }
    (output,) = sam([record], multimask_output=True)
    assert output["masks"].dtype == torch.bool
    assert np.allclose(output["low_res_logits"][0].numpy(), logits, atol=1e-5)
    assert np.array_equal(output["masks"][0].numpy(), masks > 0)


@pytest.mark.parametrize("prompt", ["points", "box", "mask", "none"])
def test_each_prompt_changes_the_answer(prompt: str):
    sam = tiny_sam(num_classes=3).eval()
    predictor = SamPredictor(sam)
    predictor.set_image(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    plain = predictor.predict(return_logits=True)[0]
    prompts = {
        "points": {"point_coords": np.array([[9.0, 9.0]]), "point_labels": np.array([1])},
        "box": {"box": np.array([4.0, 4.0, 20.0, 20.0])},
        "mask": {"mask_input": np.ones((1, 16, 16), dtype=np.float32)},
        "none": {},
    }
    changed = not np.allclose(predictor.predict(**prompts[prompt], return_logits=True)[0], plain)
    assert changed == (prompt != "none")


def test_predictor_needs_an_image():
    with pytest.raises(RuntimeError, match="set_image"):
        SamPredictor(tiny_sam()).predict()


@pytest.mark.parametrize("vit", ENCODERS)
def test_global_blocks_follow_the_table(vit: str):
    with torch.device("meta"):
        sam, side = sam_model_registry[vit](image_size=320, num_classes=8, checkpoint=None)
    assert side == 20
    for index, block in enumerate(sam.image_encoder.blocks):
        is_global = index in ENCODERS[vit].global_blocks
        assert (block.attn.window is None) == is_global
        assert len(block.attn.rel_pos_h) == (2 * 20 - 1 if is_global else 27)


class TestBaseWeights:
    """Loading a base checkpoint."""

    @staticmethod
    def save(tmp_path, image_size: int = 64, **changes: torch.Tensor) -> tuple[Sam, str]:
        sam = tiny_sam(image_size=image_size, num_classes=3)
        for parameter in sam.parameters():
            torch.nn.init.normal_(parameter)
        path = tmp_path / "base.pth"
        torch.save(sam.state_dict() | changes, path)
        return sam, str(path)

    @staticmethod
    def load(path: str, vit: str = "vit_tiny", **kwargs: object) -> Sam:
        return sam_model_registry[vit](
            **{"image_size": 64, "num_classes": 8} | kwargs, checkpoint=path
        )[0]

    def test_windows_keep_their_relative_positions_at_another_size(self, tmp_path):
        base, path = self.save(tmp_path)
        blocks = self.load(path, image_size=128).image_encoder.blocks
        for index, block in enumerate(base.image_encoder.blocks):
            found = blocks[index].attn.rel_pos_w
            if block.attn.window is None:
                assert len(found) == 2 * 8 - 1
            else:
                assert torch.equal(found, block.attn.rel_pos_w)

    def test_another_encoder_is_named(self, tmp_path):
        _, path = self.save(tmp_path)
        with pytest.raises(InputError, match=r"holds vit_tiny, expected vit_b; pass --vit_name"):
            self.load(path, "vit_b")

    @pytest.mark.parametrize("vit", ["vit_b", "vit_l", "vit_h"])
    def test_a_missing_file_gets_address_and_checksum(self, vit: str, tmp_path):
        public = ENCODERS[vit].weights
        with pytest.raises(MissingFileError, match=re.escape(public.url)) as caught:
            self.load(str(tmp_path / "no.pth"), vit)
        assert public.sha256 in str(caught.value)

    def test_an_unknown_key_is_listed(self, tmp_path):
        _, path = self.save(tmp_path, extra=torch.zeros(1))
        with pytest.raises(InputError, match="unexpected extra; it was saved from a network with"):
            self.load(path)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3},  # MedSAM
            lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}},  # Lightning
            lambda state: {f"module.{k}": v for k, v in state.items()},  # DataParallel
            lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
            lambda state: {"model": {"state_dict": state}, "rng_state": torch.zeros(3)},
            lambda state: state | {"pixel_mean": torch.zeros(3, 1, 1)},
        ],
    )
    def test_weights_inside_a_checkpoint_are_found(self, wrap, tmp_path):
        base, path = self.save(tmp_path, image_size=128)
        torch.save(wrap(base.state_dict()), path)
        loaded = self.load(path, image_size=128, num_classes=3, keep_mask_heads=True)
        assert all(
            torch.equal(value, base.state_dict()[k]) for k, value in loaded.state_dict().items()
        )

    def test_safetensors(self, tmp_path):
        base, _ = self.save(tmp_path)
        save_file(base.state_dict(), tmp_path / "base.safetensors")
        loaded = self.load(str(tmp_path / "base.safetensors"))
        key = "image_encoder.blocks.0.attn.qkv.weight"
        assert torch.equal(loaded.state_dict()[key], base.state_dict()[key])

    @pytest.mark.parametrize(
        ("key", "cause"),
        [
            ("vision_encoder.patch_embed.projection.weight", "names of Hugging Face"),
            ("image_encoder.trunk.patch_embed.proj.weight", "SAM 2"),
            ("image_encoder.patch_embed.seq.0.c.weight", "MobileSAM"),
            ("sam.image_encoder.blocks.0.attn.qkv.qkv.weight", "with LoRA layers inside"),
            ("backbone.conv1.weight", r"no SAM image encoder .*but backbone\.conv1\.weight"),
        ],
    )
    def test_a_foreign_network_is_named(self, key: str, cause: str, tmp_path):
        torch.save({key: torch.zeros(2)}, tmp_path / "other.pth")
        with pytest.raises(InputError, match=cause) as caught:
            self.load(str(tmp_path / "other.pth"), "vit_b")
        known = ENCODERS["vit_b"].weights.url in str(caught.value)
        assert known == (not key.startswith("backbone"))

    def test_a_missing_key_is_listed(self, tmp_path):
        sam = tiny_sam()
        state = sam.state_dict()
        del state["image_encoder.neck.0.weight"]
        torch.save(state, tmp_path / "base.pth")
        with pytest.raises(InputError, match=r"missing image_encoder\.neck\.0\.weight"):
            self.load(str(tmp_path / "base.pth"))

    def test_an_adapter_is_no_base(self, tmp_path):
        torch.save({"w_a_000": torch.zeros(4, 192)}, tmp_path / "adapter.pth")
        with pytest.raises(InputError, match="--lora_ckpt"):
            self.load(str(tmp_path / "adapter.pth"))

    @pytest.mark.parametrize("size", [100, 0, -16])
    def test_image_size_must_be_divisible_by_16(self, size: int):
        with pytest.raises(InputError, match="16"):
            tiny_sam(image_size=size)


def test_shapes_are_printed_once_for_each_input_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("SAMED_DEBUG", "1")
    sam = tiny_sam().eval()
    with torch.no_grad():
        for count in (2, 2, 1):
            sam(torch.rand(count, 3, 64, 64))
    lines = capsys.readouterr().err.splitlines()
    parts = ["patch embedding", "encoder block 0", "encoder block 3", "neck", "prompt encoder"]
    parts += ["decoder transformer", "decoder upscaling", "mask decoder", "network"]
    for part in parts:
        found = [line for line in lines if f"part: '{part}'" in line]
        assert len(found) == 2 and all(line.startswith("shapes | ") for line in found), part
    (neck, _) = (line for line in lines if "'neck'" in line)
    assert "inputs: [(2, 192, 4, 4)], outputs: (2, 256, 4, 4)" in neck
    assert any("'low_res_logits': (1, 3, 16, 16)" in line for line in lines)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_shapes_cost_nothing_when_nobody_asks(value: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SAMED_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("SAMED_DEBUG", value)
    hooks = [
        hook
        for module in tiny_sam().modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert hooks == []
