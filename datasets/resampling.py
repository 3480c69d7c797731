"""`scipy.ndimage.zoom`, exactly, as two small matrix products, batched and on any device.

Zoom is linear and separable in the image: order 3 is ``A @ image @ B.T`` with A and B made once per
size pair from scipy's own zoom of unit vectors, and order 0 is a gather of rows and columns.
That keeps a trait the published numbers contain: at some size pairs (512 -> 224 among them)
scipy's last coordinate rounds past the edge and the last row and column come out as 0.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage


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
    left = zoom_matrix(height, rows, images.device, images.dtype)  # (rows, H)
    right = zoom_matrix(width, columns, images.device, images.dtype)  # (columns, W)
    return left @ images @ right.T


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
def zoom_matrix(
    source: int, target: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:  # (target, source)
    """The matrix of a one-dimensional order-3 zoom: column j is the zoomed j-th unit vector."""
    return torch.from_numpy(_zoom_matrix(source, target)).to(device, dtype)


@lru_cache(maxsize=64)
def _zoom_matrix(source: int, target: int) -> np.ndarray:  # (target, source), float64
    units = np.eye(source)
    factor = target / source
    return np.stack([ndimage.zoom(unit, factor, order=3) for unit in units], axis=1)


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
