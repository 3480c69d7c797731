"""The image encoder with weights in the layout that a CPU multiplies fastest, for inference.

oneDNN reorders a weight before every product unless it gets the weight in its own layout. With
weights reordered once, and with the activation applied while the product is written, the encoder
takes a fifth less time (docs/benchmarks.md) for the same numbers.
"""

from __future__ import annotations

import torch
from torch import nn

from lora.layers import LoRALinear, inference_weight
from lora.model import LoRAModel
from segment_anything.modeling.common import MLPBlock

PACKABLE = (nn.Linear, LoRALinear)


class PackedLinear(nn.Module):
    """A float32 linear layer on a CPU without gradients; `gelu` applies GELU to its output."""

    def __init__(self, layer: nn.Linear | LoRALinear, *, gelu: bool = False) -> None:
        super().__init__()
        # The packed tensor is opaque to PyTorch: neither a parameter nor a buffer.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(inference_weight(layer).detach())
        self.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        self.activation = "gelu" if gelu else "none"

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        # The last argument selects GELU by the error function, as nn.GELU computes it.
        return torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, self.activation, [], "none"
        )


def can_pack(device: torch.device) -> bool:
    """Return whether this PyTorch multiplies packed weights on `device`."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack_encoder(model: LoRAModel) -> None:
    """Replace the linear layers of the image encoder for good, with their updates included.

    Layers of any other class stay as they are: a subclass may compute something else. Nothing
    happens where the model's device does not gain by it. Afterwards the model can neither train nor
    be saved.
    """
    encoder = model.sam.image_encoder
    if not can_pack(next(encoder.parameters()).device):
        return
    for module in list(encoder.modules()):
        gelu_mlp = type(module) is MLPBlock and type(module.act) is nn.GELU
        if gelu_mlp and type(module.lin1) in PACKABLE:
            module.lin1 = PackedLinear(module.lin1, gelu=True)
            module.act = nn.Identity()
    for path, module in list(encoder.named_modules()):
        inside_update = ".updates." in path
        if type(module) in PACKABLE and module.bias is not None and not inside_update:
            encoder.set_submodule(path, PackedLinear(module))
