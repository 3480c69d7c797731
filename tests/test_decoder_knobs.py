"""`--decoder_depth` and `--logits`: where they start, what trains, and how a network is rebuilt."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_FLAGS, randomise_updates, tiny_sam, write_slices
from golden_rule import read_json
from test_datasets import write_volume_h5

import predict
import sam_lora_image_encoder
import sam_lora_image_encoder_mask_decoder
import test as test_program
import train
import trainer
import utils
from common.errors import InputError
from config.flags import test_parser as parser_of_test
from config.flags import train_parser
from config.settings import parse_args
from datasets.scans.volumes import Geometry, read_volume, write_volume
from evaluation.predict_volume import predict_volume
from lora import LoRAModel
from lora.adapter_file import depth_of, logits_of, read_adapter
from segment_anything import DecoderSpec, Sam, SamPredictor, sam_model_registry
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from tools import adapter as adapter_tool
from training.memory import estimate_training_memory

SIDE = 64
IMAGES = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
LAYERS = "mask_decoder.transformer.layers"
FINER = "mask_decoder.output_upscaling.5"
VARIANTS = {"samed": sam_lora_image_encoder, "samed_s": sam_lora_image_encoder_mask_decoder}


def built(depth: int = 2, logits: int = 1, base: Path | None = None, classes: int = 3) -> Sam:
    torch.manual_seed(0)
    sam, _ = sam_model_registry["vit_tiny"](
        image_size=SIDE,
        num_classes=classes,
        checkpoint=base,
        pixel_mean=[0, 0, 0],
        pixel_std=[1, 1, 1],
        decoder=DecoderSpec(depth, logits),
    )
    return sam.eval()


def layer(state: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    start = f"{LAYERS}.{index}."
    return {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base weights in which no tensor, gain or bias is trivial."""
    sam = tiny_sam(image_size=SIDE, num_classes=3)
    for name, value in sam.state_dict().items():
        torch.nn.init.normal_(value, mean="norm" in name, std=0.1)
    path = tmp_path_factory.mktemp("base") / "base.pth"
    torch.save(sam.state_dict(), path)
    return path


def test_the_default_has_sams_tensors_and_random_numbers():
    decoder = {key for key in read_json("sam_vit_b_keys.json") if key.startswith("mask_decoder.")}
    plain = built().state_dict()
    assert {key for key in plain if key.startswith("mask_decoder.")} == decoder
    finer = built(logits=2).state_dict()
    assert finer.keys() - plain.keys() == {f"{FINER}.weight", f"{FINER}.bias"}
    assert equal({key: finer[key] for key in plain}, plain)
    deep = built(depth=6).state_dict()
    assert {key.split(".")[3] for key in deep.keys() - plain.keys()} == {"2", "3", "4", "5"}


@torch.no_grad()
def test_logits_of_twice_the_side_start_as_repeated_pixels():
    plain, finer = built(), built(logits=2)
    pixels = torch.randn(2, 256, 4, 4)
    small, large = (net.mask_decoder.output_upscaling(pixels) for net in (plain, finer))
    assert small.min() < 0  # of a GELU; an activation after the layer would change them
    assert torch.equal(large, small.repeat_interleave(2, 2).repeat_interleave(2, 3))
    expected, found = (net(IMAGES)["low_res_logits"] for net in (plain, finer))
    assert expected.shape == (2, 4, 16, 16) and found.shape == (2, 4, 32, 32)
    # The product with the kernels may add in another order for another number of pixels.
    repeated = expected.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (found - repeated).abs().max() <= 1e-6 * expected.abs().max()
    masks = finer(IMAGES)["masks"]
    assert torch.equal(masks, F.interpolate(found, (SIDE, SIDE), mode="bilinear"))


def test_more_layers_start_as_the_second_of_the_base_file(base: Path):
    file = torch.load(base, weights_only=True)
    plain, deep = built(base=base), built(depth=4, base=base)
    state = deep.state_dict()
    assert all(equal(layer(state, index), layer(file, min(index, 1))) for index in range(4))
    places = {state[f"{LAYERS}.{index}.norm1.weight"].data_ptr() for index in range(4)}
    assert len(places) == 4  # copies, not one layer in several places
    assert deep.base_fingerprint == plain.base_fingerprint is not None
    assert built(logits=2, base=base).base_fingerprint == plain.base_fingerprint


@torch.no_grad()
def test_no_start_makes_a_block_the_identity():
    """Why new layers are copies: without its branches, a block still normalises (post-norm)."""
    block = TwoWayAttentionBlock(32, 4, 64, 2, first_layer=False)
    for name, parameter in block.named_parameters():
        if "out_proj" in name or "lin2" in name:
            torch.nn.init.zeros_(parameter)
    normed = F.layer_norm(torch.randn(1, 50, 32), (32,))
    image, places = torch.randn(1, 9, 32), torch.randn(1, 9, 32)

    def moved(tokens: torch.Tensor) -> float:
        return float((block(tokens, image, tokens, places)[0] - tokens).abs().max())

    gain, shift = 1 + 0.5 * torch.randn(2, 32)
    trained = gain * normed + shift  # what the block before hands on
    assert moved(normed) < 1e-4  # as in a network of random weights
    assert moved(trained) > 0.1
    # The best gain and bias for these tokens, by least squares, do not help.
    for channel in range(32):
        x, y = F.layer_norm(trained, (32,))[0, :, channel], trained[0, :, channel]
        block.norm3.weight[channel] = ((x - x.mean()) * (y - y.mean())).mean() / x.var(correction=0)
        block.norm3.bias[channel] = y.mean() - block.norm3.weight[channel] * x.mean()
    assert moved(trained) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("decoder", [(4, 1), (2, 2), (4, 2)])
def test_prompts_work(decoder: tuple[int, int], base: Path):
    predictors = [SamPredictor(built(*size, base=base)) for size in ((decoder[0], 1), decoder)]
    image = np.random.default_rng(1).integers(0, 256, (48, SIDE, 3), dtype=np.uint8)
    answers = []
    for predictor in predictors:
        predictor.set_image(image)
        _, _, logits = predictor.predict(np.array([[9.0, 9.0]]), np.array([1]))
        prompts = ({}, {"box": np.array([4.0, 4.0, 20.0, 20.0])}, {"mask_input": logits[1:2]})
        found = [predictor.predict(**prompt, return_logits=True) for prompt in prompts]
        assert all(masks.shape == (4, 48, SIDE) for masks, _, _ in found)
        answers.append([logits, *(low_res for _, _, low_res in found)])
    for plain, finer in zip(*answers, strict=True):
        # Logits that return as a prompt are averaged, which here undoes the repetition.
        repeated = plain.repeat(decoder[1], axis=1).repeat(decoder[1], axis=2)
        assert np.abs(finer - repeated).max() <= 1e-4 * np.abs(plain).max()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_slices(tmp_path_factory.mktemp("data"))
    write_volume_h5(folder)
    (folder / "lists" / "test_vol.txt").write_text("case0001\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("module", VARIANTS)
def test_a_run_trains_saves_and_is_rebuilt_without_the_flags(
    module: str, data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    step = trainer.training_step

    def watched(model: LoRAModel, batch: dict[str, torch.Tensor], *rest: object) -> object:
        seen.append((model, batch["low_res_label"].shape[1:]))
        if len(seen) == 5:
            raise KeyboardInterrupt  # in the middle of the second run
        return step(model, batch, *rest)

    monkeypatch.setattr(trainer, "training_step", watched)
    monkeypatch.chdir(tmp_path)
    flags = ["--root_path", str(data), *TINY_FLAGS, "--ckpt", str(base), "--save_steps", "1"]
    flags += ["--module", VARIANTS[module].__name__, "--decoder_depth", "4", "--logits", "2"]
    flags += "--batch_size 3 --max_iterations 3 --AdamW --base_lr 0.05".split()
    train.main([*flags, "--output", "out"])
    (folder,) = Path("out").iterdir()
    assert "_dec4_logits2_" in folder.name
    network = seen[-1][0].eval()
    assert {shape for _, shape in seen} == {(SIDE // 2, SIDE // 2)}
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, "--output", "again"])
    train.main(["--resume", str(next(Path("again").iterdir()))])
    adapter, resumed = (next(Path(top).rglob("epoch_*.pth")) for top in ("out", "again"))
    assert equal(read_adapter(adapter)[0], read_adapter(resumed)[0])

    state, settings = read_adapter(adapter)
    assert (settings["decoder_depth"], settings["logits"]) == (4, 2)
    weight = state[f"{FINER}.weight"]
    assert not torch.equal(weight, torch.eye(32)[:, :, None, None].expand_as(weight))
    if module == "samed":  # The copies went ways of their own.
        second, third, fourth = (layer(state, index) for index in (1, 2, 3))
        assert second.keys() == third.keys() == fourth.keys()
        for key in ("norm1.bias", "mlp.lin1.weight", "cross_attn_token_to_image.v_proj.weight"):
            assert not torch.equal(second[key], third[key])
            assert not torch.equal(third[key], fourth[key])
    else:  # They are frozen and not saved, and their updates are.
        assert not any(key.startswith(LAYERS) for key in state)
        assert {f"sa_b_{index:03d}" for index in range(8)} <= state.keys()
        assert state["sa_b_007"].any()
    flags = ["--lora_ckpt", str(adapter), "--ckpt", str(base), "--device", "cpu"]
    reloaded, side = utils.build_model(parse_args(parser_of_test(), flags), torch.device("cpu"))
    expected = network(IMAGES)["low_res_logits"]
    assert torch.equal(reloaded.eval()(IMAGES)["low_res_logits"], expected)
    assert side == SIDE // 2
    test_program.main(["--volume_path", str(data), "--output_dir", "tested", *flags])
    assert json.loads(Path("tested/results.json").read_text())["cases"]
    scan = np.random.default_rng(0).integers(-125, 275, (2, 40, 40)).astype(np.int16)
    write_volume("scan.nii.gz", scan, Geometry.unknown())
    predict.main(["--input", "scan.nii.gz", "--output", "predicted", *flags])
    found, _ = read_volume("predicted/scan.nii.gz")
    unit = ((scan + 125) / 400).astype(np.float32)  # by the window of Synapse
    expected = predict_volume(network, unit, input_size=(224, 224), image_size=(SIDE, SIDE))
    assert (found == expected).mean() > 0.999  # merged weights round differently


NETWORK = {"vit_name": "vit_tiny", "img_size": SIDE, "num_classes": 2, "class_names": ["a", "b"]}


@pytest.mark.parametrize("module", VARIANTS)
@pytest.mark.parametrize("recorded", [False, True])
def test_an_adapter_of_another_decoder_is_refused(module: str, recorded: bool, tmp_path: Path):
    def load(path: Path, depth: int, logits: int) -> None:
        model = VARIANTS[module].LoRA_Sam(built(depth, logits, classes=2), 2)
        model.load_lora_parameters(path)

    for own, other, told in (
        ((4, 1), (2, 1), "has decoder depth 4, .* built with 2; pass --decoder_depth 4$"),
        ((2, 1), (6, 1), "has decoder depth 2, .* built with 6; pass --decoder_depth 2$"),
        ((2, 2), (2, 1), "has logits 2, .* built with 1; pass --logits 2$"),
        ((2, 1), (2, 2), "has logits 1, .* built with 2; pass --logits 1$"),
    ):
        settings = NETWORK | {"decoder_depth": own[0], "logits": own[1]}
        path = tmp_path / "a.pth"
        model = VARIANTS[module].LoRA_Sam(built(*own, classes=2), 2)
        model.save_lora_parameters(path, settings if recorded else None)
        with pytest.raises(InputError, match=told):
            load(path, *other)
        load(path, *own)


def test_an_adapter_without_decoder_tells_by_its_settings():
    for settings, decoder in (
        ({}, (None, None)),
        ({"rank": 2}, (2, 1)),  # older than the flags
        ({"rank": 2, "decoder_depth": 6, "logits": 2}, (6, 2)),
    ):
        assert (depth_of({}, settings), logits_of({}, settings)) == decoder


@pytest.mark.parametrize("decoder", [(4, 1), (2, 2), (6, 2)])
def test_a_merged_network_is_base_weights_of_its_own_decoder(
    decoder: tuple[int, int], tmp_path: Path
):
    depth, logits = decoder
    model = VARIANTS["samed"].LoRA_Sam(built(depth, logits, classes=2), 2)
    randomise_updates(model)
    model.train_all_weights()
    torch.nn.init.normal_(model.sam.mask_decoder.output_upscaling[-1 if logits == 2 else 3].weight)
    settings = NETWORK | {"decoder_depth": depth, "logits": logits}
    model.save_lora_parameters(tmp_path / "a.pth", settings)
    merged = tmp_path / "merged.pth"
    adapter_tool.main(["merge", str(merged), "--lora_ckpt", str(tmp_path / "a.pth")])
    back = built(depth, logits, base=merged, classes=2)
    assert equal(back.state_dict(), torch.load(merged, weights_only=True))
    flag = f"--decoder_depth {depth}" if depth > 2 else "--logits 2"
    with pytest.raises(InputError, match=f"merged.pth holds a mask decoder .* pass {flag}, or"):
        built(base=merged, classes=2)
    if depth == 4:  # A deeper network starts from SAM's two layers and from no others.
        with pytest.raises(InputError, match="pass --decoder_depth 4, or SAM's own file"):
            built(6, base=merged, classes=2)


def test_a_damaged_file_is_not_completed(base: Path, tmp_path: Path):
    state = torch.load(base, weights_only=True)
    for lacks in ("1.norm4.bias", "0.", "1."):
        kept = {k: v for k, v in state.items() if not k.startswith(f"{LAYERS}.{lacks}")}
        torch.save(kept, tmp_path / "b.pth")
        with pytest.raises(
            InputError, match=rf"missing mask_decoder\.transformer\.layers\.{lacks[0]}"
        ):
            built(4, base=tmp_path / "b.pth")
    torch.save(state | {f"{FINER}.weight": torch.ones(32, 32, 2, 2)}, tmp_path / "b.pth")
    with pytest.raises(InputError, match=rf"missing {FINER}.bias"):
        built(2, 2, base=tmp_path / "b.pth")


def test_a_decoder_of_a_users_own_module_does_not_ignore_the_flags(monkeypatch, base: Path):
    class Own(sam_lora_image_encoder.LoRA_Sam):
        def __init__(self, sam_model: Sam, r: int) -> None:
            sam_model.mask_decoder = tiny_sam(image_size=SIDE, num_classes=8).mask_decoder
            super().__init__(sam_model, r)

    monkeypatch.setattr(utils, "load_variant", lambda name, keywords: Own)
    flags = ["--root_path", "x", *TINY_FLAGS, "--ckpt", str(base)]
    for flag in (["--decoder_depth", "4"], ["--logits", "2"]):
        args = parse_args(train_parser(), [*flags, *flag])
        with pytest.raises(InputError, match=f"{flag[0]} is {flag[1]}, but the LoRA variant"):
            utils.build_model(args, torch.device("cpu"))
    utils.build_model(parse_args(train_parser(), flags), torch.device("cpu"))


def test_scripts_that_do_not_know_the_flags_get_sams_decoder():
    names = {"lora_ckpt": None, "ckpt": "none", "vit_name": "vit_tiny", "img_size": SIDE}
    names |= {"num_classes": 2, "module": "sam_lora_image_encoder", "rank": 2}
    model, side = utils.build_model(argparse.Namespace(**names), torch.device("cpu"))
    assert side == SIDE // 4 and len(model.sam.mask_decoder.transformer.layers) == 2
    for wrong in ((1, 1), (2, 3)):
        with pytest.raises(InputError, match="expected a depth of at least 2, and logits 1 or 2"):
            DecoderSpec(*wrong)


def test_the_memory_estimate_counts_both():
    def needed(*decoder: int) -> float:
        model = VARIANTS["samed"].LoRA_Sam(built(*decoder), 2)
        kwargs = {"batch_size": 8, "img_size": SIDE, "kept": 2, "device_type": "cpu"}
        return sum(estimate_training_memory(model, **kwargs).values())

    assert needed(2, 1) < needed(4, 1) < needed(6, 1)
    assert needed(2, 1) < needed(2, 2)
