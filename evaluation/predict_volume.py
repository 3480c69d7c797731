"""Predict whole volumes with any network, a batch of slices at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from common.errors import InputError, first_few
from datasets.resampling import resize_images, resize_labels
from evaluation.slice_batches import slice_batches
from segment_anything.modeling.common import resize_bilinear

Segment = Callable[[torch.Tensor], torch.Tensor]  # images (B, 3, S, S) to logits (B, C, S, S)


@torch.inference_mode()
def predict_volume(
    net: nn.Module,
    volume: np.ndarray | torch.Tensor,
    *,
    input_size: tuple[int, int],
    image_size: tuple[int, int],
    batch_size: int | None = None,
    progress: Callable[[int], object] | None = None,
    flips: Sequence[int] = (),
    on_probabilities: Callable[[int, torch.Tensor], object] | None = None,
) -> np.ndarray:
    """Label every slice of a volume as SAMed's evaluation does.

    Cubic zoom brings each slice to `input_size`, the size of the training slices, and then to
    `image_size`. The class with the largest logit at that size returns by nearest neighbour.
    A GPU does not wait between batches (see `slice_batches`), and the labels come back all at once.

    To compute in bf16 or fp16, call this function inside `torch.autocast`: the network then
    follows it, and the resizing stays in float32.

    Args:
        net: called as ``net(images, True, S)``; returns a dict with the logits `masks`.
        volume: (D, H, W) or, in colour, (D, 3, H, W), about [0, 1]. An object with this `shape`
            whose slices are such arrays also works, so the volume need not be in memory.
        input_size, image_size: (rows, columns).
        batch_size: slices per batch; None: those of `default_batch_size`.
        progress: called after each batch with its number of slices.
        flips: axes of a slice, 0 for rows and 1 for columns; see `averaged`.
        on_probabilities: called after each batch with the index of its first slice and its
            probabilities (B, C, H, W), float32, interpolated linearly to the volume's size.

    Returns:
        (D, H, W) uint8 labels. Logits that are NaN or infinite raise an `InputError`.
    """
    device = next(net.parameters()).device
    batch_size = batch_size or default_batch_size(device)
    if isinstance(volume, torch.Tensor):
        volume = volume.cpu().numpy()
    depth, size = volume.shape[0], tuple(volume.shape[-2:])
    labels = torch.empty((depth, *size), dtype=torch.uint8, device=device)
    finite = torch.empty(depth, dtype=torch.bool, device=device)  # of each slice, its logits

    def segment(images: torch.Tensor) -> torch.Tensor:  # (B, 3, S, S) -> (B, C, S, S) logits
        return net(images, True, image_size[0])["masks"]

    for start, count, slices in slice_batches(volume, batch_size, device):
        images = network_input(slices, input_size, image_size)
        scores = averaged(segment, images, flips) if flips else segment(images)
        scores = scores[:count]  # the rest of a batch on a GPU belongs to no slice
        labels[start : start + count], finite[start : start + count] = labels_of(scores, size)
        if on_probabilities is not None:
            probabilities = scores if flips else scores.float().softmax(dim=1)
            on_probabilities(start, resize_bilinear(probabilities, size))
        if progress is not None:
            progress(count)
    require_finite(finite.cpu().numpy())
    return labels.cpu().numpy()


def default_batch_size(device: torch.device) -> int:
    """Return the slices per batch that `--batch_size` sets: on a CPU those that fit its cache."""
    return 2 if device.type == "cpu" else 12


def labels_of(
    scores: torch.Tensor, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:  # (B, C, S, S) -> (B, *size) uint8, (B,) bool
    """Return the classes with the largest scores, zoomed to `size`, and which slices are finite."""
    # `max` picks the first of equal scores, as argmax does, and is six times faster on a CPU
    best, classes = scores.max(dim=1)  # (B, S, S) both; the largest of NaN and others is NaN
    return resize_labels(classes.to(torch.uint8), size), best.isfinite().flatten(1).all(dim=1)


def require_finite(finite: np.ndarray) -> None:  # (D,) bool, of each slice
    """Raise an `InputError` if the network's output is NaN or infinite in a slice."""
    if not finite.all():
        wrong = np.flatnonzero(~finite).tolist()
        raise InputError(
            f"the network's output is NaN or infinite in {len(wrong)} of {len(finite)} slices "
            f"(counted from 0: {first_few(wrong)}); compute in float32 (without --use_amp), or "
            "train again with a lower learning rate"
        )


def network_input(
    slices: torch.Tensor, input_size: tuple[int, int], image_size: tuple[int, int]
) -> torch.Tensor:  # (B, H, W) or (B, 3, H, W) float32 -> (B, 3, S, S) float32
    """Zoom slices to the training size and on to the network's size, in float32."""
    with torch.autocast(slices.device.type, enabled=False):
        images = resize_images(resize_images(slices, input_size), image_size)
    if images.ndim == 3:  # grey
        images = images[:, None].expand(-1, 3, -1, -1)
    return images


def averaged(
    segment: Segment, images: torch.Tensor, flips: Sequence[int]
) -> torch.Tensor:  # (B, 3, S, S) -> (B, C, S, S) float32
    """Average the probabilities over the images unflipped and flipped along the axes in `flips`."""
    ways: list[list[int]] = [[]]
    for axis in dict.fromkeys(flips):
        ways += [[*way, axis - 2] for way in ways]
    total = sum(segment(images.flip(way)).float().softmax(dim=1).flip(way) for way in ways)
    return total / len(ways)
