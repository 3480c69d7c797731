"""SAM's image encoder: a plain ViT with windowed attention and decomposed relative positions."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import nn

from .common import LayerNorm2d, MLPBlock


class ImageEncoderViT(nn.Module):
    """Images to embeddings of 1/16 the size (SAM, appendix A; ViTDet backbone).

    Args:
        image_size: S, side of the square input, divisible by `patch_size`.
        width, depth, heads: of the transformer.
        global_blocks: indices of the blocks that attend over the whole image; the others attend
            within windows of `window_size` tokens.
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
        window_size: int = 14,
        mlp_ratio: int = 4,
        out_channels: int = 256,
    ) -> None:
        super().__init__()
        self.img_size = image_size
        self.global_blocks = tuple(global_blocks)
        grid = image_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, grid, None if index in global_blocks else window_size)
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
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected to one token."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # (B, 3, S, S) -> (B, H, W, C)
        return self.proj(images).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and a residual connection."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: int, grid: int, window: int | None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, grid, window)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLPBlock(width, width * mlp_ratio)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, H, W, C)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Multi-head attention with decomposed relative positions, global or in windows.

    SAM pads the token grid with zeros to whole windows *before* projecting it, so its padding
    tokens are keys and values too, each equal to the projection of zero. Here only real tokens
    are projected, and the padding is filled with that one projected vector: the same numbers.
    """

    def __init__(self, width: int, heads: int, grid: int, window: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        side = grid if window is None else window
        head_width = width // heads
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, head_width))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, head_width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, H, W, C)
        qkv = self.qkv(x)  # (B, H, W, 3C)
        if self.window is None:
            return self.proj(self.attend(qkv))
        height, width = x.shape[1:3]
        padded = self.pad(qkv, self.qkv(x.new_zeros(x.shape[-1])))
        attended = self.attend(partition(padded, self.window))
        return self.proj(unpartition(attended, self.window, padded.shape[1:3])[:, :height, :width])

    def pad(self, qkv: torch.Tensor, filler: torch.Tensor) -> torch.Tensor:
        """Extend (B, H, W, 3C) bottom and right to whole windows with the token `filler` (3C,)."""
        batch, height, width, _ = qkv.shape
        full_height = height + -height % self.window
        full_width = width + -width % self.window
        if (full_height, full_width) == (height, width):
            return qkv
        right = filler.expand(batch, height, full_width - width, -1)
        bottom = filler.expand(batch, full_height - height, full_width, -1)
        return torch.cat([torch.cat([qkv, right], dim=2), bottom], dim=1)

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:  # (N, H, W, 3C) -> (N, H, W, C)
        """Softmax attention of every token of a grid with every other."""
        count, height, width, _ = qkv.shape
        tokens = qkv.reshape(count, height * width, 3, self.heads, -1)
        q, k, v = tokens.permute(2, 0, 3, 1, 4)  # 3 of (N, heads, H·W, d)
        bias = self.relative_position_bias(q, height, width)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (N, heads, H·W, d)
        return out.transpose(1, 2).reshape(count, height, width, -1)

    def relative_position_bias(self, q: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The sum of a row and a column term, each the query times the offset's embedding.

        Args:
            q: (N, heads, H·W, d), not scaled: SAM scales only the content term.

        Returns:
            (N, heads, H·W, H·W), added to the attention logits.
        """
        grid = q.unflatten(2, (height, width))  # (N, heads, H, W, d)
        rows = torch.einsum("nahwd,hkd->nahwk", grid, offsets(self.rel_pos_h, height))
        columns = torch.einsum("nahwd,wkd->nahwk", grid, offsets(self.rel_pos_w, width))
        bias = rows[..., :, None] + columns[..., None, :]  # (N, heads, H, W, H, W)
        return bias.flatten(4, 5).flatten(2, 3)


def offsets(rel_pos: torch.Tensor, side: int) -> torch.Tensor:  # (2·side - 1, d) -> (side, side, d)
    """Entry (i, j) is the embedding of the offset i - j between query i and key j."""
    position = torch.arange(side, device=rel_pos.device)
    return rel_pos[position[:, None] - position[None, :] + side - 1]


def partition(x: torch.Tensor, window: int) -> torch.Tensor:
    """Cut (B, H, W, C), whole windows, into (B · windows, window, window, C)."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(0, 2)  # windows in row-major order


def unpartition(windows: torch.Tensor, window: int, size: tuple[int, int]) -> torch.Tensor:
    """Undo `partition` for a grid of `size` (H, W): (B · windows, w, w, C) -> (B, H, W, C)."""
    rows, columns = size[0] // window, size[1] // window
    x = windows.unflatten(0, (-1, rows, columns))  # (B, rows, columns, w, w, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
