"""The slices of a volume as batches on the device, read while the device computes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


def slice_batches(
    volume: np.ndarray, batch_size: int, device: torch.device
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield for each batch its first slice, its number of slices, and the slices on the device.

    A GPU gets its batches from two pinned buffers in turn, so that the host never waits for a copy
    and reads the next slices meanwhile. It is at most two batches ahead of the GPU.

    Args:
        volume: (D, H, W) or (D, 3, H, W), or an object with this `shape` whose slices are arrays.
        batch_size: slices in a batch; the last batch of a volume may have fewer.

    Yields:
        The slices are (B, H, W) or (B, 3, H, W) float32. On a GPU, B may be larger than the number
        of slices; those that follow are 0 and belong to no slice. See `padded_count`.
    """
    depth = volume.shape[0]
    starts = range(0, depth, batch_size)
    if device.type != "cuda":
        for start in starts:
            slices = torch.as_tensor(volume[start : start + batch_size]).to(device, torch.float32)
            yield start, len(slices), slices
        return
    shape = (padded_count(min(depth, batch_size), batch_size), *volume.shape[1:])
    buffers = [_PinnedBuffer(shape, device) for _ in starts[:2]]
    for number, start in enumerate(starts):
        slices = torch.as_tensor(volume[start : start + batch_size])
        count = padded_count(len(slices), batch_size)
        yield start, len(slices), buffers[number % 2].send(slices, count)


def padded_count(count: int, batch_size: int) -> int:
    """Return the size to which a batch of `count` slices is padded: batch_size, or ½, ¼, … of it.

    A GPU plans its kernels anew for every size of a batch, which may take it seconds. So volumes
    of any depths together use few sizes: five with a batch size of 12, instead of twelve. Padding
    every last batch to the full size would leave one, but cost up to twelve times the work for a
    picture, which is a volume of one slice. This way a batch never doubles, and 1.5 slices are
    added to a volume on average. Batches of equal sizes (13 of 11 or 12 for 148 slices) would add
    none, but need other sizes for each depth.
    """
    size = batch_size
    while size > 1 and (half := (size + 1) // 2) >= count:
        size = half
    return size


class _PinnedBuffer:
    """Memory of the host from which a GPU copies by itself."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.host = torch.empty(shape, dtype=torch.float32, pin_memory=True)
        self.device = device
        self.copied = torch.cuda.Event()

    def send(self, slices: torch.Tensor, count: int) -> torch.Tensor:
        """Return a batch of `count` on the device, which starts with the slices; do not wait."""
        self.copied.synchronize()  # The GPU may still be copying what was sent before.
        batch = self.host[:count]
        batch[: len(slices)].copy_(slices)
        batch[len(slices) :].zero_()
        sent = batch.to(self.device, non_blocking=True)
        self.copied.record(torch.cuda.current_stream(self.device))
        return sent
