"""Weights of the image encoder in the layout that a CPU multiplies fastest, for inference.

oneDNN reorders a weight before every product unless it is given one in its own layout. Reordered
once, and with the activation applied as the product is written, the encoder takes a fifth less
time (docs/benchmarks.md) for the same numbers.
"""

from __future__ import annotations

import torch
from torch import nn

from lora import LoRAModel
from lora.layers import LoRALinear
from segment_anything.modeling.common import MLPBlock


class PackedLinear(nn.Module):
    """A linear layer on a CPU, float32, without gradients; `gelu` is applied to its output."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, *, gelu: bool = False) -> None:
        super().__init__()
        # opaque to PyTorch: neither parameter nor buffer
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.activation = "gelu" if gelu else "none"

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        # the last argument asks for GELU by the error function, as nn.GELU computes it
        return torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, self.activation, [], "none"
        )


def can_pack(device: torch.device) -> bool:
    """Whether this PyTorch multiplies packed weights on `device`."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack_encoder(model: LoRAModel) -> None:
    """Replace the linear layers of the image encoder, their updates merged, for good.

    Does nothing where the model's device does not gain by it.

    Args:
        model: merged; it can neither train nor be saved afterwards.
    """
    encoder = model.sam.image_encoder
    if not can_pack(next(encoder.parameters()).device):
        return
    for module in list(encoder.modules()):
        if isinstance(module, MLPBlock) and isinstance(module.act, nn.GELU):
            module.lin1 = PackedLinear(module.lin1.weight, module.lin1.bias, gelu=True)
            module.act = nn.Identity()
    for path, module in list(encoder.named_modules()):
        if isinstance(module, LoRALinear):
            encoder.set_submodule(path, PackedLinear(module.merged_weight, module.bias))
        elif isinstance(module, nn.Linear) and ".updates." not in path:  # those are merged
            encoder.set_submodule(path, PackedLinear(module.weight, module.bias))
