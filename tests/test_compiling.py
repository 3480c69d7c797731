"""`--compile`: which graphs are made of the encoder's blocks, and that the numbers stay."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY_FLAGS, randomise_updates, tiny_model, tiny_sam, write_slices
from launches import as_on_gpu
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import train
import trainer
from common.tensors import load_tensors
from lora import LoRAModel
from lora.form import UpdateForm
from lora.variants import load_variant
from trainer import StepOptions, freeze_unreached, make_optimizer, training_step
from training.compiling import compile_blocks
from training.losses import SegmentationLoss

pytestmark = pytest.mark.slow

# Graphs of one shape: windows, the whole image, and the first block, whose input needs no gradient.
WITH_GRADIENT = 3


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Start without graphs, in the strict deterministic mode of a run."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def as_on_a_gpu(model: LoRAModel) -> LoRAModel:
    """Let a network compute the attention of a GPU, and freeze what `trainer_synapse` freezes."""
    freeze_unreached(model)
    return as_on_gpu(model).train()


def steps(
    model: LoRAModel, sizes: list[int], options: StepOptions, graphs: CompileCounterWithBackend
) -> tuple[list[int], list[float]]:
    """Train with batches of these sizes; return the number of graphs after each, and the losses."""
    generator = torch.Generator().manual_seed(1)
    optimizer = make_optimizer(model, "adamw", 1e-3)
    counts, losses = [], []
    for size in sizes:
        batch = {
            "image": torch.rand(size, 3, 64, 64, generator=generator),
            "low_res_label": torch.randint(0, 3, (size, 16, 16), generator=generator),
        }
        terms, _ = training_step(model, batch, SegmentationLoss(3, 0.8), optimizer, 1e-3, options)
        counts.append(graphs.frame_count)
        losses.append(float(terms["loss"]))
    return counts, losses


@pytest.mark.parametrize(
    ("variant", "backend", "depth", "sizes"),
    [
        ("encoder", "aot_eager", 4, [8, 8]),
        ("encoder_mask_decoder", "eager", 32, [8, 8, 3, 8, 8, 3]),
    ],
)
def test_every_batch_size_has_its_graphs_and_the_numbers_of_eager(
    variant: str, backend: str, depth: int, sizes: list[int]
):
    """A network of 32 blocks has no more graphs than one of 4."""
    model = load_variant(f"sam_lora_image_{variant}")(tiny_sam(), 2)
    randomise_updates(model)
    blocks = model.sam.image_encoder.blocks
    blocks.extend(copy.deepcopy(blocks[index % 4]) for index in range(4, depth))
    assert len(blocks) == depth
    plain, keys = copy.deepcopy(as_on_a_gpu(model)), list(model.state_dict())
    graphs = CompileCounterWithBackend(backend)
    compile_blocks(model, graphs)
    counts, losses = steps(model, sizes, StepOptions(), graphs)
    expected = [WITH_GRADIENT * len({*sizes[: count + 1]}) for count in range(len(sizes))]
    assert counts == expected and not counters["graph_break"]
    assert losses == pytest.approx(steps(plain, sizes, StepOptions(), graphs)[1], abs=1e-5)
    for (name, value), same in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(value, same, rtol=0, atol=1e-4), name
    # Names and copies are those of the network that was not compiled.
    assert list(model.state_dict()) == keys and list(copy.deepcopy(model).state_dict()) == keys


def test_parts_with_autocast_and_checkpointed_blocks():
    """More graphs than PyTorch's own limit of 8; a block is computed again by its own graph."""
    model = as_on_a_gpu(tiny_model())
    del model.sam.image_encoder.blocks[2:]
    model.sam.image_encoder.checkpoint_blocks = True
    plain = copy.deepcopy(model)
    graphs = CompileCounterWithBackend("eager")
    compile_blocks(model, graphs)
    options = StepOptions(at_once=4, amp_dtype=torch.bfloat16)
    # A block with windows, whose input needs no gradient, and one with the whole image.
    both = 2 + 2
    # 8 = 4 + 4; 3 is a batch of one part; 5 = 4 + 1.
    counts, losses = steps(model, [8, 3, 8, 5], options, graphs)
    assert counts == [both, both + 2, both + 2, 2 * both + 2] and counts[-1] > 8
    assert not counters["graph_break"]
    assert losses == pytest.approx(steps(plain, [8, 3, 8, 5], options, graphs)[1], abs=1e-5)


@pytest.mark.parametrize(
    ("backend", "options", "error"),
    [
        ("aot_eager", StepOptions(), 1e-5),
        ("eager", StepOptions(amp_dtype=torch.bfloat16), 1e-2),
    ],
)
def test_the_lengths_of_dora_are_compiled_with_the_blocks(
    backend: str, options: StepOptions, error: float
):
    model = tiny_model()
    model.set_form(UpdateForm("dora", 6))
    plain, graphs = copy.deepcopy(as_on_a_gpu(model)), CompileCounterWithBackend(backend)
    compile_blocks(model, graphs)
    losses = steps(model, [3, 3], options, graphs)[1]
    assert losses == pytest.approx(steps(plain, [3, 3], options, graphs)[1], abs=error)
    assert graphs.frame_count == WITH_GRADIENT and not counters["graph_break"]


def test_a_compiled_run_validates_eagerly_and_saves_what_a_plain_run_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = write_slices(tmp_path / "data", count=3, cases=3)
    graphs = CompileCounterWithBackend("eager")
    monkeypatch.setattr(trainer, "compile_blocks", partial(compile_blocks, backend=graphs))
    flags = ["--root_path", str(data), *TINY_FLAGS, "--batch_size", "4", "--stop_epoch", "1"]
    saved = []
    for compiled in ([], ["--compile"]):
        output = tmp_path / f"out{len(compiled)}"
        train.main([*flags, "--output", str(output), "--val_every", "1", *compiled])
        (file,) = output.glob("*/epoch_0.pth")
        saved.append(load_tensors(file))
    # Steps of 4 and 2 slices, on a CPU and with `--ckpt none`: windows and the whole image.
    assert graphs.frame_count == 2 * 2
    assert saved[0].keys() == saved[1].keys()
    for name, value in saved[0].items():
        if torch.is_tensor(value):
            assert torch.equal(value, saved[1][name]), name
