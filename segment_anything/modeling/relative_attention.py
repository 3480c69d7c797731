"""Attention of SAM's image encoder: decomposed relative positions, whole image or windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

# Number of attention logits that a CPU computes at once, so that they stay in its cache.
CHUNK = 1 << 20


class Attention(nn.Module):
    """Multi-head attention with decomposed relative positions, global or in windows.

    SAM pads the token grid with zeros to whole windows *before* it projects the tokens, so padding
    tokens are keys and values too, all equal to the projection of zero. Here a single zero token is
    projected with the real ones and copied to every padded place, which gives the same numbers.

    Args:
        width: C, number of channels.
        grid: side of the token grid.
        window: side of the windows in tokens; None: attention over the whole grid.
    """

    def __init__(self, width: int, heads: int, grid: int, window: int | None) -> None:
        super().__init__()
        self.heads = heads
        # Compute as on this type of device; None: the device of the tensors.
        self.device_type: str | None = None
        # A grid that is a single window need not be cut.
        self.window = None if window == grid else window
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        side = window or grid
        head_width = width // heads
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, head_width))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, head_width))
        if self.window is not None:
            indices = window_indices(grid, self.window)
            for name, index in zip(("token_of", "place_of", "padding"), indices, strict=True):
                self.register_buffer(name, index, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, H, W, C)
        if self.window is None:
            return self.proj(self.attend(self.qkv(x)))
        tokens = F.pad(x.flatten(1, 2), (0, 0, 0, 1))  # (B, H·W + 1, C); the last token is zero
        # LoRA modules of the field expect a grid, so the tokens are given as one of a single row.
        projected = self.qkv(tokens[:, None])[:, 0]
        qkv = CutWindows.apply(projected, self.token_of, self.place_of, self.padding)
        qkv = qkv.view(-1, self.window, self.window, qkv.shape[-1])  # (B · windows, w, w, 3C)
        return self.proj(join_windows(self.attend(qkv), x.shape[1:3]))

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:  # (N, H, W, 3C) -> (N, H, W, C)
        """Return the softmax attention between all tokens of a grid."""
        height, width = qkv.shape[1:3]
        parts = rearrange(
            qkv, "n h w (part heads d) -> n (h w) part heads d", part=3, heads=self.heads
        )
        q, k, v = parts.unbind(2)  # (N, H·W, heads, d)
        # For each query, what is added to the logits of each row and column of keys: q times the
        # embedding of the offset. It is not scaled, because SAM scales the content term only.
        grid = rearrange(q, "n (h w) heads d -> n h w heads d", h=height)
        rows = torch.einsum("nhwad,hkd->nahwk", grid, offsets(self.rel_pos_h, height))
        columns = torch.einsum("nhwad,wkd->nahwk", grid, offsets(self.rel_pos_w, width))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (N, heads, H·W, d)
        # Flash kernels of a GPU need attention without a mask. A CPU is faster with fewer channels.
        on_cpu = (self.device_type or qkv.device.type) == "cpu"
        attention = ChunkedAttention.apply if on_cpu else folded_attention
        out = attention(q, k, v, rows, columns)
        return rearrange(out, "n heads (h w) d -> n h w (heads d)", h=height)


def folded_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Compute attention with the relative positions as extra channels of queries and keys.

    The extra channels of a key are 1 at its row and column and 0 elsewhere. So the product of query
    and key gains exactly the two terms, without a bias of H·W × H·W.

    Args:
        q, k, v: (N, heads, H·W, d).
        rows: (N, heads, H, W, H), added to the logits of all keys in a row.
        columns: (N, heads, H, W, W), added to the logits of all keys in a column.

    Returns:
        (N, heads, H·W, d).
    """
    height, width, depth = rows.shape[-1], columns.shape[-1], q.shape[-1]
    # The attention divides by this factor, so that only the content is scaled.
    scale = math.sqrt(depth)
    grid = rearrange(q, "n heads (h w) d -> n heads h w d", h=height)
    q = torch.cat([grid, rows * scale, columns * scale], dim=-1).flatten(2, 3)
    row_of = torch.eye(height, dtype=k.dtype, device=k.device)
    column_of = torch.eye(width, dtype=k.dtype, device=k.device)
    place = torch.cat(
        [
            repeat(row_of, "h rows -> (h w) rows", w=width),
            repeat(column_of, "w columns -> (h w) columns", h=height),
        ],
        dim=-1,
    )  # (H·W, H + W)
    k = torch.cat([k, place.expand(*k.shape[:2], -1, -1)], dim=-1)
    # Fused kernels need queries, keys and values of the same width.
    v = F.pad(v, (0, height + width))
    return F.scaled_dot_product_attention(q, k, v, scale=1 / scale)[..., :depth]


class ChunkedAttention(torch.autograd.Function):
    """The same as `folded_attention`, with the relative positions as a bias, chunk by chunk.

    The logits of a chunk stay in the cache of the CPU and are not stored: the backward pass
    computes them again.
    """

    @staticmethod
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        rows, columns = rows.contiguous(), columns.contiguous()  # Their sum is then contiguous too.
        out = torch.empty_like(v)
        for part in chunks(q):
            bias = rows[part][..., :, None] + columns[part][..., None, :]
            bias = rearrange(bias, "n heads h w rows columns -> n heads (h w) (rows columns)")
            out[part] = F.scaled_dot_product_attention(q[part], k[part], v[part], attn_mask=bias)
        return out

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, rows, columns = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        rows, columns = rows.contiguous(), columns.contiguous()
        gradients = tuple(torch.empty_like(x) for x in (q, k, v, rows, columns))
        for part in chunks(q):
            d_q, d_k, d_v, d_rows, d_columns = (x[part] for x in gradients)
            logits = (q[part] * scale) @ k[part].transpose(-2, -1)  # (n, heads, H·W, H·W)
            table = logits.unflatten(2, rows.shape[2:4]).unflatten(4, rows.shape[2:4])
            table += rows[part][..., :, None]  # `table` is a view of `logits`.
            table += columns[part][..., None, :]
            attention = logits.softmax(dim=-1)
            d_v.copy_(attention.transpose(-2, -1) @ gradient[part])
            d_logits = gradient[part] @ v[part].transpose(-2, -1)
            d_logits -= (d_logits * attention).sum(dim=-1, keepdim=True)
            d_logits *= attention
            d_q.copy_(d_logits @ k[part]).mul_(scale)
            d_k.copy_(d_logits.transpose(-2, -1) @ q[part]).mul_(scale)
            table = d_logits.unflatten(2, rows.shape[2:4]).unflatten(4, rows.shape[2:4])
            torch.sum(table, dim=-1, out=d_rows)
            torch.sum(table, dim=-2, out=d_columns)
        return gradients


def chunks(q: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield parts of the images and heads of (N, heads, L, d), with about `CHUNK` logits each."""
    count, heads, length, _ = q.shape
    images = min(count, max(1, CHUNK // length**2))
    together = max(1, CHUNK // (images * length**2))
    for image, head in itertools.product(range(0, count, images), range(0, heads, together)):
        yield slice(image, image + images), slice(head, head + together)


def offsets(rel_pos: torch.Tensor, side: int) -> torch.Tensor:  # (2·side - 1, d) -> (side, side, d)
    """Return, at (i, j), the embedding of the offset i - j between query i and key j."""
    position = torch.arange(side, device=rel_pos.device)
    return rel_pos[position[:, None] - position[None, :] + side - 1]


def window_indices(
    grid: int, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # int64
    """Return the places of a grid × grid of tokens that is padded and cut into windows.

    Returns:
        The token of each place, windows in row-major order, grid² for padding; the place of each
        token; the places of padding.
    """
    windows = -(-grid // window)
    padded = torch.full((windows * window, windows * window), grid**2)
    padded[:grid, :grid] = torch.arange(grid**2).view(grid, grid)
    cut = rearrange(padded, "(rows h) (columns w) -> (rows columns h w)", h=window, w=window)
    order = cut.argsort(stable=True)  # Padding comes last.
    return cut, order[: grid**2].contiguous(), order[grid**2 :].contiguous()


class CutWindows(torch.autograd.Function):
    """Copy tokens (B, T, C) to places (B, P, C) by index; the last token fills all padding.

    Every other token has a single place, so its gradient is a look-up. The gradient of
    `index_select` would add rows one by one: slowly, and on a GPU in a random order.
    """

    @staticmethod
    def forward(
        tokens: torch.Tensor, token_of: torch.Tensor, place_of: torch.Tensor, padding: torch.Tensor
    ) -> torch.Tensor:
        return tokens.index_select(1, token_of)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        place_of, padding = ctx.saved_tensors
        real = gradient.index_select(1, place_of)
        zero = gradient.index_select(1, padding).sum(1, keepdim=True)
        return torch.cat([real, zero], dim=1), None, None, None


def join_windows(windows: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Join windows (B · windows, w, w, C) to a grid (B, H, W, C) of `size`, without padding."""
    side = windows.shape[1]
    height, width = size
    rows, columns = -(-height // side), -(-width // side)
    grid = rearrange(
        windows, "(b rows columns) h w c -> b (rows h) (columns w) c", rows=rows, columns=columns
    )
    return grid[:, :height, :width].contiguous()
