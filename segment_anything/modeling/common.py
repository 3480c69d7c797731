"""The layers that several parts of SAM use, and the resizing of its masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which `x` is multiplied: that of autocast where it is on."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of a (B, C, H, W) tensor."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, C, H, W)
        channels_last = rearrange(x, "b c h w -> b h w c")
        normed = F.layer_norm(channels_last, self.weight.shape, self.weight, self.bias, self.eps)
        return rearrange(normed, "b h w c -> b c h w")


class MLPBlock(nn.Module):
    """The feed-forward half of a transformer block."""

    def __init__(
        self, width: int, hidden: int, activation: Callable[[], nn.Module] = nn.GELU
    ) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)
        self.act = activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., C) -> (..., C)
        return self.lin2(self.act(self.lin1(x)))


def resize_bilinear(
    images: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:  # (B, C, H, W) -> (B, C, *size)
    """Interpolate linearly in both axes, as `F.interpolate(mode="bilinear")` does, bit for bit.

    In deterministic mode, `F.interpolate` on a GPU computes by some 36 small kernels in many times
    the memory, because the gradient of its single kernel is not repeatable. Where no gradient is
    needed, this function calls the single kernel, whose output always is.
    """
    if images.requires_grad and torch.is_grad_enabled():
        return F.interpolate(images, size, mode="bilinear", align_corners=False)
    return torch.ops.aten.upsample_bilinear2d.vec(images, size, False, None)
