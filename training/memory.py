"""How much memory a training step needs, counted without computing it."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from config.train_flags import slices_of_update
from lora import LoRAModel
from segment_anything.modeling.relative_attention import Attention

GIB = 2**30


def estimate_training_memory(
    model: LoRAModel,
    *,
    batch_size: int,
    img_size: int,
    adamw: bool,
    device_type: str,
    checkpoint_blocks: bool = False,
) -> dict[str, float]:
    """Return GiB for the weights, for gradients and optimiser, and for the forward pass.

    The network runs on the meta device, where tensors have a shape but no content. Every storage
    that autograd keeps for the gradient counts once. Temporary buffers, the CUDA context and
    fragmentation are not counted. `--use_amp` needs less.

    Args:
        model: network on any device; it is not changed.
        batch_size: slices computed at once.
        device_type: "cpu" or "cuda"; attention on a CPU keeps less than on a GPU.
        checkpoint_blocks: the encoder's blocks are computed a second time, one after the other.
    """
    shadow = copy.deepcopy(model).to("meta")
    for module in shadow.modules():
        if isinstance(module, Attention):
            module.device_type = device_type
    encoder = shadow.sam.image_encoder
    encoder.checkpoint_blocks = checkpoint_blocks
    images = torch.empty(batch_size, 3, img_size, img_size, device="meta")
    parameters = list(shadow.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    trainable = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    excluded = {parameter.untyped_storage()._cdata for parameter in parameters}
    taken = {
        "weights": weights,
        "gradients and optimiser": trainable * (3 if adamw else 2),
        f"activations of {batch_size} slices": kept_for_gradient(
            lambda: shadow(images, full_size_masks=False), excluded
        ),
    }
    if checkpoint_blocks:
        with torch.no_grad():
            tokens = encoder.patch_embed(images)  # (B, H, W, C)
        taken["a block computed again"] = max(
            kept_for_gradient(lambda block=block: block(tokens), excluded)
            for block in encoder.blocks
        )
    return {name: size / GIB for name, size in taken.items()}


def kept_for_gradient(compute: Callable[[], object], excluded: set[int]) -> int:
    """Return the bytes that autograd keeps of a computation, without the `excluded` storages."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in excluded:
            # Holding the storage keeps its address from being used again.
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _FusedAttention():
        compute()
    return sum(storage.nbytes() for storage in kept.values())


class _FusedAttention(TorchFunctionMode):
    """Count the fused attention of a GPU: on meta, PyTorch uses one that keeps all logits."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and "attn_mask" not in (kwargs or {}):
            # The kernel for float32.
            fused = torch.ops.aten._scaled_dot_product_efficient_attention
            return fused(*args, attn_bias=None, compute_log_sumexp=True, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


def out_of_memory(error: RuntimeError, args: argparse.Namespace) -> str:
    """Return a sentence for a GPU out of memory: what was missing, and which flags help."""
    text = str(error).splitlines()[0]
    remedies = []
    if args.batch_size > 1:
        fewer = f"--batch_size {args.batch_size // 2} --global_batch {slices_of_update(vars(args))}"
        remedies.append(f"pass {fewer} (the same recipe)")
    if not args.checkpoint_blocks:
        remedies.append("pass --checkpoint_blocks")
    remedies = remedies or ["pass --use_amp", "a smaller --vit_name"]
    missing = _missing(text)
    how_much = f" by {missing:.2f} GiB" if missing is not None else ""
    return f"the GPU's memory was too small{how_much} ({text}); {', or '.join(remedies)}"


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
