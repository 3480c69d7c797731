"""The memory of a training step: the estimate against the allocator, and what fits at once."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_FLAGS, tiny_model, write_slices
from launches import as_on_gpu
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

import train
import trainer
from config.flags import train_parser
from config.settings import complete
from distributed.ranks import ALONE, Ranks
from lora import LoRAModel
from segment_anything.modeling import relative_attention
from trainer import StepOptions, freeze_unreached, make_optimizer, training_step
from training import memory
from training.losses import SegmentationLoss
from training.memory import GIB, choose_at_once, estimate_training_memory, out_of_memory
from training.optimizers import OPTIMIZERS
from training.resuming import at_once_before, unlike_before

SIDE = 64


def small_model(device_type: str, everything: bool = False) -> LoRAModel:
    model = tiny_model()
    if everything:
        model.train_all_weights()
    freeze_unreached(model)
    return as_on_gpu(model, device_type).train()


def measured(model: LoRAModel, count: int, options: StepOptions, trace: Path) -> float:
    """Return the GiB that the second of two AdamW steps needs, as the CPU's allocator counts.

    The first step makes the moments, for which one slice does.

    Args:
        trace: file for the profiler.
    """
    batch = {
        "image": torch.rand(count, 3, SIDE, SIDE),
        "low_res_label": torch.randint(0, 3, (count, SIDE // 4, SIDE // 4)),
    }
    criterion = SegmentationLoss(3, 0.8)
    optimizer = make_optimizer(model, "adamw", 1e-3)
    for group in optimizer.param_groups:
        group["foreach"] = True  # as on a GPU
    first = {name: value[:1] for name, value in batch.items()}
    training_step(model, first, criterion, optimizer, 1e-3, options)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training_step(model, batch, criterion, optimizer, 1e-3, options)
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    totals = [e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]"]
    most = max(totals) - totals[0]  # The allocator also counts what was there before.
    moments = [x for x in tree_leaves(optimizer.state_dict()["state"]) if torch.is_tensor(x)]
    before = [*model.parameters(), *model.buffers(), *moments, batch["image"]]
    return (most + sum(tensor.nbytes for tensor in before)) / GIB


def estimated(model: LoRAModel, count: int, **kwargs: object) -> dict[str, float]:
    settings = {"batch_size": count, "img_size": SIDE, "kept": 2, "device_type": "cpu"}
    return estimate_training_memory(model, **settings | kwargs)


@pytest.mark.parametrize(
    ("count", "at_once", "checkpointed", "dtype", "everything"),
    [
        (12, None, False, None, False),
        (12, None, False, torch.bfloat16, False),
        (12, None, True, torch.bfloat16, False),
        (13, 6, False, None, False),
        (1, None, False, None, True),
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
    monkeypatch: pytest.MonkeyPatch,
):
    # The fused attention of a CPU, which is measured here, wants values as wide as queries.
    monkeypatch.setattr(relative_attention, "value_width", lambda depth, folded, dtype: folded)
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
    # The four tables of logits of a chunk, which stay in the cache of a CPU, are not counted.
    chunk = 4 * 4 * relative_attention.CHUNK / GIB if device_type == "cpu" else 0
    assert 0.95 * (peak - chunk) <= sum(found.values()) <= 1.15 * peak, (found, peak)


def test_sgd_keeps_one_value_for_each_weight_and_adamw_two():
    model = small_model("cpu", everything=True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sgd, adamw = (estimated(model, 1, kept=OPTIMIZERS[n].kept) for n in ("sgd", "adamw"))
    name = "gradients and optimiser"
    assert sgd[name] * GIB == 2 * 4 * trainable and adamw[name] * GIB == 3 * 4 * trainable


# --- what fits ---------------------------------------------------------------------------------


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, free: float) -> list[int]:
    """Pretend a GPU with `free` GiB, where 2 GiB and 1 GiB for each slice at once are needed.

    Returns:
        The numbers of slices for which the memory is asked from then on.
    """
    tried = []

    def needed(args: object, model: object, share: int, at_once: int) -> dict[str, float]:
        tried.append(at_once)
        return {"weights": 1.5, "gradients and optimiser": 0.5, "activations": float(at_once)}

    monkeypatch.setattr(memory, "memory_of_step", needed)
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    return tried


def chosen(device: str, *flags: str, ranks: Ranks = ALONE, before: int | None = None) -> int:
    args = train_parser().parse_args(flags)
    model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device(device))]))
    choose_at_once(args, model, ranks, before=before)
    return args.at_once


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        *[(80, 24), (32.5, 24), (32.4, 12), (17.5, 12), (17.4, 8)],
        *[(12.5, 8), (12.4, 6), (8.8, 5), (3.75, 1), (0.1, 1)],
    ],
)
def test_the_largest_equal_parts_that_fit_are_computed_at_once(
    free: float, expected: int, monkeypatch: pytest.MonkeyPatch
):
    tried = on_a_gpu(monkeypatch, free)
    assert chosen("cuda") == expected  # 12 slices for each of 2 GPUs, on one
    assert len(tried) <= 3 and tried[0] == 24
    assert chosen("cuda", "--at_once", "9") == 9
    assert chosen("cuda", "--at_once", "99") == 24
    assert chosen("cpu") == 12 and chosen("cpu", "--at_once", "3") == 3
    assert chosen("cpu", "--batch_size", "30", "--global_batch", "7") == 7


def test_ranks_take_the_number_that_fits_on_all(monkeypatch: pytest.MonkeyPatch):
    on_a_gpu(monkeypatch, 80)
    wishes = []

    class Two(Ranks):
        def agree(self, wish: int) -> int:
            wishes.append(wish)
            return max(wish, -4)  # the other GPU has room for four

    assert chosen("cuda", ranks=Two(0, 2)) == 4 and wishes == [-12]


def test_a_run_goes_on_with_the_number_it_began_with_if_it_fits(monkeypatch: pytest.MonkeyPatch):
    on_a_gpu(monkeypatch, 29)  # 24 slices need 26 GiB: 0.9 of it
    assert chosen("cuda") == 12
    assert chosen("cuda", before=24) == 24 and chosen("cuda", before=6) == 6
    on_a_gpu(monkeypatch, 27)
    assert chosen("cuda", before=24) == 12

    now = {"gpu": "H100", "processes": 1}
    assert at_once_before([], now) is None
    assert at_once_before([now | {"at_once": 6}, now | {"at_once": 24}], now) == 24
    for other in ({"gpu": "T4"}, {"processes": 2}, {"at_once": "24"}, {"at_once": 0}):
        assert at_once_before([now | {"at_once": 24} | other], now) is None
    told = unlike_before([now | {"at_once": 24}], now | {"at_once": 12})
    assert told.startswith("24 slices at once before, 12 now") and "rounding" in told


@pytest.mark.parametrize(
    ("at_once", "flags", "told"),
    [
        (
            24,
            (),
            "pass --at_once 12 (the same recipe), or pass --checkpoint_blocks (the same recipe",
        ),
        (5, ("--checkpoint_blocks",), "; pass --at_once 2 (the same recipe)"),
        (1, (), "; pass --checkpoint_blocks (the same recipe), or pass a smaller --vit_name"),
        (1, ("--checkpoint_blocks",), "; pass --use_amp, or pass a smaller --vit_name"),
        (1, ("--checkpoint_blocks", "--use_amp"), "; end other programs on this GPU, or pass a s"),
        (None, (), "; end other programs on this GPU, or pass a smaller --vit_name"),
    ],
)
def test_too_little_gpu_memory_suggests_what_helps(
    at_once: int | None, flags: tuple[str, ...], told: str
):
    args = train_parser().parse_args(flags)
    args.at_once = at_once
    text = out_of_memory(torch.OutOfMemoryError("other words"), args, torch.device("cuda"))
    assert told in text and "by" not in text.split("(")[0]


def test_check_counts_the_dtype_in_use():
    model, args = small_model("cpu"), complete(argparse.Namespace(img_size=SIDE, use_amp=False))
    full = sum(memory.memory_of_step(args, model, 24, 24).values())
    args.use_amp = True
    assert sum(memory.memory_of_step(args, model, 24, 24).values()) < 0.9 * full


@pytest.mark.parametrize("flags", [[], ["--at_once", "3"]])
def test_a_step_computes_as_many_at_once_as_was_chosen(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []

    def parts(forward: Callable, images: torch.Tensor, at_once: int | None, seeds: None) -> None:
        seen.append(at_once)
        raise InterruptedError

    monkeypatch.setattr(trainer, "BatchInParts", parts)
    data = write_slices(tmp_path / "data", count=5)
    given = ["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS, *flags]
    with pytest.raises(InterruptedError):
        train.main([*given, "--batch_size", "4"])
    assert seen == [3 if flags else 4]


@pytest.mark.slow
def test_check_and_the_records_of_a_run_tell_the_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("training.data_check.memory_of_step", memory.memory_of_step)
    data = write_slices(tmp_path / "data", count=5)
    flags = ["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS]
    flags += ["--batch_size", "4", "--max_iterations", "1"]
    train.main([*flags, "--use_amp", "--at_once", "3", "--check"])
    told = capsys.readouterr().out
    assert "activations of 3 slices" in told
    assert "each of 1 process(es) computes 4 slices of an update, 3 at once, on a CPU" in told
    train.main([*flags, "--at_once", "3"])
    (folder,) = (tmp_path / "out").iterdir()
    assert json.loads((folder / "environment.json").read_text())[0]["at_once"] == 3
    assert "at_once" not in json.loads((folder / "config.json").read_text())
    train.main([*flags, "--max_iterations", "2", "--resume", str(folder)])
    assert "3 slices at once before, 4 now" in (folder / "log.txt").read_text()


def test_the_peak_is_that_of_this_process():
    """It is at least what was allocated at once, and freeing does not lower it."""
    block = torch.ones(150 * 2**20)  # 600 MiB
    during = memory.peak_memory(torch.device("cpu"))
    del block
    assert during >= 600 * 2**20
    # The kernel counts in batches of some pages.
    assert memory.peak_memory(torch.device("cpu")) >= during - 4 * 2**20
