"""How a low-rank update is computed and merged (SAMed, section 3.2).

All updates of a layer are computed in one product. To change an update (a scale, another product
of A and B), change `LoRALinear.low_rank`: the forward pass, merging and the packed layers of
`evaluation/cpu_speed.py` all use it. A dropout on the tokens belongs into `LoRALinear.forward`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import InputError
from segment_anything.modeling.common import product_dtype


class LoRABranch(nn.Module):
    """The two matrices A and B of one low-rank update, ``x -> B A x``; zero at initialisation.

    It has no forward pass: `LoRALinear` computes all branches of a layer together.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise InputError(f"LoRA rank is {rank}, expected at least 1; pass another --rank")
        self.down = nn.Linear(in_features, rank, bias=False)  # A
        self.up = nn.Linear(rank, out_features, bias=False)  # B
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make A Kaiming-uniform and B zero, so that the wrapped layer starts unchanged."""
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)


class LoRALinear(nn.Module):
    """A linear layer with low-rank updates on some equal parts of its output.

    It takes over the parameters of the wrapped layer under their names, so that the network around
    it keeps SAM's state-dict keys.

    Args:
        linear: the layer to wrap.
        rank: rank of every update.
        parts: number of equal parts of the output: 3 for a fused qkv projection.
        updated: indices of the parts that get an update.
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
        # The weight with the updates added, while merged. `weight` itself never changes.
        self.register_buffer("merged_weight", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        if self.merged_weight is not None:
            return F.linear(x, self.merged_weight, self.bias)
        tokens = x.flatten(0, -2).to(product_dtype(x))  # (N, in); autocast would cast it twice
        out = F.linear(tokens, self.weight, self.bias)  # (N, out)
        down, up = self.low_rank()
        hidden = F.linear(tokens, down)  # (N, updates · rank)
        # One product adds all updates in place. A part without an update gets a product with 0.
        return out.addmm_(hidden, up.T.to(hidden.dtype)).unflatten(0, x.shape[:-1])

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all updates as one: A (updates · rank, in) and B (out, updates · rank)."""
        updates = dict(self.updates.items())
        branches = [updates.get(part) for part in self.parts]
        down = torch.cat([branch.down.weight for branch in branches if branch is not None])
        nothing = down.new_zeros(self.part_width, 0)
        up = [nothing if branch is None else branch.up.weight for branch in branches]
        return down, torch.block_diag(*up)

    @torch.no_grad()
    def folded_weight(self) -> torch.Tensor:  # (out, in)
        """Return the weight with the updates added."""
        down, up = self.low_rank()
        return torch.addmm(self.weight, up, down)

    def merge(self) -> None:
        """Compute with the folded weight from now on: as fast as the plain layer."""
        self.merged_weight = self.folded_weight()

    def unmerge(self) -> None:
        """Drop the merged copy. The weight was never changed, so nothing is lost to rounding."""
        self.merged_weight = None


def inference_weight(layer: nn.Module) -> torch.Tensor:  # (out, in)
    """Return the weight that a linear layer multiplies with, its updates included."""
    return layer.folded_weight() if isinstance(layer, LoRALinear) else layer.weight
