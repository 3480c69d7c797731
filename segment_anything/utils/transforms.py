"""Resizing of images and prompts to the side of the network's input."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

Array = TypeVar("Array", np.ndarray, torch.Tensor)


class ResizeLongestSide:
    """Scales an image so that its longer side is `target_length`, and prompts with it."""

    def __init__(self, target_length: int) -> None:
        self.target_length = target_length

    def apply_image(self, image: np.ndarray) -> np.ndarray:  # (H, W, 3) uint8 -> (h, w, 3) uint8
        """Resize a picture with Pillow's bilinear filter, as SAM does."""
        rows, columns = self.size_of(image.shape[:2])
        picture = Image.fromarray(np.ascontiguousarray(image))
        return np.array(picture.resize((columns, rows), Image.Resampling.BILINEAR))

    def apply_image_torch(self, image: torch.Tensor) -> torch.Tensor:  # (B, 3, H, W) floats
        """Resize a batch of pictures; the numbers differ a little from those of `apply_image`."""
        size = self.size_of(image.shape[-2:])
        return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)

    def apply_coords(self, coords: Array, original_size: tuple[int, int]) -> Array:
        """Scale (..., 2) positions (x, y) from an image of (rows, columns) to the resized one."""
        rows, columns = self.size_of(original_size)
        scale = [columns / original_size[1], rows / original_size[0]]  # (x, y)
        if isinstance(coords, torch.Tensor):
            coords = coords.float()
            return coords * coords.new_tensor(scale)
        return np.asarray(coords, dtype=float) * scale

    def apply_boxes(self, boxes: Array, original_size: tuple[int, int]) -> Array:
        """Scale (B, 4) boxes (x0, y0, x1, y1)."""
        return self.apply_coords(boxes.reshape(-1, 2, 2), original_size).reshape(-1, 4)

    apply_coords_torch = apply_coords
    apply_boxes_torch = apply_boxes

    def size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the resized (rows, columns) of an image of (rows, columns)."""
        return self.get_preprocess_shape(size[0], size[1], self.target_length)

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        """Return the (rows, columns) of an image whose longer side becomes `long_side_length`."""
        scale = long_side_length / max(oldh, oldw)
        return int(oldh * scale + 0.5), int(oldw * scale + 0.5)
