"""Values as JSON and arrays as bytes, to travel between ranks.

A pickle would run code of whoever sends it. JSON is only read, and comes back exactly: floats to
the bit, NaN too, tuples as tuples, keys of dictionaries with their types.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

# The key of an object that stands for what JSON has no form for.
KIND = "@"


def pack(
    value: Any, kinds: Sequence[type] = ()
) -> tuple[bytes, list[torch.Tensor]]:  # uint8, (bytes,) each
    """Return a message and the bytes of the arrays in it, in their order.

    Args:
        value: None, booleans, numbers, texts, paths, lists, tuples, dictionaries, arrays, tensors,
            and instances of `kinds`.
        kinds: the dataclasses that may occur.

    Raises:
        TypeError: something else is in it.
    """
    arrays: list[torch.Tensor] = []

    def plain(item: Any) -> Any:
        if item is None or isinstance(item, (bool, int, float, str)):
            return item
        if isinstance(item, np.generic):
            return item.item()
        if isinstance(item, list):
            return [plain(one) for one in item]
        if isinstance(item, dict):
            if all(isinstance(key, str) and key != KIND for key in item):
                return {key: plain(one) for key, one in item.items()}
            return {KIND: "dict", "of": [[plain(key), plain(one)] for key, one in item.items()]}
        if isinstance(item, tuple):
            return {KIND: "tuple", "of": [plain(one) for one in item]}
        if isinstance(item, Path):
            return {KIND: "path", "of": str(item)}
        if isinstance(item, (np.ndarray, torch.Tensor)):
            return {KIND: type(item).__name__} | _described(item, arrays)
        if is_dataclass(item) and type(item) in kinds:
            values = [plain(getattr(item, field.name)) for field in fields(item)]
            return {KIND: "dataclass", "name": type(item).__name__, "of": values}
        raise TypeError(f"a {type(item).__name__} cannot travel between ranks")

    content = {"value": plain(value)}
    return json.dumps(content | {"sizes": [len(array) for array in arrays]}).encode(), arrays


def unpack(
    message: bytes, receive: Callable[[int], torch.Tensor], kinds: Sequence[type] = ()
) -> Any:
    """Return the value that `pack` made a message of.

    Args:
        receive: returns the bytes of the next array, given their number.
        kinds: the dataclasses that may occur.
    """
    content = json.loads(message)
    arrays = iter([receive(size) for size in content["sizes"]])
    by_name = {kind.__name__: kind for kind in kinds}

    def value(item: Any) -> Any:
        if isinstance(item, list):
            return [value(one) for one in item]
        if not isinstance(item, dict):
            return item
        kind = item.get(KIND)
        if kind is None:
            return {key: value(one) for key, one in item.items()}
        if kind in ("ndarray", "Tensor"):
            flat = next(arrays).view(getattr(torch, item["dtype"]))
            array = flat.reshape(item["shape"])
            return array.numpy() if kind == "ndarray" else array
        inside = value(item["of"])
        if kind == "dataclass":
            return by_name[item["name"]](*inside)
        return {"dict": dict, "tuple": tuple, "path": Path}[kind](inside)

    return value(content["value"])


def _described(array: np.ndarray | torch.Tensor, arrays: list[torch.Tensor]) -> dict[str, Any]:
    """Return type and shape of an array, and append its bytes to the arrays."""
    if isinstance(array, np.ndarray):
        array = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    array = array.detach().cpu().contiguous()
    flat = array.reshape(-1)
    arrays.append(flat.view(torch.uint8) if len(flat) else torch.empty(0, dtype=torch.uint8))
    return {"dtype": str(array.dtype).removeprefix("torch."), "shape": list(array.shape)}
