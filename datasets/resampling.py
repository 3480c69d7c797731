"""`scipy.ndimage.zoom`, exactly, as two small matrix products, batched and on any device.

Zoom is linear and separable. Order 3 is ``A @ image @ B.T``, where A and B come from scipy's own
zoom of unit vectors and are made once for each pair of sizes. Order 0 is a gather of rows and
columns. This keeps a property of the published numbers: at some pairs of sizes (512 -> 224 among
them) scipy's last coordinate rounds past the edge, so the last row and column become 0.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage

from common.precision import full_float32

BLOCK = 64  # rows or columns: small enough to skip most of a zoom matrix, large enough to be fast
NEGLIGIBLE = 1e-9  # weights of a zoom matrix, whose rows sum to 1


def resize_images(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Zoom each slice with cubic splines, as `scipy.ndimage.zoom(order=3)` does.

    Args:
        images: (..., H, W), floating point.
        size: target (rows, columns).

    Returns:
        (..., rows, columns), same dtype and device. Images that have the target size already are
        returned unchanged, as in the original.
    """
    height, width = images.shape[-2:]
    rows, columns = size
    if (height, width) == (rows, columns):
        return images
    with full_float32(images.device):  # TF32 would round slices to 10 bits.
        right = zoom_blocks(width, columns, images.device, images.dtype)
        images = torch.cat([images[..., start:stop] @ block.T for start, stop, block in right], -1)
        left = zoom_blocks(height, rows, images.device, images.dtype)
        return torch.cat([block @ images[..., start:stop, :] for start, stop, block in left], -2)


def resize_labels(labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Zoom each slice with nearest neighbour, as `scipy.ndimage.zoom(order=0)` does.

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
    # `index_select` made a new tensor, so the caller's labels do not change here.
    resized.index_fill_(-2, row_outside, 0)
    return resized.index_fill_(-1, column_outside, 0)


@lru_cache(maxsize=256)
def zoom_blocks(
    source: int, target: int, device: torch.device, dtype: torch.dtype
) -> list[tuple[int, int, torch.Tensor]]:  # (start, stop, (rows, stop - start))
    """Return the matrix of a one-dimensional order-3 zoom, cut into blocks of rows.

    The weights of a spline fall by a factor of four from sample to sample. Each block therefore
    needs only the columns `start`…`stop`; the others are too small to change a float32. On a GPU
    there is one block, because one large product is faster than several small products.
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
    """Return the matrix of a one-dimensional order-3 zoom; column j is the zoomed unit vector j."""
    units = np.eye(source)
    factor = target / source
    return np.stack([ndimage.zoom(unit, factor, order=3) for unit in units], axis=1)


@lru_cache(maxsize=256)
def zoom_index(
    source: int, target: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:  # both int64: (target,), (positions outside,)
    """Return the source index of each target element in a one-dimensional order-0 zoom.

    The second tensor holds the target positions that lie outside the source.
    """
    numbered = np.arange(1, source + 1, dtype=np.float64)  # 0 means "outside"
    taken = ndimage.zoom(numbered, target / source, order=0).astype(np.int64)
    index = torch.from_numpy(np.maximum(taken - 1, 0))
    outside = torch.from_numpy(np.flatnonzero(taken == 0))
    return index.to(device), outside.to(device)
