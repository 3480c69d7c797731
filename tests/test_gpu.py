"""What only a CUDA device can show; skipped where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, write_slices
from golden_rule import assert_golden, golden_images, golden_model, read_npz

import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@torch.no_grad()
def test_outputs_equal_the_reference_on_the_gpu():
    expected = read_npz("model_vit_b_224_encoder.npz")
    outputs = golden_model(224).eval().cuda()(golden_images(224).cuda(), True, 224)
    assert_golden(outputs["low_res_logits"].cpu(), expected["low_res_logits"])


@pytest.mark.parametrize("flags", [[], ["--use_amp"], ["--tf32"], ["--compile"]])
def test_training_runs_on_the_gpu(flags: list[str], tmp_path: Path):
    data = write_slices(tmp_path / "data")
    common = ["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS]
    short = ["--batch_size", "2", "--max_epochs", "2", "--stop_epoch", "2", "--AdamW"]
    train.main([*common, *short, "--device", "cuda", *flags])
    metrics = next((tmp_path / "out").iterdir()) / "metrics.jsonl"
    losses = [json.loads(line).get("loss", 0.0) for line in metrics.read_text().splitlines()]
    assert np.isfinite(losses).all()
