"""Attention of SAM's image encoder: decomposed relative positions, whole image or windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from .common import product_dtype

# Number of attention logits that a CPU computes at once, so that they stay in its cache.
CHUNK = 1 << 20
# The fused attention kernels of GPUs take widths in multiples of this. Otherwise flash attention
# copies queries, keys and values once more, and the others refuse: a GPU without flash attention
# (compute capability below 8) then computes all logits.
KERNEL_WIDTH = 8


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
        # Tables that follow from the sizes are made once; the weights' files do not hold them.
        self.register_buffer("offset_of", offset_table(side), persistent=False)
        self.register_buffer("place", place_table(side, head_width), persistent=False)
        if self.window is not None:
            token_of, place_of = window_indices(grid, self.window)
            self.register_buffer("token_of", token_of, persistent=False)
            self.register_buffer("place_of", place_of, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, H, W, C)
        if self.window is None:
            out = self.attend(self.qkv(x))
            return self.proj(rearrange(out, "n heads (h w) d -> n h w (heads d)", h=x.shape[1]))
        tokens = x.flatten(1, 2)
        tokens = tokens.to(product_dtype(tokens))  # before it is copied
        zero = tokens.new_zeros(1, 1, tokens.shape[-1]).expand(x.shape[0], -1, -1)
        tokens = torch.cat([tokens, zero], dim=1)  # (B, H·W + 1, C)
        # LoRA modules of the field expect a grid, so the tokens are given as one of a single row.
        projected = self.qkv(tokens[:, None]).flatten(1, 2)
        qkv = CutWindows.apply(projected, self.token_of, self.place_of, self.window)
        out = self.attend(qkv.view(-1, self.window, self.window, qkv.shape[-1]))
        places = rearrange(out, "(b n) heads l d -> b (n l) heads d", b=x.shape[0])
        joined = JoinWindows.apply(places, self.token_of, self.place_of[:-1], self.window)
        return self.proj(joined.reshape(x.shape))

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:  # (N, H, W, 3C) -> (N, heads, H·W, d)
        """Return the softmax attention between all tokens of a square grid."""
        parts = rearrange(
            qkv, "n h w (part heads d) -> n (h w) part heads d", part=3, heads=self.heads
        )
        q, k, v = parts.unbind(2)  # (N, H·W, heads, d)
        # Flash kernels of a GPU need attention without a mask. A CPU is faster with fewer channels.
        on_cpu = (self.device_type or qkv.device.type) == "cpu"
        # A folded attention divides all logits by the root of d, but SAM scales the content only.
        factor = 1.0 if on_cpu else math.sqrt(q.shape[-1])
        # For each query, what is added to the logits of each row and column of keys: q times the
        # embedding of the offset.
        grid = rearrange(q, "n (h w) heads d -> n h w heads d", h=qkv.shape[1])
        by_row, by_column = (
            table[self.offset_of] * factor for table in (self.rel_pos_h, self.rel_pos_w)
        )  # (side, side, d)
        rows = torch.einsum("nhwad,hkd->nahwk", grid, by_row)
        columns = torch.einsum("nhwad,wkd->nahwk", grid, by_column)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (N, heads, H·W, d)
        if on_cpu:
            return ChunkedAttention.apply(q, k, v, rows, columns)
        return folded_attention(q, k, v, rows, columns, self.place)


def folded_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    place: torch.Tensor,
) -> torch.Tensor:
    """Compute attention with the relative positions as extra channels of queries and keys.

    The extra channels of a key are 1 at its row and column and 0 elsewhere. So the product of query
    and key gains exactly the two terms, without a bias of H·W × H·W.

    Args:
        q, k, v: (N, heads, H·W, d).
        rows: (N, heads, H, W, H), √d times what is added to the logits of all keys in a row.
        columns: (N, heads, H, W, W), √d times what is added to the logits of all keys in a column.
        place: (H·W, H + W + padding), the extra channels of the keys (`place_table`).

    Returns:
        (N, heads, H·W, d).
    """
    height, width, depth = rows.shape[-1], columns.shape[-1], q.shape[-1]
    place = place.to(k.dtype).expand(*k.shape[:2], -1, -1)
    unused = place[..., height + width :].unflatten(2, (height, width))  # zeros
    grid = q.unflatten(2, (height, width))
    q = torch.cat([grid, rows, columns, unused], dim=-1).flatten(2, 3)
    k = torch.cat([k, place], dim=-1)
    # A view would keep the whole projection for the gradient: 2.5 GiB in 24 slices of vit_b.
    v = with_zeros(v, value_width(depth, q.shape[-1], product_dtype(v))).contiguous()
    return F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(depth))[..., :depth]


def value_width(depth: int, folded: int, dtype: torch.dtype) -> int:
    """Return the width of the values that suits the kernel which PyTorch will choose.

    PyTorch 2.11 to 2.13 (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp): in half precision
    flash attention comes first, and wants values as wide as queries and keys. In float32 the only
    fused kernel is the memory-efficient one, which takes values of another width.

    Args:
        depth: width of the values before.
        folded: width of the queries and keys.
        dtype: in which the attention is computed.
    """
    if dtype in (torch.float16, torch.bfloat16):
        return folded
    return depth + -depth % KERNEL_WIDTH


def with_zeros(x: torch.Tensor, width: int) -> torch.Tensor:  # (..., d) -> (..., width)
    """Append zeros to the last axis; without a copy if there is nothing to append.

    `F.pad` would write everything twice on a GPU, and once more in the backward pass.
    """
    if width == x.shape[-1]:
        return x
    zeros = x.new_zeros(()).expand(*x.shape[:-1], width - x.shape[-1])
    return torch.cat([x, zeros], dim=-1)


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


def offset_table(side: int) -> torch.Tensor:  # int64 (side, side)
    """Return, at (i, j), the row of `rel_pos` for the offset i - j between query i and key j."""
    position = torch.arange(side)
    return position[:, None] - position[None, :] + side - 1


def place_table(side: int, depth: int) -> torch.Tensor:  # (side², 2·side + padding)
    """Return the extra channels of the keys: 1 at a token's row and column, 0 elsewhere.

    Zeros follow, so that with the `depth` channels of the content the width is one that every fused
    kernel takes.
    """
    one_hot = torch.eye(side)
    row_of = repeat(one_hot, "h rows -> (h w) rows", w=side)
    column_of = repeat(one_hot, "w columns -> (h w) columns", h=side)
    return F.pad(torch.cat([row_of, column_of], dim=-1), (0, -(depth + 2 * side) % KERNEL_WIDTH))


def window_indices(grid: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:  # int64
    """Return the places of a grid × grid of tokens that is padded and cut into windows.

    Returns:
        The token of each place, windows in row-major order, grid² for padding; the place of each
        token, and any place for the token of the padding.
    """
    windows = -(-grid // window)
    padded = torch.full((windows * window, windows * window), grid**2)
    padded[:grid, :grid] = torch.arange(grid**2).view(grid, grid)
    cut = rearrange(padded, "(rows h) (columns w) -> (rows columns h w)", h=window, w=window)
    place_of = cut.argsort(stable=True)  # Padding comes last.
    return cut, F.pad(place_of[: grid**2], (0, 1))


def padding_of(places: torch.Tensor, tokens: int, window: int) -> list[torch.Tensor]:
    """Return views (B, windows, h, w, ...) that together are all padding of (B, P, ...), once.

    Padding lies below and to the right, so in the last row and column of windows.

    Args:
        places: (B, P, ...), windows in row-major order.
        tokens: number of tokens of the grid, a square.
        window: side of the windows in tokens.
    """
    grid = math.isqrt(tokens)
    rows = -(-grid // window)
    used = grid - (rows - 1) * window  # rows of the last windows that hold tokens
    cut = places.view(len(places), rows, rows, window, window, *places.shape[2:])
    below, right, corner = cut[:, -1, :, used:], cut[:, :-1, -1, :, used:], cut[:, -1, -1:]
    return [below, right, corner[:, :, :used, used:]]


class CutWindows(torch.autograd.Function):
    """Copy tokens (B, T + 1, C) to places (B, P, C) by index; the last token fills all padding.

    Every other token has a single place, so its gradient is a look-up. The gradient of
    `index_select` would add rows one by one: slowly, and on a GPU in a random order.
    """

    @staticmethod
    def forward(
        tokens: torch.Tensor, token_of: torch.Tensor, place_of: torch.Tensor, window: int
    ) -> torch.Tensor:
        return tokens.index_select(1, token_of)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.window = inputs[3]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (place_of,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        tokens = gradient.index_select(1, place_of)
        padding = padding_of(gradient, len(place_of) - 1, ctx.window)
        tokens[:, -1] = sum(part.sum((1, 2, 3)) for part in padding)
        return tokens, None, None, None


class JoinWindows(torch.autograd.Function):
    """Copy places (B, P, ...) to tokens (B, T, ...) by index, without padding.

    Gradients are looked up as well, which copies them once, and padding gets 0.
    """

    @staticmethod
    def forward(
        places: torch.Tensor, token_of: torch.Tensor, place_of: torch.Tensor, window: int
    ) -> torch.Tensor:
        return places.index_select(1, place_of)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.window = inputs[3]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (token_of,) = ctx.saved_tensors
        tokens = gradient.shape[1]
        places = gradient.index_select(1, token_of.clamp(max=tokens - 1))
        for part in padding_of(places, tokens, ctx.window):
            part.zero_()
        return places, None, None, None
