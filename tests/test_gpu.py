"""What only a CUDA device can show; skipped where there is none."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, tiny_model, write_slices
from golden_rule import assert_golden, golden_images, golden_model, read_npz
from knobs import GROUPS

import train
from benchmarks.plain import PlainAttention
from common.files import sha256_of
from config.settings import complete
from correction.predictor import WAYS, OrganPredictor
from correction.prompts import Box, Click
from evaluation.predict_volume import predict_volume
from segment_anything.modeling import relative_attention
from trainer import StepOptions, freeze_unreached, make_optimizer, training_step
from training.batches import augmented_batch
from training.losses import SegmentationLoss
from training.optimizers import parameters_of
from training.recording import UNRECORDABLE, RecordedGradients
from utils import allow_tf32, seed_everything

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def as_the_programs_compute() -> Iterator[None]:
    """Repeatable kernels and exact products, however an earlier test left the settings."""
    seed_everything(0, deterministic=True)
    allow_tf32(False)
    yield
    seed_everything(0, deterministic=False)
    allow_tf32(False)


@torch.no_grad()
def test_outputs_equal_the_reference_on_the_gpu():
    expected = read_npz("model_vit_b_224_encoder.npz")
    outputs = golden_model(224).eval().cuda()(golden_images(224).cuda(), True, 224)
    assert_golden(outputs["low_res_logits"].cpu(), expected["low_res_logits"])


def test_a_training_step_waits_for_nothing():
    """Augmentation, network, loss and optimiser: no synchronising call (fp16 alone needs one)."""
    args = complete(argparse.Namespace(root_path="x", num_classes=2, img_size=64))
    model = tiny_model().cuda().train()
    freeze_unreached(model)
    criterion, optimizer = SegmentationLoss(3, 0.8), make_optimizer(model, "adamw", 1e-3)
    options = StepOptions(clip_grad=1.0, amp_dtype=torch.bfloat16)
    slices = {
        "image": torch.rand(6, 40, 40).pin_memory(),
        "label": torch.randint(0, 3, (6, 40, 40), dtype=torch.uint8).pin_memory(),
        "index": list(range(6)),
    }

    def step(epoch: int) -> None:
        batch = augmented_batch(slices, epoch, args, 16, torch.device("cuda"))
        training_step(model, batch, criterion, optimizer, 1e-3, options)

    for epoch in range(40):  # matrices and rotations are made and kept
        step(epoch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for epoch in range(40):
            step(epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("grid", [16, 28, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms_of_attention_equal_the_plain_one(grid: int, dtype: torch.dtype):
    layer = relative_attention.Attention(96, 3, grid, 14).cuda()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, grid, grid, 96, device="cuda")
    expected = PlainAttention(layer)(x)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found = layer(x).float()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--use_amp"],
        ["--tf32"],
        ["--compile"],
        ["--cuda_graph"],
        ["--use_amp", "--cuda_graph", "--deterministic", "0", "--ema", "0.9"],
    ],
)
def test_training_runs_on_the_gpu(flags: list[str], tmp_path: Path):
    data = write_slices(tmp_path / "data")
    common = ["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS]
    short = ["--batch_size", "2", "--max_epochs", "2", "--stop_epoch", "2", "--AdamW"]
    train.main([*common, *short, "--device", "cuda", *flags])
    metrics = next((tmp_path / "out").iterdir()) / "metrics.jsonl"
    losses = [json.loads(line).get("loss", 0.0) for line in metrics.read_text().splitlines()]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_the_same_steps_end_with_the_same_bits(amp_dtype: torch.dtype | None):
    """Strict mode: nothing refuses, and six steps in parts give the same weights twice."""

    def weights_after_six_steps() -> str:
        torch.manual_seed(0)
        model = tiny_model().cuda().train()
        freeze_unreached(model)
        criterion = SegmentationLoss(3, 0.8)
        optimizer = make_optimizer(model, "adamw", 1e-3)
        for _ in range(6):
            batch = {
                "image": torch.rand(6, 3, 64, 64, device="cuda"),
                "low_res_label": torch.randint(0, 3, (6, 16, 16), device="cuda"),
            }
            options = StepOptions(at_once=4, clip_grad=1.0, amp_dtype=amp_dtype)
            training_step(model, batch, criterion, optimizer, 1e-3, options)
        state = [p.detach().cpu().numpy().tobytes() for p in model.parameters() if p.requires_grad]
        return hashlib.sha256(b"".join(state)).hexdigest()

    assert weights_after_six_steps() == weights_after_six_steps()


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_a_recorded_step_computes_the_same_bits(amp_dtype: torch.dtype | None):
    """Batches of two sizes in turns, as an epoch has them, and a clipped gradient."""
    models = [tiny_model().cuda().train()]
    models.append(copy.deepcopy(models[0]))
    found = []
    for model, records in zip(models, (False, True), strict=True):
        freeze_unreached(model)
        optimizer = make_optimizer(model, "adamw", 1e-3)
        recorded = RecordedGradients(parameters_of(optimizer)) if records else None
        options = StepOptions(clip_grad=1.0, amp_dtype=amp_dtype, recorded=recorded)
        torch.manual_seed(0)
        losses = []
        for size in (4, 4, 2, 4, 2, 4):
            batch = {
                "image": torch.rand(size, 1, 64, 64, device="cuda").expand(-1, 3, -1, -1),
                "low_res_label": torch.randint(0, 3, (size, 16, 16), device="cuda"),
            }
            terms, logits = training_step(
                model, batch, SegmentationLoss(3, 0.8), optimizer, 1e-3, options
            )
            losses.append(terms | {"logits": logits.double().sum()})
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        found.append((weights, torch.stack([x for terms in losses for x in terms.values()])))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("words", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("precision", [[], ["--use_amp"]], ids=["fp32", "bf16"])
def test_every_knob_trains_twice_to_the_same_bits(
    words: str, precision: list[str], base: Path, tmp_path: Path
):
    """Strict mode, so an operator of a knob that cannot repeat itself ends the run."""
    data = write_slices(tmp_path / "data", count=7)
    recipe = ["--batch_size", "4", "--max_epochs", "2", "--stop_epoch", "2", "--name", "run"]
    common = ["--root_path", str(data), *TINY_FLAGS, "--ckpt", str(base), "--device", "cuda"]
    ways = {"once": [], "again": [], "recorded": ["--cuda_graph"]}
    if any(f"--{name} " in words for name in UNRECORDABLE):
        del ways["recorded"]
    hashes = set()
    for name, flags in ways.items():
        output = ["--output", str(tmp_path / name)]
        train.main([*common, *recipe, *precision, *output, *words.split(), *flags])
        hashes.add(sha256_of(tmp_path / name / "run" / "epoch_1.pth"))
    assert len(hashes) == 1


def test_a_volume_gets_the_labels_of_a_cpu():
    model = tiny_model().eval()
    volume = np.random.default_rng(0).random((7, 40, 40), dtype=np.float32)
    sizes = {"input_size": (48, 48), "image_size": (64, 64)}
    expected = predict_volume(model, volume, **sizes)
    assert len(np.unique(expected)) > 1
    found = predict_volume(model.cuda(), volume, **sizes)
    assert (found == expected).mean() > 0.999


@pytest.mark.parametrize("by", WAYS)
def test_prompts_correct_as_on_a_cpu(by: str):
    model = tiny_model().eval()
    model.prompt_prob = 0.5  # it says that it knows prompts
    image = np.random.default_rng(0).random((50, 40), dtype=np.float32)
    prompts = [
        Click(2, 5.0, 30.0),
        Click(1, 20.0, 10.0, inside=False),
        Box(1, 4.0, 6.0, 30.0, 40.0),
    ]
    corrected = []
    for device in ("cpu", "cuda"):
        predictor = OrganPredictor(
            model.to(device), ["liver", "spleen"], input_size=48, img_size=64, by=by
        )
        predictor.set_image(image)
        corrected.append(predictor.correct(prompts))
        assert (corrected[-1] != predictor.labels).any()
    assert (corrected[0] == corrected[1]).mean() > 0.999
