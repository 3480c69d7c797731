"""Which mask heads a fine-tuned network takes from the base weights, and which start fresh."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import TINY_FLAGS, tiny_sam, write_slices
from golden_rule import read_json

import train
from common.errors import InputError
from config.flags import train_parser
from config.settings import parse_args
from segment_anything import Sam, sam_model_registry
from utils import build_model

HEADS = ("mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head")
# Of SAM's three masks and their common one.
OF_SAM = {
    name
    for name in read_json("sam_vit_b_keys.json")
    if name.startswith("mask_decoder.") and any(head in name for head in HEADS)
}
LAST = {f"mask_decoder.iou_prediction_head.layers.2.{kind}" for kind in ("weight", "bias")}
TOKENS = {"mask_decoder.mask_tokens.weight"}


def networks_of(*numbers: int) -> set[str]:
    """The names of the hypernetworks of these masks."""
    return {
        f"mask_decoder.output_hypernetworks_mlps.{number}.layers.{layer}.{kind}"
        for number in numbers
        for layer in range(3)
        for kind in ("weight", "bias")
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A SAM of random weights at 64 px with its three masks, and its file."""
    sam = tiny_sam(image_size=64, num_classes=3)
    for parameter in sam.parameters():
        torch.nn.init.normal_(parameter)
    path = tmp_path_factory.mktemp("base") / "base.pth"
    torch.save(sam.state_dict(), path)
    return path, sam.state_dict()


def equal_heads(sam: Sam, state: dict[str, torch.Tensor]) -> set[str]:
    """The head tensors of a network that have the values of the base file."""
    return {
        name
        for name, value in sam.state_dict().items()
        if name in OF_SAM and value.shape == state[name].shape and torch.equal(value, state[name])
    }


def load(path: Path, **kwargs: object) -> Sam:
    return sam_model_registry["vit_tiny"](
        **{"image_size": 64, "num_classes": 8, "checkpoint": path} | kwargs
    )[0]


def test_sam_has_31_head_tensors():
    assert len(OF_SAM) == 31
    assert (
        TOKENS
        | LAST
        | networks_of(0, 1, 2, 3)
        | {
            f"mask_decoder.iou_prediction_head.layers.{layer}.{kind}"
            for layer in (0, 1)
            for kind in ("weight", "bias")
        }
        == OF_SAM
    )


@pytest.mark.parametrize("image_size", [64, 32])
@pytest.mark.parametrize(
    ("classes", "fresh_of_sam", "count"),
    [
        (8, TOKENS | LAST, 28),  # the published recipe
        (13, TOKENS | LAST, 28),
        (3, set(), 31),  # as many masks as SAM
        (2, TOKENS | LAST | networks_of(3), 22),
        (1, TOKENS | LAST | networks_of(2, 3), 16),
    ],
)
def test_every_head_tensor_that_fits_is_the_base_files(
    base, classes: int, fresh_of_sam: set[str], count: int, image_size: int
):
    path, state = base
    sam = load(path, num_classes=classes, image_size=image_size)
    found = equal_heads(sam, state)
    assert len(found) == count and found == OF_SAM - fresh_of_sam
    assert sam.head_start.startswith(f"{count} of 31 tensors from the base file; fresh: ")
    named = sam.head_start.split("fresh: ")[1].split(", ")
    expected = [f"output_hypernetworks_mlps.{number}" for number in range(4, classes + 1)]
    if classes != 3:
        expected += ["mask_tokens.weight"] + [name.split("decoder.")[1] for name in LAST]
    assert sorted(named) == sorted(expected or ["none"])


def test_the_fresh_tensors_are_those_of_a_network_without_base_weights(base):
    torch.manual_seed(7)
    without = load(None).state_dict()
    torch.manual_seed(7)
    found = load(base[0]).state_dict()
    fresh = TOKENS | LAST | networks_of(4, 5, 6, 7, 8)
    assert all(torch.equal(found[name], without[name]) for name in fresh)


def test_fresh_heads_on_request(base):
    path, state = base
    sam = load(path, num_classes=3, keep_mask_heads=False)
    # The biases of a fresh layer are random too, so no tensor is equal by chance.
    assert equal_heads(sam, state) == set()
    assert sam.head_start.startswith("0 of 31 tensors")
    rest = {name for name in state if name not in OF_SAM}
    assert all(torch.equal(sam.state_dict()[name], state[name]) for name in rest)


def test_sam_itself_needs_all_of_its_heads(base):
    path, state = base
    sam = load(path, num_classes=3, keep_mask_heads=True)
    assert all(torch.equal(value, state[name]) for name, value in sam.state_dict().items())
    with pytest.raises(InputError, match=r"missing mask_decoder\.output_hypernetworks_mlps\.4"):
        load(path, num_classes=8, keep_mask_heads=True)


@pytest.mark.parametrize("module", ["encoder", "encoder_mask_decoder"])
@pytest.mark.parametrize("flag", [[], ["--fresh_heads"]])
def test_both_variants_and_the_flag(base, module: str, flag: list[str]):
    path, state = base
    flags = ["--root_path", "x", *TINY_FLAGS, "--ckpt", str(path), *flag]
    args = parse_args(train_parser(), [*flags, "--module", f"sam_lora_image_{module}"])
    model, _ = build_model(args, torch.device("cpu"))
    assert isinstance(model, import_module(args.module).LoRA_Sam)
    assert len(equal_heads(model.sam, state)) == (0 if flag else 28)


@pytest.mark.slow
def test_a_run_logs_its_heads_and_an_older_run_is_continued(base, tmp_path: Path):
    data = write_slices(tmp_path / "data", count=4)
    flags = ["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS]
    flags += ["--ckpt", str(base[0]), "--batch_size", "2", "--max_epochs", "1"]
    train.main(flags)
    (run,) = (tmp_path / "out").iterdir()
    assert "heads: 28 of 31 tensors from the base file; fresh: " in (run / "log.txt").read_text()
    assert "freshheads" not in run.name
    config = json.loads((run / "config.json").read_text())
    assert config["fresh_heads"] is False
    train.main(["--resume", str(run)])
    train.main([*flags, "--fresh_heads"])
    (other,) = {*(tmp_path / "out").iterdir()} - {run}
    assert "_freshheads_" in other.name
    assert "heads: 0 of 31 tensors" in (other / "log.txt").read_text()
    with pytest.raises(InputError, match="--fresh_heads False → True"):
        train.main(["--resume", str(run), "--fresh_heads"])

    del config["fresh_heads"]  # as in a run of a version in which all heads started fresh
    (run / "config.json").write_text(json.dumps(config))
    train.main(["--resume", str(run)])
    assert json.loads((run / "config.json").read_text())["fresh_heads"] is True
