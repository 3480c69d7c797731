"""The optimisers that `--optimizer` names (SAMed, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora.layers import parameter_groups


@dataclass(frozen=True)
class OptimizerRow:
    """An optimiser.

    Args:
        make: from the weights, in groups, and the largest learning rate to the optimiser.
        kept: numbers that it keeps for each weight, which a step's memory has to hold.
    """

    make: Callable[[Iterable[dict[str, Any]], float], torch.optim.Optimizer]
    kept: int


# A new one is a row here, and a choice of the flag.
OPTIMIZERS = {
    "sgd": OptimizerRow(
        lambda groups, lr: torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=1e-4), kept=1
    ),
    "adamw": OptimizerRow(
        lambda groups, lr: torch.optim.AdamW(groups, lr, betas=(0.9, 0.999), weight_decay=0.1),
        kept=2,
    ),
}


def make_optimizer(model: nn.Module, name: str, base_lr: float) -> torch.optim.Optimizer:
    """Return the optimiser of a row of `OPTIMIZERS`, for the weights that train."""
    return OPTIMIZERS[name].make(parameter_groups(model), base_lr)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return all parameters that an optimiser updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
