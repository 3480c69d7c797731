"""Prediction of whole volumes by any network, slice batches at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
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
) -> np.ndarray:
    """Label every slice of a volume, as SAMed's evaluation does.

    A slice goes by cubic zoom to `input_size`, the size of the training slices, and from there to
    `image_size`; the class of the largest logit at that size goes back by nearest neighbour.
    Network and resizing run on the network's device, `batch_size` slices at a time; only the
    labels come back, all at once, so that a GPU never waits for the host between batches.

    Args:
        net: called as ``net(images, multimask_output, S)``, returns a dict with `masks`.
        volume: (D, H, W) float, about [0, 1].
        input_size, image_size: (rows, columns).
        batch_size: slices at once; None: 12, on a CPU 2, whose cache holds no more.
        amp_dtype: the network computes in it by autocast; None: in its own dtype. The resizing
            is always in float32.
        progress: called with the number of slices just done.

    Returns:
        (D, H, W) uint8 labels.
    """
    device = next(net.parameters()).device
    batch_size = batch_size or (2 if device.type == "cpu" else 12)
    volume = torch.as_tensor(volume)
    labels = torch.empty(volume.shape, dtype=torch.uint8, device=device)
    autocast = torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None)
    for start in range(0, len(volume), batch_size):
        slices = volume[start : start + batch_size].to(device, torch.float32)  # (B, H, W)
        images = resize_images(resize_images(slices, input_size), image_size)
        with autocast:
            outputs = net(images[:, None].expand(-1, 3, -1, -1), multimask_output, image_size[0])
        # as argmax, the first of equal ones too, and six times faster on a CPU
        classes = outputs["masks"].max(dim=1).indices.to(torch.uint8)  # (B, S, S)
        labels[start : start + batch_size] = resize_labels(classes, tuple(volume.shape[1:]))
        if progress is not None:
            progress(len(slices))
    return labels.cpu().numpy()
