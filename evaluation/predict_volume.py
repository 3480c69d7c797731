"""Prediction of whole volumes by any network, slice batches at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from datasets.resampling import resize_images, resize_labels


@torch.inference_mode()
def predict_volume(
    net: nn.Module,
    volume: np.ndarray | torch.Tensor,
    *,
    input_size: tuple[int, int],
    image_size: tuple[int, int],
    batch_size: int | None = None,
    multimask_output: bool = True,
    amp_dtype: torch.dtype | None = None,
    progress: Callable[[int], object] | None = None,
    flips: Sequence[int] = (),
    on_probabilities: Callable[[int, torch.Tensor], object] | None = None,
) -> np.ndarray:
    """Label every slice of a volume, as SAMed's evaluation does.

    A slice goes by cubic zoom to `input_size`, the size of the training slices, and from there to
    `image_size`; the class of the largest logit at that size goes back by nearest neighbour.
    Network and resizing run on the network's device, `batch_size` slices at a time; only the
    labels come back, all at once, so that a GPU never waits for the host between batches.

    Args:
        net: called as ``net(images, multimask_output, S)``, returns a dict with `masks`.
        volume: (D, H, W), or (D, 3, H, W) in colour, about [0, 1]; or anything with that `shape`
            whose slices are such arrays, so that it need not exist as a whole.
        input_size, image_size: (rows, columns).
        batch_size: slices at once; None: 12, on a CPU 2, whose cache holds no more.
        amp_dtype: the network computes in it by autocast; None: in its own dtype. The resizing
            is always in float32.
        progress: called with the number of slices just done.
        flips: axes of a slice, 0 rows and 1 columns: probabilities are averaged over the slices as
            they are, flipped along each, and along both.
        on_probabilities: called with the first slice's index and (B, C, H, W) float32
            probabilities at the volume's own size, brought there linearly.

    Returns:
        (D, H, W) uint8 labels.
    """
    device = next(net.parameters()).device
    batch_size = batch_size or (2 if device.type == "cpu" else 12)
    if isinstance(volume, torch.Tensor):
        volume = volume.cpu().numpy()
    depth, size = volume.shape[0], tuple(volume.shape[-2:])
    labels = torch.empty((depth, *size), dtype=torch.uint8, device=device)
    autocast = torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None)

    def segment(images: torch.Tensor) -> torch.Tensor:  # (B, 3, S, S) -> (B, C, S, S) logits
        with autocast:
            return net(images, multimask_output, image_size[0])["masks"]

    for start in range(0, depth, batch_size):
        slices = torch.as_tensor(volume[start : start + batch_size]).to(device, torch.float32)
        images = resize_images(resize_images(slices, input_size), image_size)
        if images.ndim == 3:  # grey: (B, S, S)
            images = images[:, None].expand(-1, 3, -1, -1)
        scores = segment(images) if not flips else averaged(segment, images, flips)
        # as argmax, the first of equal ones too, and six times faster on a CPU
        classes = scores.max(dim=1).indices.to(torch.uint8)  # (B, S, S)
        labels[start : start + batch_size] = resize_labels(classes, size)
        if on_probabilities is not None:
            likely = scores if flips else scores.float().softmax(dim=1)
            on_probabilities(start, F.interpolate(likely, size, mode="bilinear"))
        if progress is not None:
            progress(len(slices))
    return labels.cpu().numpy()


def averaged(
    segment: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, flips: Sequence[int]
) -> torch.Tensor:  # (B, 3, S, S) -> (B, C, S, S) probabilities, float32
    """The mean of the probabilities over the images as they are and flipped every way named."""
    ways: list[list[int]] = [[]]
    for axis in dict.fromkeys(flips):
        ways += [[*way, axis - 2] for way in ways]
    total = sum(segment(images.flip(way)).float().softmax(dim=1).flip(way) for way in ways)
    return total / len(ways)
