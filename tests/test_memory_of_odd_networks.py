"""The memory of networks that users wrote: counted where it can be, and never a reason to fail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, tiny_model, write_slices
from test_memory import chosen, estimated
from torch import nn

import train
from common.errors import InputError
from lora import LoRAModel
from training import memory
from training.compiling import compile_blocks
from training.hollow import Hollow, Peak

MIB = 2**20


def encoder_with(model: LoRAModel, change: Callable[[torch.Tensor], torch.Tensor]) -> LoRAModel:
    """Let a network apply a function to its image features."""
    model.sam.image_encoder.register_forward_hook(lambda module, args, output: change(output))
    return model


def tied(model: LoRAModel) -> LoRAModel:
    blocks = model.sam.image_encoder.blocks
    blocks[1].mlp.lin1.weight = blocks[0].mlp.lin1.weight
    return model


def with_attributes(model: LoRAModel) -> LoRAModel:
    """What people hang on their modules."""
    model.table, model.scale = np.ones(5), lambda x: 2 * x
    model.numbers, model.shapes = torch.arange(5.0), {"a": [1, (2, 3)]}
    model.register_buffer("counts", torch.zeros(3, dtype=torch.int64), persistent=False)
    model.register_buffer("absent", None)
    return encoder_with(model, lambda x: model.scale(x) * model.numbers.sum() + model.counts.sum())


def parametrised(model: LoRAModel) -> LoRAModel:
    nn.utils.parametrizations.weight_norm(model.sam.image_encoder.neck[0])
    return model


@pytest.mark.parametrize("change", [tied, with_attributes, parametrised])
def test_odd_networks_are_counted(change: Callable[[LoRAModel], LoRAModel]):
    plain = sum(estimated(tiny_model(), 8).values())
    model = change(tiny_model())
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for dtype in (None, torch.bfloat16):
        found = estimated(model, 8, amp_dtype=dtype)
        assert 0.4 * plain < sum(found.values()) < 1.2 * plain
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def looks(x: torch.Tensor) -> torch.Tensor:
    return x if x.max() > 0 else -x


def through_numpy(x: torch.Tensor) -> torch.Tensor:
    return x + torch.from_numpy(x.detach().numpy())


def not_leaf(model: LoRAModel) -> LoRAModel:
    model.cached = 2 * model.sam.image_encoder.patch_embed.proj.weight
    return model


def locked(model: LoRAModel) -> LoRAModel:
    model.lock = threading.Lock()
    return model


@pytest.mark.parametrize(
    "change",
    [lambda m: encoder_with(m, looks), lambda m: encoder_with(m, through_numpy), not_leaf, locked],
    ids=["looks at numbers", "numpy", "not a leaf", "a lock"],
)
def test_what_cannot_be_counted_trains_with_the_slices_of_the_recipe(
    change: Callable[[LoRAModel], LoRAModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    build = train.build_model
    monkeypatch.setattr(
        train, "build_model", lambda *a, **k: (lambda m, s: (change(m), s))(*build(*a, **k))
    )
    data = write_slices(tmp_path / "data")
    flags = ["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS]
    train.main([*flags, "--batch_size", "3", "--max_iterations", "1"])
    (folder,) = (tmp_path / "out").iterdir()
    told = (folder / "check.txt").read_text()
    assert "memory of one process, estimated: unknown for this network\n" in told
    assert "computes 3 slices of an update, 3 at once, on a CPU" in told


def test_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise TypeError("cannot pickle '_thread.lock' object")

    monkeypatch.setattr(memory, "estimate_training_memory", fail)
    monkeypatch.setattr(memory, "free_memory", lambda device: 80.0)
    assert chosen("cuda") == 12
    assert chosen("cuda", before=24) == 24  # It did at the earlier start.
    assert chosen("cuda", "--at_once", "24") == 24
    assert chosen("cuda", "--global_batch", "7") == 7


def test_an_encoder_without_blocks_is_refused_by_compile():
    model = tiny_model()
    model.sam.image_encoder = nn.Conv2d(3, 256, 16, 16)
    with pytest.raises(InputError, match=r"--compile .*leave out --compile$"):
        compile_blocks(model)


def test_the_peak_counts_each_storage_once_and_as_long_as_it_is_held():
    with Peak([]) as peak:
        a = torch.ones(MIB)  # 4 MiB of float32
        b = a.view(1024, 1024).t()[1:]
        assert isinstance(a, Hollow) and b.as_meta.device.type == "meta" and b.device.type == "cpu"
        assert b.stride() == (1, 1024) and peak.now == peak.bytes == 4 * MIB
        a.add_(1)
        c = a.bfloat16()  # 2 MiB
        assert peak.now == 6 * MIB
        del a
        assert peak.now == 6 * MIB
        del b
        assert peak.now == 2 * MIB and peak.bytes == 6 * MIB
        d = c + torch.tensor([1.0])  # a number of the module's own; 4 MiB
        assert d.dtype == torch.float32 and peak.now - 6 * MIB < 100
        assert float(torch.tensor([3.0]) + 1) == 4
