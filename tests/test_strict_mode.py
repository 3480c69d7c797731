"""Deterministic mode is strict, nothing of the programs refuses in it, and it fills no memory."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_FLAGS, tiny_model, tiny_sam, write_slices
from launches import as_on_gpu
from refused_operators import BY_OPERATOR, REFUSED, RefusalWatch
from torch.profiler import ProfilerActivity, profile

import train
from config.settings import complete
from evaluation.predict_volume import predict_volume
from lora import LoRAModel
from sam_lora_image_encoder_mask_decoder import LoRA_Sam as WithDecoder
from trainer import StepOptions, freeze_unreached, make_optimizer, training_step
from training.batches import augmented_batch
from training.losses import SegmentationLoss
from utils import seed_everything

SIDE, CLASSES = 64, 2


@pytest.fixture
def strict() -> Iterator[None]:
    """Deterministic mode as the programs set it, and the earlier settings afterwards."""
    mode = torch.get_deterministic_debug_mode()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    seed_everything(0, deterministic=True)
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fills
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn


def with_updates_in_the_decoder() -> LoRAModel:
    return WithDecoder(tiny_sam(), 2)


def with_every_weight() -> LoRAModel:
    model = tiny_model()
    model.train_all_weights()
    return model


def with_checkpointed_blocks() -> LoRAModel:
    model = tiny_model()
    model.sam.image_encoder.checkpoint_blocks = True
    return model


def one_step(model: LoRAModel, options: StepOptions, *, adamw: bool, foreach: bool = True) -> None:
    """Augment a batch of five slices of two sizes, and make an update with it."""
    freeze_unreached(model)
    optimizer = make_optimizer(model, "adamw" if adamw else "sgd", 1e-3)
    for group in optimizer.param_groups:  # as on a GPU
        group["foreach"] = foreach
    args = complete(argparse.Namespace(root_path="x", num_classes=CLASSES, img_size=SIDE))
    slices = {
        "image": [torch.rand(40, 40), torch.rand(40, 50), *torch.rand(3, 40, 40)],
        "label": [torch.randint(0, CLASSES + 1, (40, width)) for width in (40, 50, 40, 40, 40)],
        "index": list(range(5)),
    }
    batch = augmented_batch(slices, 0, args, SIDE // 4, torch.device("cpu"))
    criterion = SegmentationLoss(CLASSES + 1, 0.8)
    training_step(model, batch, criterion, optimizer, 1e-3, options)


STEPS: dict[str, Callable[[], None]] = {
    "LoRA, AdamW, clipped": lambda: one_step(
        as_on_gpu(tiny_model()), StepOptions(clip_grad=1.0, skip_not_finite=True), adamw=True
    ),
    "LoRA, SGD, in parts": lambda: one_step(
        as_on_gpu(tiny_model()), StepOptions(at_once=2), adamw=False
    ),
    "LoRA in the decoder": lambda: one_step(
        as_on_gpu(with_updates_in_the_decoder()), StepOptions(), adamw=True
    ),
    "every weight, bf16": lambda: one_step(
        as_on_gpu(with_every_weight()), StepOptions(amp_dtype=torch.bfloat16), adamw=True
    ),
    "scaled fp16": lambda: one_step(
        as_on_gpu(tiny_model()),
        StepOptions(clip_grad=1.0, amp_dtype=torch.float16, scaler=torch.amp.GradScaler("cpu")),
        adamw=True,
    ),
    "checkpointed blocks": lambda: one_step(
        as_on_gpu(with_checkpointed_blocks()), StepOptions(at_once=3), adamw=True
    ),
    "as on a CPU": lambda: one_step(tiny_model(), StepOptions(), adamw=True, foreach=False),
}


@pytest.mark.parametrize("what", STEPS)
def test_no_operator_of_a_training_step_refuses(what: str, strict: None):
    with RefusalWatch() as watch:
        STEPS[what]()
    assert watch.refused == set()
    # The backward pass was watched too, and so was the augmentation.
    assert {
        "nll_loss2d_backward",
        "native_layer_norm_backward",
        "index_select",
    } <= watch.seen.keys()


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_no_operator_of_inference_refuses(amp_dtype: torch.dtype | None, strict: None):
    """In inference mode, operators that consist of others would arrive whole at the watch."""
    model, found = as_on_gpu(tiny_model()).eval(), []
    volume = np.random.default_rng(0).random((3, 50, 40), dtype=np.float32)
    autocast = torch.autocast("cpu", amp_dtype, enabled=amp_dtype is not None)
    with torch.no_grad(), autocast, RefusalWatch() as watch:
        for flips in ((), (0, 1)):
            predict_volume.__wrapped__(
                model,
                volume,
                input_size=(40, 40),
                image_size=(SIDE, SIDE),
                flips=flips,
                on_probabilities=lambda start, part: found.append(part),
            )
    assert watch.refused == set()
    # Of two batches: the logits, plain and in four ways, and twice the probabilities.
    assert watch.seen["upsample_bilinear2d"] == 2 * (1 + 4 + 2)
    assert {tuple(part.shape[1:]) for part in found} == {(CLASSES + 1, 50, 40)}


@pytest.mark.slow
def test_no_operator_of_a_training_run_refuses(
    strict: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Training, validation, the pictures and the scalars of the log, and the saved states."""
    build = train.build_model
    monkeypatch.setattr(
        train, "build_model", lambda *a, **k: (lambda m, s: (as_on_gpu(m), s))(*build(*a, **k))
    )
    data = write_slices(tmp_path / "data", cases=3)
    common = ["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS]
    short = ["--batch_size", "4", "--max_epochs", "1", "--stop_epoch", "1", "--val_every", "1"]
    with RefusalWatch() as watch:
        train.main([*common, *short, "--AdamW", "--clip_grad", "1"])
    assert watch.refused == set()
    assert watch.seen["nll_loss2d_backward"] > 0 and watch.seen["upsample_bilinear2d"] > 0
    assert torch.get_deterministic_debug_mode() == 2


def test_the_watch_sees_what_refuses():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    with RefusalWatch() as watch:
        F.cross_entropy(logits, labels, reduction="none").sum().backward()
        labels.cumsum(0), torch.bincount(labels.flatten()), logits.median()
    assert watch.refused == set()
    with RefusalWatch() as watch:
        F.cross_entropy(logits, labels, reduction="sum")
        F.interpolate(logits, (8, 8), mode="bilinear").sum().backward()
        logits.cumsum(0), logits.median(0), torch.bincount(labels.flatten(), torch.ones(32))
    assert watch.refused == {
        "nll_loss2d_forward",
        "upsample_bilinear2d_backward",
        "cumsum",
        "median",
        "bincount",
    }


def test_the_table_has_every_operator_that_the_documentation_names():
    text = torch.use_deterministic_algorithms.__doc__
    refusing = text.split("operations will throw a")[1].split("In addition")[0]
    named = set(re.findall(r"^ {8}\* :(?:class|func):`[\w.]*?(\w+)`", refusing, re.MULTILINE))
    assert len(named) > 20
    assert named <= {row.named for row in REFUSED}
    assert [name for name in BY_OPERATOR if not hasattr(torch.ops.aten, name)] == []


def test_the_mode_is_strict_for_compiled_and_for_eager_programs(strict: None):
    before = torch.get_deterministic_debug_mode()
    for compiles in (False, True):
        seed_everything(0, deterministic=True, compiles=compiles)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        seed_everything(0, deterministic=False, compiles=compiles)
        assert not torch.are_deterministic_algorithms_enabled()
    torch.set_deterministic_debug_mode(before)


@pytest.mark.parametrize(
    ("before", "after"), [(None, ":4096:8"), (":16:8", ":16:8"), (":0:0", ":4096:8")]
)
def test_products_work_in_memory_that_makes_them_repeatable(
    before: str | None, after: str, strict: None, monkeypatch: pytest.MonkeyPatch
):
    """PyTorch refuses every product on a GPU with another value (`Context.cpp`)."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if before is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before)
    seed_everything(0, deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == after


def fills(deterministic: bool) -> int:
    """Return how often memory is filled in a training step, counted by the profiler."""
    seed_everything(0, deterministic=deterministic)
    model = as_on_gpu(tiny_model())
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        one_step(model, StepOptions(), adamw=True)
    names = [event.name for event in profiler.events()]
    assert names.count("aten::empty") > 100
    return names.count("aten::fill_")


def test_deterministic_mode_fills_no_uninitialised_memory(strict: None):
    plain = fills(deterministic=False)
    assert fills(deterministic=True) == plain
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_deterministic_debug_mode("error")
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        one_step(as_on_gpu(tiny_model()), StepOptions(), adamw=True)
    filled = [event.name for event in profiler.events()].count("aten::fill_")
    assert filled > plain + 100  # what PyTorch's default costs, and what this test would see


def test_cross_entropy_is_the_sum_of_its_pixels():
    logits = torch.randn(3, 4, 7, 5, requires_grad=True)
    labels = torch.randint(0, 4, (3, 7, 5))
    terms = SegmentationLoss(4, dice_weight=0.0)(logits, labels)
    exact = logits.detach().double().numpy()
    picked = np.take_along_axis(exact, labels.numpy()[:, None], 1)[:, 0]
    expected = np.mean(np.log(np.exp(exact).sum(1)) - picked)
    assert terms["loss_ce"].item() == pytest.approx(expected, rel=1e-6)
    terms["loss"].backward()
    softmax = np.exp(exact) / np.exp(exact).sum(1, keepdims=True)
    truth = np.eye(4)[labels.numpy()].transpose(0, 3, 1, 2)
    assert np.abs(logits.grad.numpy() - (softmax - truth) / labels.numel()).max() < 1e-7


PROGRAM = """
import torch
from common.errors import exit_on_bad_input
from utils import seed_everything
with exit_on_bad_input():
    seed_everything(0, deterministic=True)
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
"""


def test_an_operator_of_a_users_own_network_that_refuses_is_one_sentence():
    """`put_` refuses on a CPU too."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr == (
        "error: this device cannot repeat put_, which the network uses, bit for bit; pass "
        "--deterministic 0, or use another operator in the network\n"
    )
