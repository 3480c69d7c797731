"""What a GPU would do for some code, on tensors without content: launches, bytes, attention.

Operators are counted as PyTorch's dispatcher calls them. A GPU launches one kernel for most of them
and a few for some, so the numbers compare versions of this code, not machines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segment_anything.modeling.common import product_dtype
from segment_anything.modeling.relative_attention import Attention

# Operators that only make a view, reserve memory, ask for a property, or read a number of the host.
FREE = frozenset(
    "_local_scalar_dense _reshape_alias _unsafe_view alias as_strided detach device diagonal empty "
    "empty_like empty_strided expand is_same_size lift_fresh new_empty new_empty_strided permute "
    "select slice split split_with_sizes squeeze t transpose unbind unfold unsqueeze view".split()
)


class Launches(TorchDispatchMode):
    """Counts the operators that compute, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if tensors and func.overloadpacket.__name__ not in FREE:
            self.count += 1
            self.bytes += sum(stored_bytes(tensor) for tensor in tensors)
        return out


def stored_bytes(x: torch.Tensor) -> int:
    """Return the size of a tensor in memory; an axis that only repeats (stride 0) counts once."""
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return torch.Size(sizes).numel() * x.element_size()


@dataclass(frozen=True)
class Call:
    """A call of attention: widths of queries, keys and values, and the dtype it computes in."""

    widths: tuple[int, int, int]
    dtype: torch.dtype


class FusedAttention(TorchFunctionMode):
    """Stands in for PyTorch's choice of an attention kernel on a GPU (compute capability 8 or 9).

    The calls are noted in `calls`. As PyTorch does it, flash attention computes in half precision,
    and the memory-efficient kernel in float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or "attn_mask" in kwargs:
            return func(*args, **kwargs)
        dtype = product_dtype(args[0])
        q, k, v = (x.to(dtype) for x in args)
        self.calls.append(Call((q.shape[-1], k.shape[-1], v.shape[-1]), dtype))
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        aten = torch.ops.aten
        if dtype == torch.float32:
            return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[0]
        width = q.shape[-1]
        padded = (F.pad(x, (0, -width % 8)) if width % 8 else x for x in (q, k, v))
        return aten._scaled_dot_product_flash_attention(*padded, scale=scale)[0][..., :width]


def as_on_gpu(model: nn.Module, device_type: str = "cuda") -> nn.Module:
    """Let the attention of a network compute as on a GPU; its values do not change."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.device_type = device_type
    return model


def without_content(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Replace all parameters and buffers of a network by tensors without content, in place."""
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                fake = nn.Parameter(mode.from_tensor(value.detach()), value.requires_grad)
                module._parameters[name] = fake
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = mode.from_tensor(value)
    return model
