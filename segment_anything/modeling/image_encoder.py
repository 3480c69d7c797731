"""SAM's image encoder: a plain vision transformer on 16 × 16 patches."""

from __future__ import annotations

from collections.abc import Collection

import torch
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from .common import LayerNorm2d, MLPBlock
from .relative_attention import Attention

# Side of the windows, in tokens.
WINDOW = 14
# Hidden width of the MLP, in widths of the block.
MLP_RATIO = 4


class ImageEncoderViT(nn.Module):
    """From images to embeddings of 1/16 their size (SAM, appendix A; ViTDet backbone).

    Args:
        image_size: S, side of the square input in pixels, divisible by `patch_size`.
        width, depth, heads: size of the transformer.
        global_blocks: indices of the blocks that attend over the whole image; the others attend
            within windows of 14 tokens.
        out_channels: channels of the embedding that the mask decoder reads.
    """

    def __init__(
        self,
        *,
        image_size: int,
        width: int,
        depth: int,
        heads: int,
        global_blocks: Collection[int],
        patch_size: int = 16,
        out_channels: int = 256,
    ) -> None:
        super().__init__()
        self.img_size = image_size
        self.global_blocks = tuple(global_blocks)
        # Keep only the input of each block, and compute the block again in the backward pass: the
        # same numbers with a fraction of the memory and about a third more time.
        self.checkpoint_blocks = False
        grid = image_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, grid, None if index in global_blocks else WINDOW)
            for index in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(width, out_channels, kernel_size=1, bias=False),
            LayerNorm2d(out_channels),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_channels),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # (B, 3, S, S) -> (B, 256, S/16, S/16)
        x = self.patch_embed(images) + self.pos_embed  # (B, H, W, C)
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.neck(rearrange(x, "b h w c -> b c h w"))


class PatchEmbed(nn.Module):
    """Projects every patch of the image to a token; patches do not overlap."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # (B, 3, S, S) -> (B, H, W, C)
        # The residual stream keeps this layout: with scattered channels, every layer norm would
        # copy it first, and every sum would take twice as long on a GPU.
        return rearrange(self.proj(images), "b c h w -> b h w c").contiguous()


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and a residual connection."""

    def __init__(self, width: int, heads: int, grid: int, window: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, grid, window)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLPBlock(width, width * MLP_RATIO)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, H, W, C)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
