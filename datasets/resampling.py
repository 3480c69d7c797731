"""`scipy.ndimage.zoom`, exactly, as two small matrix products, batched and on any device.

Zoom is linear and separable in the image: order 3 is ``A @ image @ B.T`` with A and B made once per
size pair from scipy's own zoom of unit vectors, and order 0 is a gather of rows and columns.
That keeps a trait the published numbers contain: at some size pairs (512 -> 224 among them)
scipy's last coordinate rounds past the edge and the last row and column come out as 0.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage

BLOCK = 64  # rows or columns: small enough to skip most of a zoom matrix, large enough to be fast
NEGLIGIBLE = 1e-9  # weights of a zoom matrix, whose rows sum to 1


def resize_images(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Zoom with cubic splines (order 3), as `scipy.ndimage.zoom` does slice by slice.

    Args:
        images: (..., H, W), floating point.
        size: target (rows, columns).

    Returns:
        (..., rows, columns), same dtype and device; unchanged where the size is already right,
        as the original leaves such slices alone.
    """
    height, width = images.shape[-2:]
    rows, columns = size
    if (height, width) == (rows, columns):
        return images
    with _full_float32(images.device):
        right = zoom_blocks(width, columns, images.device, images.dtype)
        images = torch.cat([images[..., start:stop] @ block.T for start, stop, block in right], -1)
        left = zoom_blocks(height, rows, images.device, images.dtype)
        return torch.cat([block @ images[..., start:stop, :] for start, stop, block in left], -2)


def resize_labels(labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Zoom with nearest neighbour (order 0), as `scipy.ndimage.zoom` does slice by slice.

    Args:
        labels: (..., H, W), any dtype.
        size: target (rows, columns).

    Returns:
        (..., rows, columns), same dtype and device; 0 where scipy's coordinate leaves the image.
    """
    height, width = labels.shape[-2:]
    rows, columns = size
    if (height, width) == (rows, columns):
        return labels
    row_index, row_outside = zoom_index(height, rows, labels.device)
    column_index, column_outside = zoom_index(width, columns, labels.device)
    resized = labels.index_select(-2, row_index).index_select(-1, column_index)
    # index_select made a new tensor, so filling it in place does not touch the caller's
    resized.index_fill_(-2, row_outside, 0)
    return resized.index_fill_(-1, column_outside, 0)


@lru_cache(maxsize=256)
def zoom_blocks(
    source: int, target: int, device: torch.device, dtype: torch.dtype
) -> list[tuple[int, int, torch.Tensor]]:  # (start, stop, (rows, stop - start))
    """The matrix of a one-dimensional order-3 zoom, cut into blocks of its rows.

    A spline's weights fall by a factor of four from sample to sample, so each block needs only
    the columns `start`…`stop`; what lies outside is too small to change a float32. On a GPU one
    product of the whole matrix is faster than several small ones.
    """
    matrix = zoom_matrix(source, target)
    count = 1 if device.type == "cuda" else math.ceil(max(source, target) / BLOCK)
    blocks = []
    for rows in np.array_split(matrix, min(count, target)):
        used = np.flatnonzero(np.abs(rows).max(axis=0) > NEGLIGIBLE)
        start, stop = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 1)
        block = torch.from_numpy(rows[:, start:stop].copy())
        blocks.append((start, stop, block.to(device, dtype)))
    return blocks


@lru_cache(maxsize=64)
def zoom_matrix(source: int, target: int) -> np.ndarray:  # (target, source), float64
    """The matrix of a one-dimensional order-3 zoom: column j is the zoomed j-th unit vector."""
    units = np.eye(source)
    factor = target / source
    return np.stack([ndimage.zoom(unit, factor, order=3) for unit in units], axis=1)


@contextlib.contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """No TF32 in here, whatever the network runs with: it would round slices to 10 bits."""
    if device.type != "cuda":
        yield
        return
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


@lru_cache(maxsize=256)
def zoom_index(
    source: int, target: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:  # (target,) int64; positions that lie outside, int64
    """Which source element each target element takes in a one-dimensional order-0 zoom."""
    numbered = np.arange(1, source + 1, dtype=np.float64)  # 0 is left to mean "outside"
    taken = ndimage.zoom(numbered, target / source, order=0).astype(np.int64)
    index = torch.from_numpy(np.maximum(taken - 1, 0))
    outside = torch.from_numpy(np.flatnonzero(taken == 0))
    return index.to(device), outside.to(device)
