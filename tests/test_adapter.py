"""Adapters for other classes, as safetensors and back, merged into a plain SAM checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY_FLAGS, randomise_updates, tiny_model, tiny_sam, write_slices

import sam_lora_image_encoder
import sam_lora_image_encoder_mask_decoder
import train
from common.errors import InputError
from config.flags import train_parser
from config.settings import parse_args
from datasets.registry import SYNAPSE
from lora import LoRAModel
from lora.adapter_file import read_adapter
from segment_anything import sam_model_registry
from tools import adapter
from utils import build_model

VARIANTS = [sam_lora_image_encoder, sam_lora_image_encoder_mask_decoder]
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def save_adapter(
    folder: Path, classes: list[str], module=sam_lora_image_encoder, every: bool = True
) -> tuple[LoRAModel, Path]:
    """Save a tiny adapter for these classes with its settings; return network and file."""
    model = module.LoRA_Sam(tiny_sam(num_classes=len(classes)), 2).eval()
    randomise_updates(model)
    if every:
        model.train_all_weights()
    settings = {"vit_name": "vit_tiny", "img_size": 64, "num_classes": len(classes)}
    path = folder / "a.pth"
    model.save_lora_parameters(path, settings | {"class_names": classes, "rate": 0.005})
    return model, path


def run(*argv: object) -> int:
    """Run the program in this process and return its exit code."""
    try:
        adapter.main(list(map(str, argv)))
    except SystemExit as stop:
        return int(stop.code)
    return 0


@pytest.mark.parametrize("every", [False, True])
def test_heads_of_the_same_name_move(tmp_path: Path, every: bool):
    old, path = save_adapter(tmp_path, ["liver", "left_kidney", "aorta"], every=every)
    new = tiny_model(num_classes=4).eval()
    if every:
        new.train_all_weights()
    else:  # both need the same frozen encoder
        new.sam.image_encoder.load_state_dict(old.sam.image_encoder.state_dict())
    fresh = new.adapter_state()["mask_decoder.mask_tokens.weight"].clone()
    wanted = ["tumour", "Left Kidney", "spleen", "Liver"]
    new.load_lora_parameters(path, (["liver", "left_kidney", "aorta"], wanted))
    assert new.moved_heads == [["Left Kidney", "Liver"], ["tumour", "spleen"]]
    tokens = [model.sam.mask_decoder.mask_tokens.weight for model in (old, new)]
    assert torch.equal(tokens[1][[0, 2, 4]], tokens[0][[0, 2, 1]])
    assert torch.equal(tokens[1][[1, 3]], fresh[[1, 3]])
    mlps = [model.sam.mask_decoder.output_hypernetworks_mlps for model in (old, new)]
    for there, here in ((0, 0), (2, 2), (1, 4)):
        for a, b in zip(mlps[0][there].parameters(), mlps[1][here].parameters(), strict=True):
            assert torch.equal(a, b)
    before = old.adapter_state()
    heads = ("mask_tokens", "hypernetworks", "iou_prediction_head.layers.2")
    for key, value in new.adapter_state().items():
        assert any(head in key for head in heads) or torch.equal(value, before[key])


def test_another_order_moves_by_name_and_gives_the_same_logits(tmp_path: Path):
    old, path = save_adapter(tmp_path, ["a", "b"])
    new = tiny_model(num_classes=2).eval()
    new.train_all_weights()
    new.load_lora_parameters(path, (["a", "b"], ["b", "a"]))
    with torch.no_grad():
        before, after = (model(IMAGES)["low_res_logits"] for model in (old, new))
    # The tokens attend to each other, so their order changes only rounding.
    assert (after[:, [0, 2, 1]] - before).abs().max() < 1e-4


def test_names_that_cannot_be_told_apart(tmp_path: Path):
    _, path = save_adapter(tmp_path, ["a", "b"])
    with pytest.raises(InputError, match="there twice"):
        tiny_model(num_classes=2).load_lora_parameters(path, (["a", "b"], ["x y", "X_Y"]))
    with pytest.raises(InputError, match="does not fit its 3 classes"):
        tiny_model(num_classes=2).load_lora_parameters(path, (["a", "b", "c"], ["a", "b"]))


@pytest.mark.slow
def test_training_goes_on_from_other_classes(tmp_path: Path):
    _, path = save_adapter(tmp_path, ["liver", "tumour"])
    data = write_slices(tmp_path / "data")
    flags = ["--lora_ckpt", str(path), "--batch_size", "2", "--max_epochs", "1"]
    train.main(["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS, *flags])
    (folder,) = (tmp_path / "out").iterdir()
    log = (folder / "log.txt").read_text()
    assert "moved liver; fresh spleen, right kidney, left kidney" in log
    assert read_adapter(folder / "epoch_0.pth")[1]["class_names"] == list(SYNAPSE.class_names)


@pytest.mark.slow
def test_training_goes_on_from_an_adapter_that_names_no_classes(tmp_path: Path):
    """All heads stay as they are because the number of classes is the same."""
    model = tiny_model(num_classes=3)
    model.train_all_weights()
    model.save_lora_parameters(tmp_path / "plain.pth")
    data = write_slices(tmp_path / "data")
    spec = SYNAPSE.of_plain_classes(3)
    (data / "dataset_spec.json").write_text(json.dumps(spec.to_json()))
    argv = ["--root_path", str(data), *TINY_FLAGS, "--lora_ckpt", str(tmp_path / "plain.pth")]
    args = parse_args(train_parser(), argv)
    loaded, _ = build_model(args, torch.device("cpu"), move_heads=True)
    assert loaded.moved_heads == []
    state, _ = read_adapter(tmp_path / "plain.pth")
    assert all(torch.equal(v, state[k]) for k, v in loaded.adapter_state().items())


@pytest.mark.parametrize("module", VARIANTS)
def test_safetensors_there_and_back(tmp_path: Path, module):
    _, path = save_adapter(tmp_path, ["a", "ö b"], module, every=False)
    there, back = tmp_path / "b.safetensors", tmp_path / "c.pth"
    assert run("convert", path, there) == 0 and run("convert", there, back) == 0
    original = read_adapter(path)
    for copy in (there, back):
        state, settings = read_adapter(copy)
        assert settings == original[1] and state.keys() == original[0].keys()
        assert all(
            torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in original[0].items()
        )
    model = module.LoRA_Sam(tiny_sam(), 2)
    model.load_lora_parameters(there)
    assert torch.equal(model.adapter_state()["w_a_000"], original[0]["w_a_000"])


@pytest.mark.slow
@pytest.mark.parametrize("module", VARIANTS)
def test_merged_is_a_plain_sam(tmp_path: Path, module, capsys: pytest.CaptureFixture[str]):
    model, path = save_adapter(tmp_path, ["a", "b"], module)
    assert run("merge", tmp_path / "m.pth", "--lora_ckpt", path) == 0
    assert "SHA-256" in capsys.readouterr().out
    sam, _ = sam_model_registry["vit_tiny"](
        image_size=64,
        num_classes=2,
        checkpoint=tmp_path / "m.pth",
        pixel_mean=[0, 0, 0],
        pixel_std=[1, 1, 1],
        keep_mask_heads=True,
    )
    assert sam.state_dict().keys() == tiny_sam().state_dict().keys()
    with torch.no_grad():
        plain, unmerged = sam.eval()(IMAGES)["masks"], model(IMAGES)["masks"]
        model.merge()
        merged = model(IMAGES)["masks"]
    assert torch.equal(plain, merged) and (plain - unmerged).abs().max() < 1e-4


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, path = save_adapter(tmp_path, ["liver", "spleen"])
    assert run("show", path) == 0
    shown = capsys.readouterr().out
    assert "classes: 2: liver, spleen" in shown and "rank: 2" in shown
    assert "every weight" in shown and '"img_size": 64' in shown


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, path = save_adapter(tmp_path, ["a", "b"], every=False)
    safe = tmp_path / "a.safetensors"
    run("convert", path, safe)
    cut, odd = tmp_path / "cut.safetensors", tmp_path / "odd.safetensors"
    cut.write_bytes(safe.read_bytes()[:-100])
    content = bytearray(safe.read_bytes())
    start = content.index(b'samed_settings":"{')
    content[start + 17] = ord("x")
    odd.write_bytes(content)
    huge = tmp_path / "huge.safetensors"
    huge.write_bytes(b"\xff" * 8 + safe.read_bytes()[8:])
    for argv, told in (
        (("show", tmp_path / "none.pth"), "does not exist"),
        (("show", cut), "not a readable safetensors"),
        (("show", huge), "not a readable safetensors"),
        (("show", odd), "settings that are not JSON"),
        (("convert", path, tmp_path / "b.onnx"), "expected .pth or .safetensors"),
        (("convert", path, safe), "exists; choose another"),
        (("merge", tmp_path / "m.txt", "--lora_ckpt", path), "expected .pth"),
        (("merge", tmp_path / "m.pth", "--lora_ckpt", path), "base weights"),
        (("merge", tmp_path / "m.pth", "--lora_ckpt", path, "--rank", 0), "--rank is 0"),
    ):
        assert run(*argv) == 2, argv
        shown = capsys.readouterr().err
        assert told in shown and "Traceback" not in shown, (argv, shown)
    assert not (tmp_path / "m.pth").exists()
    assert json.loads(json.dumps(read_adapter(safe)[1]))["rate"] == 0.005
