"""How much memory a training step needs, counted without computing it, and how much fits."""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from common.full_memory import is_gpu_full, what_is_full
from config.recipe_flags import slices_of_update
from distributed.ranks import Ranks
from lora import LoRAModel
from segment_anything.modeling import relative_attention
from segment_anything.modeling.relative_attention import Attention
from training.hollow import Hollow, Peak
from training.losses import SegmentationLoss
from training.optimizers import OPTIMIZERS

GIB = 2**30
# The part of the free memory that an estimate may fill. The rest is for what is not counted: the
# kernels' own buffers, the libraries, and gaps between the tensors.
FITS = 0.8
# A run that goes on keeps the number of slices it began with up to this part.
FITS_AGAIN = 0.95


def estimate_training_memory(
    model: LoRAModel,
    *,
    batch_size: int,
    img_size: int,
    kept: int,
    device_type: str,
    checkpoint_blocks: bool = False,
    amp_dtype: torch.dtype | None = None,
    at_once: int | None = None,
) -> dict[str, float]:
    """Return GiB for the weights, for gradients and optimiser, and for all else of a training step.

    A step runs on tensors that have a shape but no content, and every storage counts while
    something holds it. The sum of the parts is the peak. Buffers inside kernels, the CUDA context
    and fragmentation are not counted.

    Args:
        model: network on any device; it is not changed.
        batch_size: slices of an update that this process computes.
        kept: numbers that the optimiser and a running average keep for each weight that trains.
        device_type: "cpu" or "cuda"; attention on a CPU keeps less than on a GPU.
        checkpoint_blocks: the encoder's blocks are computed a second time, one after the other.
        amp_dtype: dtype of autocast, which keeps the weights in float32; None: full precision.
        at_once: slices that are computed at a time (`BatchInParts`); None: all.
    """
    at_once = min(at_once or batch_size, batch_size)
    trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # The update needs one more value for each weight for a while.
    moments, update = trainable * kept, trainable
    with _as_computed():
        shadow = _without_content(model)
        for module in shadow.modules():
            if isinstance(module, Attention):
                module.device_type = device_type
        shadow.sam.image_encoder.checkpoint_blocks = checkpoint_blocks
        images = Hollow(torch.empty(batch_size, 3, img_size, img_size, device="meta"))
        weights = [*shadow.parameters(), *shadow.buffers()]
        peak = Peak([*weights, images])
        with peak:
            _forward_and_backward(shadow, images, at_once, amp_dtype)
    weights = sum(tensor.nbytes for tensor in weights)
    most = max(moments + peak.bytes, weights + moments + trainable + update)
    taken = {
        "weights": weights,
        "gradients and optimiser": moments + trainable,
        f"activations of {at_once} slices": max(0, most - weights - moments - trainable),
    }
    return {name: size / GIB for name, size in taken.items()}


def _without_content(model: nn.Module) -> Any:
    """Return a copy of a network whose parameters and buffers have no content."""
    copies: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = Hollow(torch.empty_like(parameter, device="meta"))
        copies[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    for buffer in model.buffers():
        copies[id(buffer)] = Hollow(torch.empty_like(buffer, device="meta"))
    return copy.deepcopy(model, copies).train()


def _forward_and_backward(
    model: nn.Module, images: torch.Tensor, at_once: int, amp_dtype: torch.dtype | None
) -> None:
    """Do what `training_step` does with a batch, with a single one of its parts."""

    def forward() -> torch.Tensor:  # -> (at_once, classes + 1, s, s)
        enabled = amp_dtype is not None
        with torch.autocast("cpu", amp_dtype or torch.bfloat16, enabled=enabled):
            return model(images[:at_once], full_size_masks=False)["low_res_logits"]

    in_parts = at_once < len(images)
    with torch.set_grad_enabled(not in_parts):
        logits = forward()
    if in_parts:
        logits = logits.new_empty(len(images), *logits.shape[1:], requires_grad=True)
    labels = torch.empty_like(logits[:, 0], dtype=torch.int64)
    SegmentationLoss(logits.shape[1], 0.5)(logits, labels)["loss"].backward()
    if in_parts:
        forward().backward(logits.grad[:at_once])


@contextlib.contextmanager
def _as_computed() -> Iterator[None]:
    """Keep what the kernels of a GPU and a CPU keep, where tensors have no content.

    PyTorch would choose an attention that keeps all logits, and a CPU's attention would take
    seconds for its many chunks.
    """
    plain = F.scaled_dot_product_attention

    def fused(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any = None, **options: Any
    ) -> torch.Tensor:
        if attn_mask is not None:
            return plain(q, k, v, attn_mask, **options)
        if torch.is_autocast_enabled("cpu"):
            q, k, v = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (q, k, v))
        # The kernel for float32 keeps what the flash kernels of 16 bits keep.
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, None, True, **options)[0]

    with (
        patch.object(F, "scaled_dot_product_attention", fused),
        patch.object(relative_attention, "chunks", lambda q: ()),
    ):
        yield


def choose_at_once(
    args: argparse.Namespace,
    model: LoRAModel,
    ranks: Ranks,
    *,
    processes: int | None = None,
    before: int | None = None,
) -> dict[str, float]:
    """Set `args.at_once`, the slices that a process computes at a time, unless it is given.

    On a GPU these are all of its slices of an update, or the largest equal parts that fit. On a CPU
    they are `args.batch_size`.

    Args:
        processes: number of those that will train; None: `ranks.count`.
        before: slices at once at an earlier start of the run, kept if they fit: so the run goes on
            with the same bits.

    Returns:
        The memory of a step with that number (`memory_of_step`); empty if it was not asked for.
    """
    share = slices_of_process(args, processes or ranks.count)
    chosen, memory, device = args.at_once, {}, next(model.parameters()).device
    if chosen is None and device.type == "cuda":
        fit, memory = _most_that_fit(args, model, share, free_memory(device), before)
        chosen = -ranks.agree(-fit)
        memory = memory if chosen == fit else {}
    args.at_once = min(chosen or args.batch_size, share)
    return memory


def slices_of_process(args: argparse.Namespace, processes: int) -> int:
    """Return the largest number of slices of an update that one of the processes computes."""
    return -(-slices_of_update(vars(args)) // processes)


def free_memory(device: torch.device) -> float:
    """Return the GiB of a GPU that this process holds or may still take."""
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device)) / GIB


def memory_of_step(
    args: argparse.Namespace, model: LoRAModel, share: int, at_once: int
) -> dict[str, float]:
    """Return `estimate_training_memory` for the flags of `train.py`.

    Empty if the network of a user's own module cannot be copied, or looks at its numbers.
    """
    try:
        memory = estimate_training_memory(
            model,
            batch_size=share,
            img_size=args.img_size,
            kept=OPTIMIZERS[args.optimizer].kept + (args.ema is not None),
            device_type=next(model.parameters()).device.type,
            checkpoint_blocks=args.checkpoint_blocks,
            amp_dtype=torch.bfloat16 if args.use_amp else None,  # fp16 takes as much
            at_once=at_once,
        )
        if args.cuda_graph:  # A graph keeps its memory while batches of another size are computed.
            activations = list(memory)[-1]
            memory[f"{activations}, twice for --cuda_graph"] = 2 * memory.pop(activations)
        return memory
    except Exception as error:
        logging.debug("the memory of a step is unknown", exc_info=error)
        return {}


def _most_that_fit(
    args: argparse.Namespace, model: LoRAModel, share: int, free: float, before: int | None
) -> tuple[int, dict[str, float]]:
    """Return how many of `share` slices fit at once into the `free` GiB, at least 1.

    If the memory cannot be counted, these are the recipe's slices of one GPU.

    Returns:
        The number of slices, and the memory of a step with it.
    """
    if before is not None:
        before = min(before, share)
        memory = memory_of_step(args, model, share, before)
        if sum(memory.values()) <= FITS_AGAIN * free:
            return before, memory
    sizes = sorted({-(-share // parts) for parts in range(1, share + 1)}, reverse=True)
    while True:
        memory = memory_of_step(args, model, share, sizes[0])
        if not memory:
            return min(args.batch_size, share), {}
        *fixed, activations = memory.values()
        room = FITS * free - sum(fixed)
        if len(sizes) == 1 or activations <= room:
            return sizes[0], memory
        # The activations grow about in proportion, so that hopeless sizes are not tried.
        hopeful = [size for size in sizes[1:] if size * activations <= sizes[0] * room]
        sizes = hopeful or sizes[-1:]


def out_of_memory(
    error: BaseException, args: argparse.Namespace, device: torch.device
) -> str | None:
    """Return a sentence for too little memory: what was missing, and which flags help.

    None: the error is another one.
    """
    told = what_is_full(error)
    if told is None:
        return None
    if is_gpu_full(error):
        missing = _missing(str(error))
        if missing is not None:
            told = told.replace("too small", f"too small by {missing:.2f} GiB", 1)
    elif device.type != "cpu":  # What it computes lies on the GPU.
        return f"{told}; end other programs on this machine, or pass a smaller --num_workers"
    return f"{told}; {remedies(args, 'this GPU' if is_gpu_full(error) else 'this machine')}"


def remedies(args: argparse.Namespace, place: str = "this GPU") -> str:
    """Return what makes a run with these flags need less memory at a place."""
    found = []
    if args.at_once is not None:  # None: the network itself did not fit.
        if args.at_once > 1:
            found.append(f"pass --at_once {args.at_once // 2} (the same recipe)")
        if args.cuda_graph:
            found.insert(0, "leave --cuda_graph out")
        elif not args.checkpoint_blocks:
            found.append("pass --checkpoint_blocks (the same recipe)")
        if not found and not args.use_amp:
            found.append("pass --use_amp")
    if not found:
        found.append(f"end other programs on {place}")
    if args.at_once in (None, 1):
        found.append("pass a smaller --vit_name")
    return ", or ".join(found)


def _missing(text: str) -> float | None:
    """Return the GiB that were missing, read from PyTorch's message; None if it says nothing."""
    units = {"KiB": 2**-20, "MiB": 2**-10, "GiB": 1.0}
    amounts = {}
    for what, pattern in (
        ("asked", r"allocate ([\d.]+) (\w+)"),
        ("free", r"of which ([\d.]+) (\w+) is free"),
    ):
        found = re.search(pattern, text)
        if not found or found[2] not in units:
            return None
        amounts[what] = float(found[1]) * units[found[2]]
    return max(0.0, amounts["asked"] - amounts["free"])


def peak_memory(device: torch.device) -> int | None:
    """Return the largest memory that this process has used, in bytes.

    Of a GPU, it is what PyTorch's tensors took there. Of a CPU, it is the resident memory of the
    whole process, libraries and data included. None: the system does not tell. `getrusage` is no
    help, because a process inherits its value from the one that started it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(next(line for line in status.splitlines() if "VmHWM" in line).split()[1])
    except (OSError, StopIteration):
        return None
