"""Augmentation of training slices, in batches on any device.

`AUGMENTATIONS` has a row for each value of `--augment`. With SAMed's recipe, each slice gets one of
three changes: quarter turns with a flip, a rotation by a whole number of degrees with nearest
neighbour, or none. A cubic zoom follows. The results equal the original's scipy code. As in the
original, these turns and flips do not swap the labels of the left and right kidney.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from datasets.grey_values import GreyValues, draw_grey_values
from datasets.resampling import resize_images, resize_labels
from datasets.sides import mirror_of

LARGEST_ANGLE = 20  # degrees


@dataclass(frozen=True)
class Augmentation:
    """The random choices for one slice; the defaults change nothing."""

    quarter_turns: int = 0
    flip_axis: int | None = None  # 0 rows, 1 columns; applied after the turns or the rotation
    angle: int | None = None  # degrees; replaces the turns
    grey_values: GreyValues | None = None  # of the image alone
    classes: tuple[int, ...] | None = None  # what the classes 0, 1, 2 … become; None: themselves

    def __call__(self, images: torch.Tensor) -> torch.Tensor:  # (..., H, W), any dtype
        """Move the pixels; an odd number of quarter turns swaps H and W."""
        if self.angle is not None:
            turned = rotate_nearest(images, self.angle)
        else:
            turned = torch.rot90(images, self.quarter_turns, dims=(-2, -1))
        return turned if self.flip_axis is None else turned.flip(self.flip_axis - 2)

    def image(self, image: torch.Tensor) -> torch.Tensor:  # (H, W) or (3, H, W) float32
        """Apply all choices to an image."""
        moved = self(image)
        return moved if self.grey_values is None else self.grey_values(moved)

    def label(self, label: torch.Tensor) -> torch.Tensor:  # (H, W), integers
        """Apply all choices to a label."""
        moved = self(label)
        if self.classes is None:
            return moved
        return _class_table(self.classes, label.dtype, label.device)[moved.long()]


def draw_augmentation(rng: np.random.Generator) -> Augmentation:
    """Draw the choices for one slice: turns and a flip (1/2), a rotation (1/4) or none (1/4)."""
    if rng.random() > 0.5:
        quarter_turns = int(rng.integers(0, 4))
        return Augmentation(quarter_turns=quarter_turns, flip_axis=int(rng.integers(0, 2)))
    if rng.random() > 0.5:
        return Augmentation(angle=_draw_angle(rng))
    return Augmentation()


def _draw_angle(rng: np.random.Generator) -> int:
    return int(rng.integers(-LARGEST_ANGLE, LARGEST_ANGLE))


def draw_with_grey_values(rng: np.random.Generator) -> Augmentation:
    """Draw what `draw_augmentation` draws, and then changes of the grey values."""
    return replace(draw_augmentation(rng), grey_values=draw_grey_values(rng))


def draw_anatomical(rng: np.random.Generator, spec: Mapping[str, Any]) -> Augmentation:
    """Draw a rotation (1/2) and, on its own, a flip from left to right (1/2).

    The flip swaps the classes of the left and the right side. It is left out where it could make a
    label wrong (`datasets.sides`); the rotations are then the same.
    """
    rotated, flipped, angle = rng.random() > 0.5, rng.random() > 0.5, _draw_angle(rng)
    mirror = mirror_of(spec["orientation"], tuple(spec["class_names"]))
    flipped = flipped and mirror.axis is not None
    return Augmentation(
        flip_axis=mirror.axis if flipped else None,
        angle=angle if rotated else None,
        classes=mirror.classes if flipped else None,
    )


# What draws the choices for one slice from its generator and the data set's description as JSON.
AUGMENTATIONS: dict[str, Callable[[np.random.Generator, Mapping[str, Any]], Augmentation]] = {
    "samed": lambda rng, spec: draw_augmentation(rng),
    "none": lambda rng, spec: Augmentation(),
    "samed+intensity": lambda rng, spec: draw_with_grey_values(rng),
    "anatomical": draw_anatomical,
}


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


# As above, the tables are kept on the device.
@lru_cache(maxsize=16)
def _class_table(
    classes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:  # (C + 1,)
    return torch.tensor(classes, dtype=dtype, device=device)


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
        images: B slices (H, W), or (3, H, W) in colour or between neighbours, float32, about
            [0, 1], on the device to work on; their sizes may differ.
        labels: B label slices (H, W), integers.
        augmentations: one for each slice.
        output_size: (rows, columns) of the input, S × S.
        low_res: (rows, columns) of the logits, s × s.

    Returns:
        `image` (B, 3, S, S) float32, `label` (B, S, S) in the dtype of `labels`, and
        `low_res_label` (B, s, s) int64 for the loss.
    """
    images = [augment.image(image) for augment, image in zip(augmentations, images, strict=True)]
    labels = [augment.label(label) for augment, label in zip(augmentations, labels, strict=True)]
    if len({image.shape for image in images}) == 1:  # one product for the whole batch
        image = resize_images(torch.stack(images), output_size)
        label = resize_labels(torch.stack(labels), output_size)
    else:
        image = torch.stack([resize_images(image, output_size) for image in images])
        label = torch.stack([resize_labels(label, output_size) for label in labels])
    return {
        "image": image if image.ndim == 4 else image[:, None].expand(-1, 3, -1, -1),
        "label": label,
        # The original resizes the label twice: to S × S, and from there to s × s.
        "low_res_label": resize_labels(label, low_res).long(),
    }


class RandomGenerator:
    """Augment and resize one sample, as a `transform` of `Synapse_dataset`.

    Args:
        output_size: (rows, columns) of the network's input.
        low_res: (rows, columns) of the network's logits.
        seed: if given, the random choices depend only on (seed, epoch, index), and the caller must
            set `epoch` before each epoch. If None, they come from torch's random state, which
            differs between data loader workers and epochs.
    """

    def __init__(
        self, output_size: Iterable[int], low_res: Iterable[int], seed: int | None = None
    ) -> None:
        self.output_size = tuple(output_size)
        self.low_res = tuple(low_res)
        self.seed = seed
        self.epoch = 0

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Turn `image`, `label` (H, W) into `image` (3, S, S), `label` and `low_res_label`."""
        if self.seed is None:
            rng = np.random.default_rng(int(torch.randint(2**62, ())))
        else:
            rng = keyed_rng(self.seed, self.epoch, sample["index"])
        batch = prepare_batch(
            [torch.as_tensor(sample["image"])],
            [torch.as_tensor(sample["label"])],
            [draw_augmentation(rng)],
            output_size=self.output_size,
            low_res=self.low_res,
        )
        return {key: value[0] for key, value in batch.items()} | {"label": batch["label"][0].long()}
