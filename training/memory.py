"""How much memory a training step takes, counted without computing it."""

from __future__ import annotations

import copy
import re

import torch
from torch import nn

GIB = 2**30


def estimate_training_memory(
    model: nn.Module,
    *,
    batch_size: int,
    img_size: int,
    adamw: bool,
) -> dict[str, float]:
    """GiB of weights, gradients with optimiser, and of what the forward pass keeps.

    The network runs on the meta device, where tensors have shapes and no content; every storage
    that autograd keeps for the gradient counts once. Temporary buffers, the CUDA context and
    fragmentation come on top; `--use_amp` takes less.

    Args:
        model: on any device; not changed.
        batch_size: slices at once.
    """
    shadow = copy.deepcopy(model).to("meta")
    parameters = list(shadow.parameters())
    own = {id(parameter) for parameter in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in own:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage  # holding it keeps its address from being used again
        return tensor

    images = torch.empty(batch_size, 3, img_size, img_size, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        shadow(images, full_size_masks=False)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    trainable = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    own_storage = {parameter.untyped_storage()._cdata for parameter in parameters}
    activations = sum(s.nbytes() for key, s in kept.items() if key not in own_storage)
    return {
        "weights": weights / GIB,
        "gradients and optimiser": trainable * (3 if adamw else 2) / GIB,
        f"activations of {batch_size} slices": activations / GIB,
    }


def out_of_memory(error: torch.OutOfMemoryError, batch_size: int, checkpointed: bool) -> str:
    """One sentence for an exhausted GPU: what was missing and what to lower."""
    text = str(error).splitlines()[0]
    remedies = [f"lower --batch_size (now {batch_size}) and pass --global_batch to keep the recipe"]
    if not checkpointed:
        remedies.append("pass --checkpoint_blocks")
    missing = _missing(text)
    how_much = f" by {missing:.2f} GiB" if missing is not None else ""
    return f"the GPU's memory was too small{how_much} ({text}); {', or '.join(remedies)}"


def _missing(text: str) -> float | None:
    """GiB asked for beyond what was free, by PyTorch's own words."""
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
