"""How a low-rank update is computed and merged (SAMed, section 3.2).

All updates of a layer are computed in one product. To change an update (another product of A and
B), change `LoRALinear.low_rank`: the forward pass, merging and the packed layers of
`evaluation/cpu_speed.py` all use it. The forms that flags choose stand in `lora/form.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import InputError
from lora.form import SliceDropout, UpdateForm
from segment_anything.modeling.common import product_dtype


class LoRABranch(nn.Module):
    """The two matrices A and B of one low-rank update, ``x -> B A x``; zero at initialisation.

    With DoRA, `magnitude` (out / parts,) holds the trained lengths of the rows of W0 + s B A.
    It has no forward pass: `LoRALinear` computes all branches of a layer together.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise InputError(f"LoRA rank is {rank}, expected at least 1; pass another --rank")
        self.down = nn.Linear(in_features, rank, bias=False)  # A
        self.up = nn.Linear(rank, out_features, bias=False)  # B
        self.register_parameter("magnitude", None)
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
        self.scale = 1.0  # of the updates
        self.dropout: SliceDropout | None = None
        self.number = 0  # of this layer, for the dropout
        # The weight with the updates in it, while merged. `weight` itself never changes.
        self.register_buffer("merged_weight", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        if self.merged_weight is not None:
            return F.linear(x, self.merged_weight, self.bias)
        tokens = x.flatten(0, -2).to(product_dtype(x))  # (N, in); autocast would cast it twice
        out = F.linear(tokens, self.weight, self.bias)  # (N, out)
        down, up = self.low_rank()
        drops = self.training and self.dropout is not None
        seen = self.dropout(tokens, self.number) if drops else tokens
        hidden = F.linear(seen, down)  # (N, updates · rank)
        # One product adds all updates in place. A part without an update gets a product with 0.
        out = out.addmm_(hidden, up.T.to(hidden.dtype))
        if self.has_magnitudes:
            out = self._with_lengths(out, self._gain(self._sum(down, up)))
        return out.unflatten(0, x.shape[:-1])

    def set_form(
        self, form: UpdateForm, rank: int, dropout: SliceDropout | None, number: int
    ) -> None:
        """Compute the updates in this form from now on; DoRA's lengths start as those of W0.

        Args:
            dropout: what all layers of the network share.
            number: of this layer in the network.
        """
        self.unmerge()
        self.scale, self.dropout, self.number = form.scale(rank), dropout, number
        for branch in self.updates.values():
            branch.magnitude = None
            if form.kind == "dora":
                lengths = self.weight.new_empty(self.part_width)
                branch.magnitude = nn.Parameter(lengths, branch.up.weight.requires_grad)
        self.reset_magnitudes()

    @property
    def has_magnitudes(self) -> bool:
        """Whether the lengths of the rows are trained (DoRA)."""
        return any(branch.magnitude is not None for branch in self.updates.values())

    @torch.no_grad()
    def reset_magnitudes(self) -> None:
        """Let DoRA's lengths be those of the rows of W0 as it is now."""
        if self.has_magnitudes:
            lengths = row_lengths(self.weight).split(self.part_width)
            for part, branch in self.updates.items():
                branch.magnitude.copy_(lengths[int(part)])

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all updates as one: A (updates · rank, in) and s B (out, updates · rank)."""
        updates = dict(self.updates.items())
        branches = [updates.get(part) for part in self.parts]
        down = torch.cat([branch.down.weight for branch in branches if branch is not None])
        nothing = down.new_zeros(self.part_width, 0)
        up = [nothing if branch is None else branch.up.weight for branch in branches]
        up = torch.block_diag(*up)
        return down, up if self.scale == 1 else self.scale * up

    @torch.no_grad()
    def folded_weight(self) -> torch.Tensor:  # (out, in)
        """Return the weight with the updates in it."""
        weight = self._sum(*self.low_rank())
        return weight * self._gain(weight)[:, None] if self.has_magnitudes else weight

    def merge(self) -> None:
        """Compute with the folded weight from now on: as fast as the plain layer."""
        self.merged_weight = self.folded_weight()

    def unmerge(self) -> None:
        """Drop the merged copy. The weight was never changed, so nothing is lost to rounding."""
        self.merged_weight = None

    @torch.no_grad()
    def _sum(self, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:  # (out, in)
        """Return W0 + s B A in the precision of the weights, also under autocast."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.addmm(self.weight, up, down)

    def _gain(self, weight: torch.Tensor) -> torch.Tensor:  # (out, in) -> (out,)
        """Return by what DoRA multiplies each row of W0 + s B A: the trained length by its own.

        The own length is a constant for the gradient (arXiv 2402.09353, section 4.3).
        """
        updates = dict(self.updates.items())
        lengths = row_lengths(weight.detach()).split(self.part_width)
        return torch.cat(
            [
                updates[part].magnitude / length if part in updates else torch.ones_like(length)
                for part, length in zip(self.parts, lengths, strict=True)
            ]
        )

    def _with_lengths(self, out: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:  # (N, out)
        """Multiply an output by `gain`, but not its bias.

        A gain of 1 changes no bit. Half precision rounds gain - 1, which is finer than the gain.
        """
        product = out if self.bias is None else out - self.bias.to(out.dtype)
        return torch.addcmul(out, product, (gain - 1).to(out.dtype))


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the trained parameters for an optimiser, DoRA's lengths in a group without decay.

    Decay pulls A and B to the base weights, but a length to 0: away from them.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lengths = [p for name, p in trained.items() if name.endswith(".magnitude")]
    others = [p for name, p in trained.items() if not name.endswith(".magnitude")]
    groups: list[dict[str, Any]] = [{"params": others}]
    return [*groups, {"params": lengths, "weight_decay": 0.0}] if lengths else groups


def row_lengths(weight: torch.Tensor) -> torch.Tensor:  # (out, in) -> (out,)
    """Return the length of every row, never 0, so that one may divide by it.

    Added up in float64, it is the same number on a CPU and a GPU. DoRA starts with a gain of 1 so.
    """
    lengths = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).to(weight.dtype)
    return lengths.clamp_min(torch.finfo(weight.dtype).tiny)


def inference_weight(layer: nn.Module) -> torch.Tensor:  # (out, in)
    """Return the weight that a linear layer multiplies with, its updates included."""
    return layer.folded_weight() if isinstance(layer, LoRALinear) else layer.weight
