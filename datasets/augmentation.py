"""Augmentation of training slices (SAMed's recipe), in batches on any device.

Each slice gets one of three changes: quarter turns with a flip, a rotation by a whole number of
degrees with nearest neighbour, or none. A cubic zoom follows. The results equal the original's
scipy code. As in the original, turns and flips do not swap the labels of the left and right kidney.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage

from datasets.resampling import resize_images, resize_labels

LARGEST_ANGLE = 20  # degrees


@dataclass(frozen=True)
class Augmentation:
    """The random choices for one slice; the defaults change nothing."""

    quarter_turns: int = 0
    flip_axis: int | None = None  # 0 rows, 1 columns; applied after the turns
    angle: int | None = None  # degrees; replaces turns and flip

    def __call__(self, images: torch.Tensor) -> torch.Tensor:  # (..., H, W), any dtype
        """Apply the choices; an odd number of quarter turns swaps H and W."""
        if self.angle is not None:
            return rotate_nearest(images, self.angle)
        turned = torch.rot90(images, self.quarter_turns, dims=(-2, -1))
        return turned if self.flip_axis is None else turned.flip(self.flip_axis - 2)


def draw_augmentation(rng: np.random.Generator) -> Augmentation:
    """Draw the choices for one slice: turns and a flip (1/2), a rotation (1/4) or none (1/4)."""
    if rng.random() > 0.5:
        quarter_turns = int(rng.integers(0, 4))
        return Augmentation(quarter_turns=quarter_turns, flip_axis=int(rng.integers(0, 2)))
    if rng.random() > 0.5:
        return Augmentation(angle=int(rng.integers(-LARGEST_ANGLE, LARGEST_ANGLE)))
    return Augmentation()


def random_rot_flip(image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn and flip a slice and its label (H, W) as `np.random` decides, for older scripts."""
    quarter_turns = np.random.randint(0, 4)
    return _augmented(
        Augmentation(quarter_turns=quarter_turns, flip_axis=np.random.randint(0, 2)), image, label
    )


def random_rotate(image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotate a slice and its label (H, W) as `np.random` decides, for older scripts."""
    angle = np.random.randint(-LARGEST_ANGLE, LARGEST_ANGLE)
    return _augmented(Augmentation(angle=angle), image, label)


def _augmented(augment: Augmentation, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(augment(torch.from_numpy(np.ascontiguousarray(a))).numpy() for a in arrays)


def keyed_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator for one sample in one epoch.

    Its numbers do not depend on workers, ranks or restarts.
    """
    return np.random.default_rng([seed, epoch, index])


def rotate_nearest(images: torch.Tensor, angle: int) -> torch.Tensor:
    """Rotate (..., H, W) as `scipy.ndimage.rotate(order=0, reshape=False)`, with one gather."""
    height, width = images.shape[-2:]
    index = _rotation_index(height, width, angle, images.device)
    # Position 0 means "outside the image", so pixels that come from outside become 0.
    flat = torch.nn.functional.pad(images.flatten(-2), (1, 0))  # (..., 1 + H·W)
    return flat.index_select(-1, index).unflatten(-1, (height, width))


# The cache holds tensors on the device, because a copy for every sample would have to wait for it.
@lru_cache(maxsize=256)
def _rotation_index(
    height: int, width: int, angle: int, device: torch.device
) -> torch.Tensor:  # (H·W,) int32
    """Return the source position of each rotated pixel, by rotating pixel numbers with scipy."""
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
    """Augment slices and resize them to the sizes of the network's input and of its loss.

    Args:
        images: B slices (H, W), or (3, H, W) in colour, float32, about [0, 1], on the device to
            work on; their sizes may differ.
        labels: B label slices (H, W), integers.
        augmentations: one for each slice.
        output_size: (rows, columns) of the input, S × S.
        low_res: (rows, columns) of the logits, S/4 × S/4.

    Returns:
        `image` (B, 3, S, S) float32, `label` (B, S, S) in the dtype of `labels`, and
        `low_res_label` (B, S/4, S/4) int64 for the loss.
    """
    images = [augment(image) for augment, image in zip(augmentations, images, strict=True)]
    labels = [augment(label) for augment, label in zip(augmentations, labels, strict=True)]
    if len({image.shape for image in images}) == 1:  # one product for the whole batch
        image = resize_images(torch.stack(images), output_size)
        label = resize_labels(torch.stack(labels), output_size)
    else:
        image = torch.stack([resize_images(image, output_size) for image in images])
        label = torch.stack([resize_labels(label, output_size) for label in labels])
    return {
        "image": image if image.ndim == 4 else image[:, None].expand(-1, 3, -1, -1),
        "label": label,
        # The original resizes the label twice: to S × S, and from there to S/4 × S/4.
        "low_res_label": resize_labels(label, low_res).long(),
    }
