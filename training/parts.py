"""A batch that is computed in parts, with the gradient of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


class BatchInParts:
    """The forward and the backward pass of a batch, in parts where it does not fit at once.

    Dice pools its sums over the batch, so the loss needs the logits of all parts. They are computed
    first, without gradient. The loss then gives the gradient of the logits, and every part is
    computed a second time to send it on to the weights. The result is the gradient of the whole
    batch up to rounding, at the price of one more forward pass. The second pass draws the same
    random numbers as the first, so that a dropout drops the same values.

    Args:
        forward: from images (B, 3, S, S), and what else there is of them, to logits
            (B, classes + 1, s, s).
        images: (B, 3, S, S), B at least 1.
        at_once: number of images to compute at a time.
        others: what `forward` gets beside the images, by the names of its arguments: sequences
            with one item for each image, of which a part gets its items, the same in both passes.
    """

    def __init__(
        self,
        forward: Callable[..., torch.Tensor],
        images: torch.Tensor,
        at_once: int | None,
        others: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self.forward = forward
        size = at_once or len(images)
        self.parts = images.split(size)
        self.others = [
            {name: items[start : start + size] for name, items in (others or {}).items()}
            for start in range(0, len(images), size)
        ]
        self.random_states: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def logits(self) -> torch.Tensor:  # (B, classes + 1, s, s)
        """Compute the logits of all parts; the loss may be computed from them."""
        if len(self.parts) == 1:
            return self.forward(self.parts[0], **self.others[0])
        outputs = []
        with torch.no_grad():
            for part, other in zip(self.parts, self.others, strict=True):
                self.random_states.append(_random_state(part.device))
                outputs.append(self.forward(part, **other))
        return torch.cat(outputs).requires_grad_()

    def backward(self, logits: torch.Tensor) -> None:
        """Send the gradient of the logits on to the weights, after the loss's backward pass."""
        if len(self.parts) == 1:
            return
        gradients = logits.grad.split([len(part) for part in self.parts])
        for part, other, gradient, state in zip(
            self.parts, self.others, gradients, self.random_states, strict=True
        ):
            devices = [part.device] if part.is_cuda else []
            with torch.random.fork_rng(devices):
                _set_random_state(state, part.device)
                self.forward(part, **other).backward(gradient)


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


def _set_random_state(
    state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device
) -> None:
    on_cpu, on_gpu = state
    torch.set_rng_state(on_cpu)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu, device)
