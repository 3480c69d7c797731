"""The loss: cross entropy and Dice on `low_res_logits` (SAMed, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

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


class SegmentationLoss(nn.Module):
    """``(1 - dice_weight) · cross entropy + dice_weight · Dice`` of a batch.

    Dice is not a mean over samples. Where several processes share a batch, each needs the sums of
    the whole batch: `total` adds them up.

    Args:
        n_classes: number of channels of the logits, with background.
        dice_weight: weight of the Dice loss, 0…1.
        total: from the sums (2·C + 2,) of this process's part of the batch to those of the batch.
    """

    def __init__(
        self,
        n_classes: int,
        dice_weight: float,
        total: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    ) -> None:
        super().__init__()
        self.n_classes = n_classes
        self.dice_weight = dice_weight
        self.total = total

    def forward(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:  # (B, C, H, W), (B, H, W) int64 -> three scalars
        """Return `loss`, `loss_ce` and `loss_dice`, computed in float32 for any dtype of logits."""
        logits = logits.float()
        # On a GPU, `reduction="sum"` would add the pixels in any order.
        ce = F.cross_entropy(logits, labels, reduction="none").sum()
        pixels = ce.new_full((), labels.numel())
        dice = dice_sums(logits.softmax(dim=1), labels)
        sums = self.total(torch.cat([torch.stack([ce, pixels]), dice.flatten()]))
        ce = sums[0] / sums[1]
        dice = dice_per_class(sums[2:].view(2, -1)).sum() / self.n_classes
        total = (1 - self.dice_weight) * ce + self.dice_weight * dice
        return {"loss": total, "loss_ce": ce, "loss_dice": dice}


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
        outputs: those of the network; `low_res_logits` (B, C, S/4, S/4) counts.
        low_res_label_batch: (B, S/4, S/4) classes, any dtype.
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
