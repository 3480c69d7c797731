"""How much work a training step is, and how fast a GPU could do it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain import plain_copy
from lora import LoRAModel

# Dense bf16 operations per second, as the makers state them.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "3090": 71e12, "4090": 165e12}


def datasheet_peak(name: str) -> float | None:
    """Return the bf16 operations per second of the GPU of this name; None if it is not known."""
    return next((peak for part, peak in PEAK.items() if part in name), None)


def step_operations(model: LoRAModel, image_size: int) -> tuple[int, int]:
    """Count the floating-point operations of a forward and a backward pass of one image.

    They are those of the plain form of the network, so that work that a faster form adds or saves
    does not change them. A frozen weight has no gradient, so its product is not counted.

    Args:
        model: on any device; it is not changed.
    """
    shadow = plain_copy(model).to("meta")
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    return count_operations(lambda: shadow(image, full_size_masks=False)["low_res_logits"])


def count_operations(compute: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """Count the floating-point operations of a computation and of its backward pass.

    A product and its sum are two operations. Only matrix products and convolutions count.
    """
    with FlopCounterMode(display=False) as forward:
        output = compute()
    with FlopCounterMode(display=False) as backward:
        output.backward(torch.empty_like(output))
    return forward.get_total_flops(), backward.get_total_flops()
