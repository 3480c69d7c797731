"""The form of the low-rank updates: their scale, their lengths, and a dropout in training."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from common.errors import InputError

KINDS = ("lora", "rslora", "dora")


@dataclass(frozen=True)
class UpdateForm:
    """What a network makes of A and B; the defaults are the published form, ``W0 + B A``.

    Args:
        kind: "lora": ``W0 + s B A`` with s = alpha / rank (arXiv 2106.09685, section 4.1).
            "rslora": s = alpha / √rank (arXiv 2312.03732, section 3).
            "dora": every row of ``W0 + s B A``, s = alpha / rank, divided by its length and
            multiplied by a trained one (arXiv 2402.09353, section 4).
        alpha: numerator of the scale; None: the rank.
        dropout: share of the values of a token that A does not see in training.
    """

    kind: str = "lora"
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"lora_kind is {self.kind!a:.40}, expected {' or '.join(KINDS)}")

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> UpdateForm:
        """Return the form that the flags `lora_…` describe; scripts may lack some of them."""
        values = {one.name: getattr(args, f"lora_{one.name}", one.default) for one in fields(cls)}
        return cls(**values)

    def scale(self, rank: int) -> float:
        """Return s, by which the updates are multiplied."""
        alpha = rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(rank) if self.kind == "rslora" else rank)


class SliceDropout:
    """Dropout whose choices follow from the slice and the layer, and from nothing else.

    So they do not depend on which slices are computed together, on which rank, in which order, or
    how often. A network has one such object, and all of its layers use it.

    Args:
        share: probability that a value becomes 0; the others are divided by 1 - share.
    """

    # Odd, so that the seeds of two layers always differ: a CPU's generator takes 32 bits of them.
    STEP = 0x9E3779B97F4A7C15

    def __init__(self, share: float) -> None:
        self.share = share
        # One number for each slice of the batch that is computed now. None: no loop has set them,
        # and PyTorch's own generator decides.
        self.seeds: Sequence[int] | None = None

    def __call__(self, tokens: torch.Tensor, layer: int) -> torch.Tensor:
        """Return tokens (N, in) with values dropped; the tokens of a slice follow each other.

        Args:
            layer: number of the layer in the network.
        """
        kept = torch.empty(tokens.shape, dtype=torch.bool, device=tokens.device)
        if self.seeds is None:
            kept.bernoulli_(1 - self.share)
        else:
            generator = torch.Generator(tokens.device)
            slices = kept.view(len(self.seeds), -1, tokens.shape[-1])
            for part, seed in zip(slices, self.seeds, strict=True):
                generator.manual_seed((seed + layer * self.STEP) % 2**63)
                part.bernoulli_(1 - self.share, generator=generator)
        return tokens * kept * (1 / (1 - self.share))
