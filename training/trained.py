"""What training changes, as a state file holds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora import LoRAModel
from training.average import WeightAverage


class Trained:
    """What training changes: the weights, what optimiser and scaler remember, the average.

    Args:
        model: the network on its device; its trained weights require a gradient.
        ema: decay of the running average (`WeightAverage`); None: no average.
    """

    def __init__(
        self,
        model: LoRAModel,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        ema: float | None = None,
    ) -> None:
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.average = WeightAverage(model, optimizer, ema)

    def state(self) -> dict[str, Any]:
        """Return the values for a state file; tensors are not copied."""
        state = {
            "model": {name: value.detach() for name, value in self._changing().items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return state | ({"average": self.average.values} if self.average.values else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned.

        Raises:
            ValueError: the state holds other weights. PyTorch raises errors of other types.
        """
        weights = self.values()
        stored = state["model"] | _as_average(state.get("average", {}))
        if weights.keys() != stored.keys():
            raise ValueError("other weights")
        with torch.no_grad():
            for name, value in weights.items():
                value.copy_(stored[name])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def values(self) -> dict[str, torch.Tensor]:
        """Return the weights that change, and their averages as `average of …`."""
        return self._changing() | _as_average(self.average.values)

    def _changing(self) -> dict[str, torch.Tensor]:
        """Return what trains or stands in the adapter file, without the base weights."""
        return {
            name: value
            for name, value in self.model.state_dict(keep_vars=True).items()
            if (isinstance(value, nn.Parameter) and value.requires_grad)
            or name.removeprefix("sam.") in self.model.saved
        }


def _as_average(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"average of {name}": value for name, value in values.items()}
