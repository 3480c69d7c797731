"""The check of an exported network: onnxruntime must give what PyTorch gives."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from common.errors import InputError
from datasets.intensity import CT, to_unit
from evaluation.onnx_network import OUTPUT
from preprocess.phantom_volume import make_phantom
from segment_anything.modeling.common import resize_bilinear

BATCHES = (1, 3)  # that are checked


class Bounds(NamedTuple):
    """How much a file may differ from PyTorch."""

    logits: float  # times the largest logit, or 1 if none is larger
    probabilities: float  # of each class at each pixel


# Half precision has 11 bits: one rounding is up to 5e-4 of a value, and a network makes many.
FULL, HALF = Bounds(1e-4, 1e-3), Bounds(2e-2, 5e-2)


class Difference(NamedTuple):
    """How a file differs from PyTorch, over all images of the check."""

    logits: float  # the largest difference
    allowed: float  # of logits
    probabilities: float  # the largest difference
    pixels: int
    other_labels: int  # pixels with another label
    wrong_labels: int  # those of them that are no ties


def phantom_images(side: int) -> torch.Tensor:  # -> (B, 3, S, S) float32 in [0, 1]
    """Return neighbouring slices of a phantom CT; the channels differ, as in a 2.5-D network."""
    image = make_phantom(0, size=side, slices=max(BATCHES) + 2).image
    slices = torch.from_numpy(np.ascontiguousarray(to_unit(image, CT.low, CT.high)))
    return slices.unfold(0, 3, 1).permute(0, 3, 1, 2).contiguous()


def difference(
    exported: nn.Module, images: torch.Tensor, logits: torch.Tensor, bounds: Bounds
) -> Difference:
    """Compare a file with PyTorch.

    A pixel whose two largest logits are closer than twice what a logit may differ is a tie: either
    label is right there.

    Args:
        images: (B, 3, S, S).
        logits: (B, C, s, s), PyTorch's.
    """
    with torch.no_grad():
        parts = [exported(images[:count])[OUTPUT] for count in BATCHES]
    allowed = bounds.logits * max(1.0, float(logits.abs().max()))
    size = tuple(images.shape[-2:])
    expected = resize_bilinear(logits, size)
    largest = expected.topk(2, dim=1).values
    is_tie = largest[:, 0] - largest[:, 1] <= 2 * allowed  # (B, S, S)
    worst = probabilities = 0.0
    other = wrong = 0
    for part in parts:
        count = len(part)
        masks = resize_bilinear(part, size)
        chances = (masks.softmax(1) - expected[:count].softmax(1)).abs().max()
        worst = max(worst, _or_infinite((part - logits[:count]).abs().max()))
        probabilities = max(probabilities, _or_infinite(chances))
        differs = masks.argmax(1) != expected[:count].argmax(1)
        other, wrong = int(differs.sum()), wrong + int((differs & ~is_tie[:count]).sum())
    return Difference(worst, allowed, probabilities, is_tie.numel(), other, wrong)


def _or_infinite(value: torch.Tensor) -> float:
    """Return a number; infinity for NaN, which is within no bound."""
    return float(value) if value.isfinite() else float("inf")


def require_within(found: Difference, bounds: Bounds, output: Path) -> None:
    """Raise an `InputError` if a file differs from PyTorch by more than is allowed."""
    if (
        found.logits <= found.allowed
        and found.probabilities <= bounds.probabilities
        and not found.wrong_labels
    ):
        return
    raise InputError(
        f"{output} was not written, because onnxruntime differs from PyTorch: logits by "
        f"{found.logits:.2g} ({found.allowed:.2g} is allowed), probabilities by "
        f"{found.probabilities:.2g} ({bounds.probabilities:.2g}), {found.wrong_labels} labels that "
        "are no ties; leave out --fp16 if it was passed, or use the adapter itself"
    )
