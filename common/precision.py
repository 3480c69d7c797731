"""How exactly NVIDIA GPUs compute products and convolutions of float32; the dtype of autocast.

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


def tf32_products() -> bool:
    """Return whether NVIDIA GPUs may round the factors of products to 10 bits."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def amp_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 if the device supports it, else fp16, whose gradients have to be scaled."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Compute products and convolutions without TF32 for a while; a CPU knows no TF32."""
    if device.type != "cuda":
        yield
        return
    products = tf32_products()
    convolutions = torch.backends.cudnn.conv.fp32_precision == "tf32"
    allow_tf32(False)
    try:
        yield
    finally:
        _set(products=products, convolutions=convolutions)


def _set(*, products: bool, convolutions: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions
