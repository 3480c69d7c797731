"""Augmentation of training slices (SAMed's recipe), in batches on any device.

Every branch equals the original's scipy code: quarter turns with a flip, or a rotation by a whole
number of degrees with nearest neighbour, or nothing; then a cubic zoom. Turns and flips do not
swap the left and right kidney's labels: the published numbers were trained so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage

from .resampling import resize_images, resize_labels

LARGEST_ANGLE = 20  # degrees


@dataclass(frozen=True)
class Augmentation:
    """The random choices about one sample; the default leaves it as it is."""

    quarter_turns: int = 0
    flip_axis: int | None = None  # 0 rows, 1 columns; after the turns
    angle: int | None = None  # degrees, in place of turns and flip

    def __call__(self, images: torch.Tensor) -> torch.Tensor:  # (..., H, W), any dtype
        """Move the pixels; an odd number of quarter turns swaps H and W."""
        if self.angle is not None:
            return rotate_nearest(images, self.angle)
        turned = torch.rot90(images, self.quarter_turns, dims=(-2, -1))
        return turned if self.flip_axis is None else turned.flip(self.flip_axis - 2)


def draw_augmentation(rng: np.random.Generator) -> Augmentation:
    """Half the samples are turned and flipped, half of the others rotated."""
    if rng.random() > 0.5:
        return Augmentation(int(rng.integers(0, 4)), int(rng.integers(0, 2)))
    if rng.random() > 0.5:
        return Augmentation(angle=int(rng.integers(-LARGEST_ANGLE, LARGEST_ANGLE)))
    return Augmentation()


def keyed_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random choices of one sample in one epoch: no worker, rank or restart changes them."""
    return np.random.default_rng([seed, epoch, index])


def rotate_nearest(images: torch.Tensor, angle: int) -> torch.Tensor:
    """`scipy.ndimage.rotate(order=0, reshape=False)` of (..., H, W) as one gather."""
    height, width = images.shape[-2:]
    index = _rotation_index(height, width, angle, images.device)
    # position 0 stands for "outside", so that pixels rotated in from there are 0
    flat = torch.nn.functional.pad(images.flatten(-2), (1, 0))  # (..., 1 + H·W)
    return flat.index_select(-1, index).unflatten(-1, (height, width))


@lru_cache(maxsize=256)  # on the device: a copy for every sample would wait for it
def _rotation_index(
    height: int, width: int, angle: int, device: torch.device
) -> torch.Tensor:  # (H·W,) int32
    """Where each rotated pixel comes from: scipy's own rotation of the numbered pixels."""
    numbered = np.arange(1, height * width + 1, dtype=np.float64).reshape(height, width)
    rotated = ndimage.rotate(numbered, angle, order=0, reshape=False)
    return torch.from_numpy(rotated.astype(np.int32).ravel()).to(device)


def prepare_batch(
    images: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    augmentations: Sequence[Augmentation],
    *,
    output_size: tuple[int, int],
    low_res: tuple[int, int],
) -> dict[str, torch.Tensor]:
    """Augment and resize slices to what the network and its loss take.

    Args:
        images: B slices (H, W), or (3, H, W) in colour, float32, about [0, 1], on the device to
            work on; sizes may differ.
        labels: B label slices (H, W), integers.
        augmentations: one per slice.
        output_size: (rows, columns) of the input, S × S.
        low_res: (rows, columns) of the logits, S/4 × S/4.

    Returns:
        `image` (B, 3, S, S) float32, `label` (B, S, S) in its own dtype, `low_res_label`
        (B, S/4, S/4) int64, as the loss takes it.
    """
    moved = [augment(image) for augment, image in zip(augmentations, images, strict=True)]
    moved_labels = [augment(label) for augment, label in zip(augmentations, labels, strict=True)]
    if len({image.shape for image in moved}) == 1:  # one product for the whole batch
        image = resize_images(torch.stack(moved), output_size)
        label = resize_labels(torch.stack(moved_labels), output_size)
    else:
        image = torch.stack([resize_images(one, output_size) for one in moved])
        label = torch.stack([resize_labels(one, output_size) for one in moved_labels])
    return {
        "image": image if image.ndim == 4 else image[:, None].expand(-1, 3, -1, -1),
        "label": label,
        # from the label at S × S, as the original does: two roundings, not one
        "low_res_label": resize_labels(label, low_res).long(),
    }
