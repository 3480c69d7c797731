"""The forms of an update, scaled or with trained lengths: against float64, and in every program."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, randomise_updates, tiny_model, tiny_sam, write_slices
from test_datasets import write_volume_h5
from test_older_modules import importable, older_model  # noqa: F401
from torch import nn

import predict
import sam_lora_image_encoder
import sam_lora_image_encoder_mask_decoder
import test as test_program
import train
from common.errors import InputError
from config import flags
from config.settings import parse_args
from datasets.scans.volumes import Geometry, write_volume
from evaluation.cpu_speed import pack_encoder
from lora import LoRAModel, Update
from lora.adapter_file import read_adapter
from lora.form import UpdateForm
from lora.layers import LoRALinear, inference_weight
from tools import adapter
from trainer import make_optimizer
from utils import build_model

VARIANTS = [sam_lora_image_encoder, sam_lora_image_encoder_mask_decoder]
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
FORMS = {
    "alpha": (UpdateForm(alpha=6), 6 / 2),
    "rslora": (UpdateForm("rslora"), math.sqrt(2)),
    "rslora, alpha": (UpdateForm("rslora", 6), 6 / math.sqrt(2)),
    "dora": (UpdateForm("dora"), 1.0),
    "dora, alpha": (UpdateForm("dora", 6), 6 / 2),
}
forms = pytest.mark.parametrize(("form", "scale"), FORMS.values(), ids=FORMS.keys())


def randomise(model: nn.Module) -> None:
    """Give every B and every length of a network or a layer a value of its own."""
    randomise_updates(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".magnitude"):
                parameter.mul_(0.5 + torch.rand_like(parameter))


def layer_of(form: UpdateForm, *, bias: bool = True) -> LoRALinear:
    """Return a fused layer 8 -> (q|k|v of 5 each) with updates of rank 2 on q and v."""
    layer = LoRALinear(nn.Linear(8, 15, bias=bias), rank=2, parts=3, updated=(0, 2))
    layer.set_form(form, 2, None, 0)
    randomise(layer)
    return layer


def expected_weight(layer: LoRALinear, kind: str, scale: float) -> np.ndarray:  # (15, 8)
    """Compute the weight with its updates row by row in float64."""
    rows = layer.weight.detach().numpy().astype(np.float64).copy()
    for part, branch in layer.updates.items():
        down, up = (m.weight.detach().numpy().astype(np.float64) for m in (branch.down, branch.up))
        for row in range(5):
            place = 5 * int(part) + row
            rows[place] += scale * sum(up[row, i] * down[i] for i in range(2))
            if kind == "dora":
                rows[place] *= float(branch.magnitude.detach()[row]) / math.sqrt(
                    (rows[place] ** 2).sum()
                )
    return rows


@forms
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_the_formula_and_leaves_the_other_rows(form, scale, bias):
    layer = layer_of(form, bias=bias)
    weight = expected_weight(layer, form.kind, scale)
    x = torch.randn(4, 3, 8)
    expected = x.numpy().astype(np.float64) @ weight.T
    expected += layer.bias.detach().numpy() if bias else 0
    assert np.allclose(layer(x).detach().numpy(), expected, rtol=0, atol=2e-6)
    assert np.allclose(inference_weight(layer).numpy(), weight, rtol=0, atol=1e-6)
    # k has no update: not one bit of its rows changes.
    assert torch.equal(layer.folded_weight()[5:10], layer.weight[5:10])
    plain = nn.functional.linear(x.flatten(0, 1), layer.weight, layer.bias)
    assert torch.equal(layer(x).flatten(0, 1)[:, 5:10], plain[:, 5:10])
    layer.merge()
    assert np.allclose(layer(x).detach().numpy(), expected, rtol=0, atol=2e-6)


def test_the_published_form_multiplies_by_nothing():
    layer = layer_of(UpdateForm())
    _, up = layer.low_rank()
    assert torch.equal(
        up,
        torch.block_diag(
            layer.updates["0"].up.weight, torch.zeros(5, 0), layer.updates["2"].up.weight
        ),
    )
    assert UpdateForm(alpha=2).scale(2) == UpdateForm().scale(7) == 1
    model = tiny_model()
    model.set_form(UpdateForm())
    assert not any("magnitude" in name for name in model.state_dict())


def test_the_gradient_of_dora_cuts_the_norm():
    """Section 4.3 of the paper: the length of a row is a constant for the gradient."""
    layer = layer_of(UpdateForm("dora", 6)).double()
    x = torch.randn(7, 8, dtype=torch.float64)
    target = torch.randn(7, 15, dtype=torch.float64)
    (layer(x) * target).sum().backward()
    found = {name: p.grad for name, p in layer.named_parameters()}
    parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    loss = 0
    for part in (0, 1, 2):
        rows = slice(5 * part, 5 * part + 5)
        weight = parameters["weight"][rows]
        if part != 1:
            up, down, m = (
                parameters[f"updates.{part}.{name}"]
                for name in ("up.weight", "down.weight", "magnitude")
            )
            weight = weight + 3 * up @ down
            weight = (m / weight.detach().norm(dim=1))[:, None] * weight
        loss = loss + ((x @ weight.T + parameters["bias"][rows]) * target[:, rows]).sum()
    loss.backward()
    for name, parameter in parameters.items():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("module", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_starts_as_the_base_to_the_last_bit(module, dtype):
    sam = tiny_sam().eval()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        before = sam(IMAGES)["low_res_logits"]
        model = module.LoRA_Sam(sam, 2).eval()
        model.set_form(UpdateForm("dora"))
        found = model(IMAGES)["low_res_logits"]
    assert torch.equal(found, before)
    for update in model.updates:
        layer = sam.get_submodule(update.layer)
        rows = layer.weight.detach().double().unflatten(0, (update.parts, -1))[update.part]
        lengths = (rows**2).sum(1).sqrt()
        assert torch.allclose(model.adapter_state()[update.magnitude].double(), lengths, rtol=1e-6)
    randomise(model)
    model.reset_parameters()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert torch.equal(model(IMAGES)["low_res_logits"], before)


def test_a_row_of_zeros_stays_finite():
    layer = LoRALinear(nn.Linear(8, 15), rank=2, parts=3, updated=(0, 2))
    nn.init.zeros_(layer.weight)
    layer.set_form(UpdateForm("dora"), 2, None, 0)
    x = torch.randn(3, 8)
    out = layer(x)
    assert torch.equal(out, layer.bias.expand(3, -1))
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert layer.folded_weight().isfinite().all()


@forms
@pytest.mark.parametrize("module", VARIANTS)
@torch.no_grad()
def test_merged_packed_and_plain_networks_compute_the_same(module, form, scale):
    del scale
    model = module.LoRA_Sam(tiny_sam(), 2).eval()
    randomise_updates(model)
    published = model(IMAGES)["low_res_logits"]
    model.set_form(form)
    randomise(model)
    expected = model(IMAGES)["low_res_logits"]
    assert not torch.allclose(expected, published, rtol=0, atol=1e-3)
    plain = tiny_sam().eval()
    plain.load_state_dict(model.plain_state())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.merge()
    merged = model(IMAGES)["low_res_logits"]
    model.unmerge()
    assert torch.equal(model(IMAGES)["low_res_logits"], expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.merge()
    pack_encoder(model)
    for found in (merged, model(IMAGES)["low_res_logits"], plain(IMAGES)["low_res_logits"]):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_half_precision_does_not_round_the_lengths():
    layer = LoRALinear(nn.Linear(64, 64), rank=2, parts=1, updated=(0,))
    layer.set_form(UpdateForm("dora"), 2, None, 0)
    x = torch.randn(4096, 64)

    @torch.no_grad()
    def mean_product() -> float:
        plain = x @ layer.weight.T
        with torch.autocast("cpu", torch.bfloat16):
            return float(((layer(x).float() - layer.bias) * plain).mean())

    before = mean_product()
    with torch.no_grad():
        layer.updates["0"].magnitude.mul_(1.01)  # bfloat16 has 1.0078 and 1.0156
    assert mean_product() / before == pytest.approx(1.01, abs=5e-4)


def test_the_key_of_the_lengths_follows_from_that_of_a():
    keys = {"w_a_000": "w_m_000", "cti_a_003": "cti_m_003", "fati_qa": "fati_qm", "A": "A_m"}
    for down, magnitude in keys.items():
        assert Update("layer", 0, 1, down=down, up="b").magnitude == magnitude


def test_lengths_have_no_weight_decay():
    """Decay would pull them to 0, where A and B go back to the base weights."""
    model = tiny_model()
    assert len(make_optimizer(model, "adamw", 1).param_groups) == 1
    model.set_form(UpdateForm("dora"))
    for name, decay in (("adamw", 0.1), ("sgd", 1e-4)):
        optimizer = make_optimizer(model, name, 0.1)
        decayed, lengths = optimizer.param_groups
        assert decayed["weight_decay"] == decay and lengths["weight_decay"] == 0
        assert len(lengths["params"]) == len(model.updates)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == set(map(id, trained))
        before = [p.detach().clone() for p in lengths["params"]]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, lengths["params"], strict=True))


def model_of(form: UpdateForm) -> LoRAModel:
    torch.manual_seed(5)
    model = tiny_model()
    model.set_form(form)
    return model


@pytest.mark.parametrize("settings", [None, {"num_classes": 2}])
@pytest.mark.parametrize(
    ("saved", "built", "told"),
    [
        (UpdateForm("dora"), UpdateForm(), "form dora, this .* with lora; pass --lora_kind dora"),
        (UpdateForm(), UpdateForm("dora"), "form lora, this .* with dora; pass --lora_kind lora"),
        (UpdateForm("rslora"), UpdateForm(), "form rslora, this"),
        (UpdateForm(alpha=8), UpdateForm(), "LoRA alpha 8, this .* with 2; pass --lora_alpha 8"),
        (UpdateForm(), UpdateForm(alpha=8), "LoRA alpha 2, this .* with 8; pass --lora_alpha 2"),
    ],
)
def test_an_adapter_of_another_form_is_refused(saved, built, told, settings, tmp_path):
    model_of(saved).save_lora_parameters(tmp_path / "a.pth", settings)
    model = model_of(built)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=told):
        model.load_lora_parameters(tmp_path / "a.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_alpha_equal_to_the_rank_is_the_published_scale(tmp_path):
    model_of(UpdateForm(alpha=2)).save_lora_parameters(tmp_path / "a.pth", {})
    settings = model_of(UpdateForm()).load_lora_parameters(tmp_path / "a.pth")
    assert settings["lora_alpha"] is None  # as the flags write it, so test.py takes the file
    model_of(UpdateForm()).save_lora_parameters(tmp_path / "plain.pth")
    assert read_adapter(tmp_path / "plain.pth")[1] == {}  # nothing but the published keys


def test_a_module_that_computes_its_own_updates_takes_no_form():
    model = older_model()
    model.set_form(UpdateForm())
    for form in (UpdateForm("dora"), UpdateForm(alpha=8), UpdateForm(dropout=0.1)):
        with pytest.raises(InputError, match=r"older_lora computes its updates by itself, so --lo"):
            model.set_form(form)


@pytest.mark.slow
@pytest.mark.parametrize("module", VARIANTS)
def test_a_run_of_dora_trains_its_lengths_and_every_program_rebuilds_it(
    module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    data = write_slices(tmp_path / "data", count=4)
    torch.save(tiny_sam(num_classes=8).state_dict(), "base.pth")
    name = module.__name__
    argv = ["--root_path", str(data), *TINY_FLAGS, "--ckpt", "base.pth", "--module", name]
    argv += "--lora_kind dora --lora_alpha 4 --AdamW --base_lr 0.01 --batch_size 2".split()
    argv += "--max_epochs 3 --save_steps 1".split()
    train.main([*argv, "--output", "whole", "--max_iterations", "4"])
    train.main([*argv, "--output", "two", "--max_iterations", "2"])
    (whole,), (two,) = Path("whole").iterdir(), Path("two").iterdir()
    assert "_dora_" in whole.name and "_alpha4_" in whole.name
    train.main(["--resume", str(two), "--max_iterations", "4"])
    file = max(whole.glob("epoch_*.pth"))
    assert file.read_bytes() == (two / file.name).read_bytes()

    state, settings = read_adapter(file)
    assert (settings["lora_kind"], settings["lora_alpha"]) == ("dora", 4)
    test_flags = ["--lora_ckpt", str(file), "--ckpt", "base.pth", "--device", "cpu"]
    args = parse_args(flags.test_parser(), ["--volume_path", "data", *test_flags])
    model = build_model(args, torch.device("cpu"))[0].eval()
    assert model.form == UpdateForm("dora", 4)
    fresh = build_model(parse_args(flags.train_parser(), argv), torch.device("cpu"))[0]
    for update in model.updates:
        moved = (state[update.magnitude] - fresh.adapter_state()[update.magnitude]).abs().max()
        assert torch.equal(state[update.magnitude], model.adapter_state()[update.magnitude])
        # The gradient of the first step is 0 in no layer.
        assert moved > 1e-4, update.magnitude

    adapter.main(["convert", str(file), "a.safetensors"])
    adapter.main(["convert", "a.safetensors", "back.pth"])
    assert read_adapter("back.pth")[1] == settings
    assert all(torch.equal(v, state[k]) for k, v in read_adapter("back.pth")[0].items())
    adapter.main(["merge", "merged.pth", *test_flags])
    plain = tiny_sam(num_classes=8).eval()
    plain.load_state_dict(torch.load("merged.pth", weights_only=True))
    expected = model(IMAGES)["low_res_logits"]
    difference = (plain(IMAGES)["low_res_logits"] - expected).abs().max()
    assert difference <= 1e-4 * expected.abs().max()

    scan = np.random.default_rng(0).integers(-200, 300, (2, 40, 40)).astype(np.int16)
    write_volume("scan.nii.gz", scan, Geometry.unknown())
    predict.main(["--input", "scan.nii.gz", "--output", "predicted", *test_flags])
    write_volume_h5(data)
    (data / "lists" / "test_vol.txt").write_text("case0001\n")
    test_program.main(["--volume_path", str(data), "--output_dir", "tested", *test_flags])
    assert json.loads(Path("tested/results.json").read_text())["cases"]
