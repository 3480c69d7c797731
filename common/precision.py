"""How exactly NVIDIA GPUs compute products and convolutions of float32.

PyTorch has two names for the setting. Only the older one, `allow_tf32`, is right to *set*: code
that reads it, as `torch.compile` does in some releases, fails if only the newer one,
`fp32_precision`, was set. Only the newer one can always be *read*.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def allow_tf32(allowed: bool) -> None:
    """Set whether NVIDIA GPUs may round factors to 10 bits (TF32), in products and convolutions.

    By default PyTorch allows it in convolutions. That alone misses the golden outputs' tolerance.
    """
    _set(products=allowed, convolutions=allowed)


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Compute products and convolutions without TF32 for a while; a CPU knows no TF32."""
    if device.type != "cuda":
        yield
        return
    products = torch.backends.cuda.matmul.fp32_precision == "tf32"
    convolutions = torch.backends.cudnn.conv.fp32_precision == "tf32"
    allow_tf32(False)
    try:
        yield
    finally:
        _set(products=products, convolutions=convolutions)


def _set(*, products: bool, convolutions: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions
