"""The memory of a training step: the estimate against tensors with content, and what fits at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_FLAGS, tiny_model, write_slices
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

import train
import trainer
from config.flags import train_parser
from config.settings import complete
from distributed.ranks import ALONE, Ranks
from lora import LoRAModel
from segment_anything.modeling import relative_attention
from segment_anything.modeling.relative_attention import Attention
from trainer import StepOptions, freeze_unreached, make_optimizer, training_step
from training import data_check, memory
from training.losses import SegmentationLoss
from training.memory import GIB, choose_at_once, estimate_training_memory, out_of_memory
from training.resuming import at_once_before, unlike_before

SIDE = 64


def small_model(device_type: str, everything: bool = False) -> LoRAModel:
    model = tiny_model()
    if everything:
        model.train_all_weights()
    freeze_unreached(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.device_type = device_type
    return model.train()


def measured(model: LoRAModel, count: int, options: StepOptions, trace: Path) -> float:
    """Return the GiB that the second of two AdamW steps needs, as the CPU's allocator counts.

    Args:
        trace: file for the profiler.
    """
    batch = {
        "image": torch.rand(count, 3, SIDE, SIDE),
        "low_res_label": torch.randint(0, 3, (count, SIDE // 4, SIDE // 4)),
    }
    criterion = SegmentationLoss(3, 0.8)
    optimizer = make_optimizer(model, adamw=True, base_lr=1e-3)
    for group in optimizer.param_groups:
        group["foreach"] = True  # as on a GPU
    training_step(model, batch, criterion, optimizer, 1e-3, options)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training_step(model, batch, criterion, optimizer, 1e-3, options)
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    most = max(e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]")
    moments = [x for x in tree_leaves(optimizer.state_dict()["state"]) if torch.is_tensor(x)]
    before = [*model.parameters(), *model.buffers(), *moments, batch["image"]]
    return (most + sum(tensor.nbytes for tensor in before)) / GIB


def estimated(model: LoRAModel, count: int, **kwargs: object) -> dict[str, float]:
    settings = {"batch_size": count, "img_size": SIDE, "adamw": True, "device_type": "cpu"}
    return estimate_training_memory(model, **settings | kwargs)


@pytest.mark.parametrize(
    ("count", "at_once", "checkpointed", "dtype", "everything"),
    [
        (8, None, False, None, False),
        (8, None, False, torch.bfloat16, False),
        (8, None, False, torch.float16, False),
        (8, None, True, None, False),
        (8, None, True, torch.bfloat16, False),
        (9, 4, False, None, False),
        (9, 4, False, torch.bfloat16, False),
        (8, 2, True, None, False),
        (1, None, False, None, True),
        (8, None, False, torch.bfloat16, True),
    ],
)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_estimate_is_the_peak_of_a_step(
    count: int,
    at_once: int | None,
    checkpointed: bool,
    dtype: torch.dtype | None,
    everything: bool,
    device_type: str,
    tmp_path: Path,
):
    model = small_model(device_type, everything)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    found = estimated(
        model,
        count,
        device_type=device_type,
        checkpoint_blocks=checkpointed,
        amp_dtype=dtype,
        at_once=at_once,
    )
    # It changes nothing of the network, and nothing of how PyTorch computes.
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert model.sam.image_encoder.checkpoint_blocks is False
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    assert len(list(relative_attention.chunks(torch.empty(1, 1, 4, 4)))) == 1

    model.sam.image_encoder.checkpoint_blocks = checkpointed
    options = StepOptions(at_once=at_once, amp_dtype=dtype)
    peak = measured(model, count, options, tmp_path / "trace.json")
    # The chunks of a CPU's attention, which stay in its cache, are not counted.
    print(count, at_once, checkpointed, dtype, everything, device_type, f"{sum(found.values()) / peak:.3f} {peak * 1024:.0f} MiB")
    assert 0.97 * peak <= sum(found.values()) <= 1.1 * peak, (found, peak)


def test_sgd_keeps_one_value_for_each_weight_and_adamw_two():
    model = small_model("cpu", everything=True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sgd, adamw = (estimated(model, 1, adamw=adamw) for adamw in (False, True))
    name = "gradients and optimiser"
    assert sgd[name] * GIB == 2 * 4 * trainable and adamw[name] * GIB == 3 * 4 * trainable
