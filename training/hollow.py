"""Tensors without content, and the bytes that they would take."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Hollow(torch.Tensor):
    """A tensor that says it is on a CPU, but has the storage of a meta tensor: none.

    Autocast passes over meta tensors. PyTorch's fake tensors also check every operator, which
    takes a minute for a vit_h.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Hollow:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cpu",
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.as_meta = inner

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        known: dict[int, torch.Tensor] = {}  # An operator may return what it was given.

        def inner(outer: torch.Tensor) -> torch.Tensor:
            found = outer.as_meta if isinstance(outer, cls) else outer.to("meta")
            known[id(found)] = outer
            return found

        args = _mapped(inner, args)
        kwargs = {name: _mapped(inner, value) for name, value in (kwargs or {}).items()}
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        result = func(*args, **kwargs)
        return _mapped(lambda x: known[id(x)] if id(x) in known else cls(x), result)


class Peak(TorchDispatchMode):
    """Measures how many bytes all storages have together that something holds.

    Args:
        tensors: those that exist before.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.bytes = 0  # the largest sum so far
        self.held: dict[int, int] = {}  # the bytes of each storage, by its address
        self.now = 0  # their sum
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        makes = not types and any(one.name == "device" for one in func._schema.arguments)
        if makes:
            result = Hollow(func(*args, **kwargs | {"device": "meta"}))
        else:
            result = func(*args, **kwargs)
        _mapped(self._add, result)
        return result

    def _add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = (tensor.as_meta if isinstance(tensor, Hollow) else tensor).untyped_storage()
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes()
            self.now += self.held[key]
            self.bytes = max(self.bytes, self.now)
            weakref.finalize(storage, self._drop, key)
        return tensor

    def _drop(self, key: int) -> None:
        self.now -= self.held.pop(key)


def _mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Apply a function to the tensors that an operator takes or returns."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(function, one) for one in value)
    return value
