"""LoRA modules in the style of the original, a class of their own around a `Sam`, as `LoRAModel`.

Such a class has `sam`, `save_lora_parameters(filename)`, `load_lora_parameters(filename)` and
`forward(batched_input, multimask_output, image_size)`. What its file holds is its own affair. The
programs add their settings to that file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from common.errors import InputError, first_few
from common.tensors import load_tensors
from lora.adapter_file import read_adapter, with_classes
from lora.fitting import require_same_network, require_same_tensors
from lora.model import LoRAModel

METHODS = ("save_lora_parameters", "load_lora_parameters", "forward")


def as_lora_model(model: nn.Module, rank: int) -> LoRAModel:
    """Return a variant as it is, and a module in the style of the original as an `OlderModule`.

    Raises:
        InputError: the class lacks a part that the programs need.
    """
    if isinstance(model, LoRAModel):
        return model
    absent = [name for name in METHODS if not callable(getattr(model, name, None))]
    absent += [] if isinstance(getattr(model, "sam", None), nn.Module) else ["sam"]
    if not isinstance(model, nn.Module) or absent:
        raise InputError(
            f"the LoRA variant {type(model).__module__} has no {', '.join(absent)}; derive its "
            "class from lora.LoRAModel, or give it what the original's LoRA_Sam has"
        )
    return OlderModule(model, rank)


class OlderModule(LoRAModel):
    """A LoRA module in the style of the original, with the interface that the programs use.

    Args:
        older: the module; its parameters decide by `requires_grad` whether they train.
        rank: rank of its updates.
    """

    def __init__(self, older: nn.Module, rank: int) -> None:
        nn.Module.__init__(self)
        self.older = older
        self.rank = rank
        self.updates = ()  # Only the module knows where its updates are.
        self.variant = type(older).__module__
        self.moved_heads = []
        # A training state has to hold what the file holds, trained or not.
        self.saved = {f"older.sam.{name}" for name in older.sam.state_dict()}
        self.saved &= {f"older.sam.{name}" for name in self._adapter_tensors()}

    @property
    def sam(self) -> nn.Module:
        """The network inside the module."""
        return self.older.sam

    def forward(
        self,
        batched_input: torch.Tensor,
        multimask_output: bool = True,
        image_size: int | None = None,
        *,
        full_size_masks: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Compute the module's forward pass, which always returns the masks at full size."""
        del full_size_masks
        return self.older(
            batched_input, multimask_output, image_size or self.sam.image_encoder.img_size
        )

    def require_trained_is_saved(self) -> None:
        """Raise an `InputError` if the module's file is too small to hold what trains."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        saved = sum(tensor.numel() for tensor in self._adapter_tensors().values())
        if saved < trained:
            raise InputError(
                f"the LoRA variant {self.variant} trains {trained:,} values, but its "
                f"save_lora_parameters writes {saved:,}; save the others too, or freeze them"
            )

    def reset_parameters(self) -> None:
        """Start the updates as the module does."""
        self.older.reset_parameters()

    def train_all_weights(self) -> None:
        """Refuse `--ckpt none`: the module's file does not hold the encoder."""
        raise InputError(
            f"the LoRA variant {self.variant} saves no encoder, so it needs base weights; pass "
            "--ckpt FILE, or a variant that is derived from lora.LoRAModel"
        )

    def plain_state(self) -> dict[str, torch.Tensor]:
        """Refuse to merge: only the module knows how its updates are computed."""
        raise InputError(
            f"the LoRA variant {self.variant} cannot be merged; derive its class from "
            "lora.LoRAModel"
        )

    def _recorded_updates(self) -> dict[str, Any]:
        return {}  # Only the module knows them.

    def load_lora_parameters(
        self,
        filename: str | Path,
        classes: tuple[Sequence[str], Sequence[str]] | None = None,
    ) -> dict[str, Any]:
        """Let the module load a file; see `LoRAModel.load_lora_parameters`.

        Raises:
            InputError: the file is of another variant, rank, number of classes or base weights, or
                its tensors are not those that the module writes.
        """
        state, settings = read_adapter(filename)
        if classes is not None:
            state, *self.moved_heads = with_classes(state, *classes, self._adapter_tensors())
        require_same_network(self, state, {"module": self.variant} | settings, filename)
        require_same_tensors(self, state, self._adapter_tensors(), filename)
        with TemporaryDirectory() as folder:
            plain = Path(folder) / "adapter.pth"
            torch.save(state, plain)
            self.older.load_lora_parameters(str(plain))
        return settings

    def _adapter_tensors(self) -> dict[str, torch.Tensor]:
        """Return what the module's file holds, on the CPU."""
        with TemporaryDirectory() as folder:
            file = Path(folder) / "adapter.pth"
            self.older.save_lora_parameters(str(file))
            tensors = load_tensors(file)
        others = [key for key, value in tensors.items() if not isinstance(value, torch.Tensor)]
        if others:
            raise InputError(
                f"save_lora_parameters of the LoRA variant {self.variant} writes entries that are "
                f"no tensors: {first_few(others)}; leave them out"
            )
        return {key: value.detach() for key, value in tensors.items()}
