"""What travels between ranks comes back equal, and is never a pickle."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed.messages import KIND, pack, unpack


@dataclasses.dataclass(frozen=True)
class Found:
    case: str
    picture: np.ndarray
    sides: tuple[Found, ...] = ()


def passed(value: Any, *kinds: type) -> Any:
    message, arrays = pack(value, kinds)
    waiting = iter(array.clone() for array in arrays)

    def receive(size: int) -> torch.Tensor:
        array = next(waiting)
        assert array.dtype == torch.uint8 and array.shape == (size,)
        return array

    return unpack(message, receive, kinds)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1, True, 2**70, -0.0, 1e-320, 0.1 + 0.2, math.inf, "é\n\u2028\udcff", ""],
        {"a": (1, (2.0, None)), "b": [], "c": ()},
        {3: "x", (1, 2): {"y": None}, None: 1, 2.5: [], True: 2},
        {KIND: "tuple", "of": "a dictionary that looks like a sign"},
        Path("/a/b"),
    ],
)
def test_plain_values_come_back_equal_in_value_and_type(value: Any):
    found = passed(value)
    assert found == value and repr(found) == repr(value)


def test_floats_come_back_to_the_bit():
    values = np.random.default_rng(0).integers(0, 2**63, 2000).view(np.float64).tolist()
    found = passed(values)
    finite = [(a, b) for a, b in zip(values, found, strict=True) if not math.isnan(a)]
    assert len(finite) > 1900 and all(struct.pack("d", a) == struct.pack("d", b) for a, b in finite)
    assert math.isnan(passed(math.nan))
    assert passed(np.float32(0.1)) == float(np.float32(0.1)) and passed(np.int64(3)) == 3


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "uint8", "int64", "bool"])
def test_arrays_come_back_equal_in_any_shape(dtype: str):
    for shape in ((), (0, 3), (2, 3, 4)):
        tensor = torch.randn(shape).to(getattr(torch, dtype))
        array = tensor.float().numpy().T  # another order in memory
        found_tensor, found_array = passed([tensor, {"a": array}])
        assert found_tensor.dtype == tensor.dtype and torch.equal(found_tensor, tensor)
        assert found_array["a"].dtype == array.dtype and found_array["a"].shape == array.shape
        assert np.array_equal(found_array["a"], array)


def test_only_the_named_dataclasses_and_no_other_object_travel():
    value = Found("a", np.arange(6, dtype=np.uint16), (Found("b", np.zeros(0)),))
    found = passed([value], Found)[0]
    assert found.case == "a" and found.sides[0].case == "b"
    assert found.picture.dtype == np.uint16 and found.picture.tolist() == [0, 1, 2, 3, 4, 5]
    for other in (value, object(), {1, 2}, print, np.array([None]), 1j, b"bytes"):
        with pytest.raises(TypeError):
            pack(other)
    foreign = json.dumps({"value": {KIND: "dataclass", "name": "Path", "of": ["x"]}, "sizes": []})
    with pytest.raises(KeyError):
        unpack(foreign.encode(), lambda size: torch.empty(size), [Found])
