"""The running average of the weights that train (`--ema`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The average ``a ← decay · a + (1 - decay) · w`` of every weight w that trains.

    It starts as the weights at the start of training, and moves after every update that the
    optimiser really makes: not after one that `--skip_nan` or a scaler leaves out. So the last
    1 / (1 - decay) updates count most. PyTorch's `AveragedModel` would copy the frozen encoder too.

    Args:
        model: the network; the weights that require a gradient now are averaged.
        optimizer: its updates are followed.
        decay: None: there is no average, and every method does nothing.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, decay: float | None
    ) -> None:
        self.weights: dict[str, nn.Parameter] = {}
        self.values: dict[str, torch.Tensor] = {}
        if decay is not None:
            self.weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
            self.move = get_ema_multi_avg_fn(decay)
            self.start()
            optimizer.register_step_post_hook(lambda *_: self._follow())

    @torch.no_grad()
    def start(self) -> None:
        """Begin anew with the weights as they are."""
        self.values = {name: weight.clone() for name, weight in self.weights.items()}

    def _follow(self) -> None:
        if self.weights:
            self.move([*self.values.values()], [*self.weights.values()], None)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the network compute and save with the average inside, and with its weights after."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Exchange weights and average, without a copy, so that no bit changes."""
        for name, weight in self.weights.items():
            weight.data, self.values[name] = self.values[name], weight.data
