"""The loss on `low_res_logits`: cross entropy and Dice (SAMed, section 3.4), or other terms."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import InputError
from config.recipe_flags import BOUNDARY_WEIGHT
from distributed.ranks import Ranks
from training.signed_distance import signed_distances

SMOOTH = 1e-5


def dice_sums(
    scores: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:  # (B, C, ...), (B, ...) int -> (2, C)
    """Return the intersection and the denominator of each class, pooled over all other axes.

    The scores are squared in the denominator.
    """
    classes = torch.arange(scores.shape[1], device=labels.device)
    # The classes lie along the second axis, whatever the number of axes.
    truth = labels[:, None] == classes.view(-1, *[1] * (labels.ndim - 1))  # (B, C, ...) bool
    pooled = [axis for axis in range(scores.ndim) if axis != 1]
    intersection = (scores * truth).sum(pooled)
    return torch.stack([intersection, scores.square().sum(pooled) + truth.sum(pooled)])


def dice_per_class(sums: torch.Tensor) -> torch.Tensor:  # (2, C) -> (C,)
    """Return the soft Dice loss of each class."""
    return 1 - (2 * sums[0] + SMOOTH) / (sums[1] + SMOOTH)


class DiceLoss(nn.Module):
    """Mean soft Dice loss over all classes, including background, for scripts of the field.

    Training uses `SegmentationLoss`, which computes the same Dice.

    Args:
        n_classes: number of channels of the logits, with background.
    """

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.n_classes = n_classes

    def forward(
        self,
        inputs: torch.Tensor,
        target: torch.Tensor,
        weight: Sequence[float] | None = None,
        softmax: bool = False,
    ) -> torch.Tensor:
        """Return the loss of a batch.

        Args:
            inputs: (B, C, H, W) or (B, C, D, H, W) probabilities, or logits if `softmax` is set.
            target: (B, H, W) or (B, D, H, W) classes 0…C-1.
            weight: a factor for each class; None: 1.
            softmax: apply softmax to `inputs` first.

        Raises:
            ValueError: the shapes or the number of classes do not match.
        """
        if inputs.shape[1] != self.n_classes or inputs[:, 0].shape != target.shape:
            raise ValueError(
                f"inputs {tuple(inputs.shape)} and target {tuple(target.shape)} do not fit "
                f"{self.n_classes} classes"
            )
        scores = inputs.softmax(dim=1) if softmax else inputs
        losses = dice_per_class(dice_sums(scores, target))
        if weight is not None:
            losses = losses * losses.new_tensor(weight)
        return losses.sum() / self.n_classes


@dataclass(frozen=True)
class Term:
    """One term of the loss.

    Args:
        sums: from logits (B, C, H, W), labels (B, H, W) and the classes' weights (C,) or None to
            the term's sums (n,) over this part of a batch. B may be 0.
        value: from the sums (n,) over the whole batch to the term.
    """

    sums: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    value: Callable[[torch.Tensor], torch.Tensor]


def ce_sums(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:  # -> (2,)
    """Sum the cross entropy of the pixels, and their weights: those of their classes, or 1."""
    # On a GPU, `reduction="sum"` would add the pixels in any order.
    ce = F.cross_entropy(logits, labels, weights, reduction="none").sum()
    return torch.stack([ce, _weight_of(labels, weights, ce)])


def focal_sums(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:  # -> (2,)
    """Sum (1 - p)^2 · -log p of the pixels, p of their own class; and their weights.

    This is the focal loss with gamma 2 (arXiv 1708.02002, section 3.2), for the softmax of all
    classes.
    """
    ce = F.cross_entropy(logits, labels, reduction="none")  # (B, H, W), -log p
    focal = torch.expm1(-ce).square() * ce
    if weights is not None:
        focal = focal * weights[labels]
    focal = focal.sum()
    return torch.stack([focal, _weight_of(labels, weights, focal)])


def boundary_sums(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:  # -> (2,)
    """Sum probability · signed distance of the pixels and the classes 1…C-1; and count them.

    This is the boundary loss (arXiv 1812.07032). It may be negative. Class weights
    have no part in it.
    """
    del weights
    distances = signed_distances(labels, logits.shape[1])  # (B, C - 1, H, W)
    total = (logits.softmax(dim=1)[:, 1:] * distances).sum()
    return torch.stack([total, total.new_full((), distances.numel())])


def _weight_of(
    labels: torch.Tensor, weights: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor:
    return like.new_full((), labels.numel()) if weights is None else weights[labels].sum()


def _mean(sums: torch.Tensor) -> torch.Tensor:
    return sums[0] / sums[1]


# The terms that `--loss` names. A new one is a row here, and a choice of the flag.
TERMS = {
    "ce": Term(ce_sums, _mean),
    "focal": Term(focal_sums, _mean),
    "dice": Term(
        lambda logits, labels, weights: dice_sums(logits.softmax(dim=1), labels).flatten(),
        lambda sums: dice_per_class(sums.view(2, -1)).sum() / (len(sums) // 2),
    ),
    "boundary": Term(boundary_sums, _mean),
}


class SegmentationLoss(nn.Module):
    """The weighted sum of the terms of a batch, as published ``0.2 · cross entropy + 0.8 · Dice``.

    No term is a mean over samples. Where several processes share a batch, each needs the sums of
    the whole batch: `total` adds them up.

    Args:
        n_classes: number of channels of the logits, with background.
        dice_weight: weight of the Dice loss where there is another term, 0…1; cross entropy or
            focal loss gets the rest.
        total: from the sums (n,) of this process's part of the batch to those of the batch.
        terms: names in `TERMS`, joined by "+".
        boundary_weight: weight of the boundary loss, beside the others.
        class_weights: (C,) of cross entropy and focal loss, whose mean over the pixels becomes a
            weighted one, as that of `torch.nn.CrossEntropyLoss`; None: 1.
    """

    def __init__(
        self,
        n_classes: int,
        dice_weight: float,
        total: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
        *,
        terms: str = "ce+dice",
        boundary_weight: float = 0.0,
        class_weights: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        names = terms.split("+")
        dice = dice_weight if len(names) > 1 else 1.0
        weights = {"dice": dice, "boundary": boundary_weight}
        rest = 1 - dice if "dice" in names else 1.0
        self.n_classes = n_classes
        self.weights = {name: weights.get(name, rest) for name in names}
        self.total = total
        self.register_buffer("class_weights", class_weights)

    @classmethod
    def from_flags(
        cls, args: argparse.Namespace, device: torch.device, ranks: Ranks
    ) -> SegmentationLoss:
        """Return the loss that the flags of `train.py` describe.

        Args:
            args: `trained_on` of the first rank holds the number of voxels of each class.
        """
        class_weights = None
        if args.class_weights == "inverse":
            trained_on = ranks.from_first(args.trained_on)
            if trained_on is None:
                raise InputError(
                    "--class_weights inverse needs the voxels of each class, but the script passes "
                    "a dataset of its own without args.trained_on; call "
                    "config.data_spec.record_training_data first, or leave --class_weights out"
                )
            class_weights = inverse_frequencies(trained_on["voxels"])
            names = ["background", *args.spec["class_names"]]
            told = [f"{n} {w:.3g}" for n, w in zip(names, class_weights.tolist(), strict=True)]
            logging.info("weights of the classes in the loss: %s", ", ".join(told))
            class_weights = class_weights.to(device)
        boundary = BOUNDARY_WEIGHT if args.boundary_param is None else args.boundary_param
        return cls(
            args.num_classes + 1,
            args.dice_param,
            ranks.total,
            terms=args.loss,
            boundary_weight=boundary,
            class_weights=class_weights,
        )

    def forward(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:  # (B, C, H, W), (B, H, W) int64 -> scalars
        """Return `loss` and `loss_<term>` of every term, in float32 for any dtype of logits."""
        logits = logits.float()
        rows = {name: TERMS[name] for name in self.weights}
        sums = [row.sums(logits, labels, self.class_weights) for row in rows.values()]
        totals = self.total(torch.cat(sums)).split([len(part) for part in sums])
        found = {n: row.value(t) for (n, row), t in zip(rows.items(), totals, strict=True)}
        loss = reduce(add, (self.weights[name] * value for name, value in found.items()))
        return {"loss": loss} | {f"loss_{name}": value for name, value in found.items()}


def inverse_frequencies(voxels: Sequence[int]) -> torch.Tensor:  # (C,) -> (C,) float32
    """Return the inverse frequency of each class, with mean 1 over the classes that occur.

    A class without voxels gets 1, which no pixel uses.

    Args:
        voxels: number of each class in the training slices, background first.
    """
    counts = torch.tensor(voxels, dtype=torch.float64)
    occurs = counts > 0
    mean = (1 / counts[occurs]).mean()
    return torch.where(occurs, 1 / counts / mean, 1).float()


def calc_loss(
    outputs: dict[str, torch.Tensor],
    low_res_label_batch: torch.Tensor,
    ce_loss: nn.Module,
    dice_loss: nn.Module,
    dice_weight: float = 0.8,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss, its cross entropy and its Dice, for loops in scripts of the field.

    Training uses `SegmentationLoss`, which computes the same.

    Args:
        outputs: those of the network; `low_res_logits` (B, C, s, s) counts.
        low_res_label_batch: (B, s, s) classes, any dtype.
        ce_loss, dice_loss: `torch.nn.CrossEntropyLoss` and `DiceLoss`, or others like them.
    """
    logits = outputs["low_res_logits"]
    ce = ce_loss(logits, low_res_label_batch.long())
    dice = dice_loss(logits, low_res_label_batch, softmax=True)
    return (1 - dice_weight) * ce + dice_weight * dice, ce, dice


class Focal_loss(nn.Module):
    """Focal loss (arXiv 1708.02002), for scripts of the field; training uses `SegmentationLoss`.

    Args:
        alpha: weight of class 0, while all other classes get 1 - alpha; or a weight per class.
        gamma: exponent that lowers the weight of easy pixels.
        num_classes: number of channels of the logits, with background.
        size_average: return the mean over pixels instead of the sum.
    """

    def __init__(
        self,
        alpha: float | Sequence[float] = 0.25,
        gamma: float = 2,
        num_classes: int = 3,
        size_average: bool = True,
    ) -> None:
        super().__init__()
        weights = (
            [alpha, *[1 - alpha] * (num_classes - 1)] if isinstance(alpha, int | float) else alpha
        )
        if len(weights) != num_classes:
            raise ValueError(f"alpha has {len(weights)} weights for {num_classes} classes")
        self.register_buffer("alpha", torch.tensor(weights, dtype=torch.float32))
        self.gamma = gamma
        self.size_average = size_average

    def forward(
        self, preds: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:  # (B, C, H, W) logits, (B, H, W) int64 -> scalar
        labels = labels.long()
        log_p = preds.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]  # (B, H, W)
        weights = self.alpha.to(preds.device)[labels]
        losses = -weights * (1 - log_p.exp()) ** self.gamma * log_p
        return losses.mean() if self.size_average else losses.sum()
