"""How a low-rank update is computed and merged (SAMed, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import InputError


class LoRABranch(nn.Module):
    """Low-rank update ``x -> up(down(x))``; exactly zero at initialisation."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise InputError(f"LoRA rank is {rank}, expected at least 1; pass another --rank")
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming-uniform, B zero: the wrapped layer starts unchanged."""
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        return self.up(self.down(x))


class LoRALinear(nn.Module):
    """A linear layer with a low-rank update on some equal parts of its output.

    It takes over the wrapped layer's parameters under their own names, so the network around it
    keeps SAM's state-dict keys.
    """

    def __init__(self, linear: nn.Linear, rank: int, *, parts: int, updated: Sequence[int]) -> None:
        super().__init__()
        self.weight = linear.weight  # (out, in)
        self.bias = linear.bias  # (out,)
        self.part_width = linear.out_features // parts
        self.parts = [str(part) for part in range(parts)]
        self.updates = nn.ModuleDict(
            {str(part): LoRABranch(linear.in_features, self.part_width, rank) for part in updated}
        )
        # The weight with the updates added, while merged; the weight itself is never changed.
        self.register_buffer("merged_weight", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        if self.merged_weight is not None:
            return F.linear(x, self.merged_weight, self.bias)
        tokens = x.flatten(0, -2)  # (N, in)
        out = F.linear(tokens, self.weight, self.bias)  # (N, out)
        down, up = self.low_rank()
        hidden = F.linear(tokens, down)  # (N, updates · rank)
        # all updates in one product that adds in place; parts without one get a product with 0
        return out.addmm_(hidden, up.T.to(hidden.dtype)).unflatten(0, x.shape[:-1])

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All updates as one: (updates · rank, in) and (out, updates · rank)."""
        updates = dict(self.updates.items())
        branches = [updates.get(part) for part in self.parts]
        down = torch.cat([branch.down.weight for branch in branches if branch is not None])
        nothing = down.new_zeros(self.part_width, 0)
        up = [nothing if branch is None else branch.up.weight for branch in branches]
        return down, torch.block_diag(*up)

    @torch.no_grad()
    def folded_weight(self) -> torch.Tensor:  # (out, in)
        """The weight with the updates added."""
        down, up = self.low_rank()
        return torch.addmm(self.weight, up, down)

    def merge(self) -> None:
        """Compute with the folded weight: inference at the cost of a plain layer."""
        self.merged_weight = self.folded_weight()

    def unmerge(self) -> None:
        """Drop the merged copy; the weight was never touched, so nothing is lost to rounding."""
        self.merged_weight = None
