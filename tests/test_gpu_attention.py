"""Which attention kernel of a GPU takes what the network gives it, and that the numbers stay.

The rules are those of PyTorch 2.11 to 2.13 (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp),
written down here a second time, because there may be no GPU to ask.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from launches import Call, FusedAttention, as_on_gpu, without_content
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from benchmarks.plain import PlainAttention
from segment_anything.modeling.relative_attention import (
    Attention,
    folded_attention,
    place_table,
    value_width,
)
from utils import seed_everything

HALF = (torch.float16, torch.bfloat16)
# Head widths of vit_b and vit_l (64), vit_h (80) and smaller encoders, and sides of grids.
SHAPES = [(d, side) for d in (64, 80, 32, 24) for side in (14, 15, 32)]


def flash_takes(call: Call, capability: int) -> bool:
    """Flash attention, without another copy of queries, keys and values."""
    q, k, v = call.widths
    return capability >= 80 and call.dtype in HALF and q == k == v <= 256 and q % 8 == 0


def efficient_takes(call: Call, capability: int) -> bool:
    """The memory-efficient kernel; values may have another width than queries."""
    q, k, v = call.widths
    if call.dtype == torch.bfloat16 and capability < 80:
        return False
    tensor_cores = capability >= 80 or (capability >= 70 and call.dtype in HALF)
    alignment = 4 if capability >= 80 else 1
    if tensor_cores:
        alignment = max(alignment, 8 if call.dtype in HALF else 4)
    return q == k and q % alignment == 0 and v % alignment == 0


def folded_inputs(
    depth: int, side: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Return random q, k, v, rows and columns of 2 windows and 3 heads."""
    q, k, v = (torch.randn(2, 3, side**2, depth, dtype=dtype) for _ in range(3))
    rows, columns = (torch.randn(2, 3, side, side, side, dtype=dtype) for _ in range(2))
    return q, k, v, rows, columns


@pytest.mark.parametrize(("depth", "side"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_every_fused_kernel_takes_the_widths(depth: int, side: int, dtype: torch.dtype):
    inputs = (x.to("meta") for x in folded_inputs(depth, side, dtype))
    with FusedAttention() as attention:
        folded_attention(*inputs, place_table(side, depth).to("meta"))
    (call,) = attention.calls
    assert call.widths[0] == 8 * math.ceil((depth + 2 * side) / 8)
    # Before compute capability 8.0 there is no flash attention, and no bf16.
    for capability in (70, 75, 80, 86, 89, 90, 100):
        if dtype == torch.bfloat16 and capability < 80:
            continue
        assert efficient_takes(call, capability), capability
        if dtype in HALF and capability >= 80:
            assert flash_takes(call, capability), capability
    if dtype == torch.float32:
        assert call.widths[2] == depth


def test_values_do_not_keep_the_projection():
    """A view of it would hold queries and keys, too, until the backward pass."""
    qkv = torch.rand(2, 64, 3, 3, 16)  # (N, tokens, parts, heads, d)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    rows, columns = torch.rand(2, 3, 8, 8, 8), torch.rand(2, 3, 8, 8, 8)
    seen = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                seen.extend(args[:3])
            return func(*args, **(kwargs or {}))

    with Seen():
        folded_attention(q, k, v, rows, columns, place_table(8, 16))
    assert len(seen) == 3
    for tensor in seen:
        assert tensor.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()


def test_the_widths_of_before_were_refused():
    """92 channels in fp16 on a card without flash attention: no fused kernel at all."""
    before = Call((92, 92, 92), torch.float16)
    assert not flash_takes(before, 75) and not efficient_takes(before, 75)
    assert not flash_takes(before, 90)
    assert efficient_takes(Call((92, 92, 92), torch.float32), 80)
    assert not efficient_takes(Call((94, 94, 94), torch.float32), 80)  # grids of 15 tokens


@pytest.mark.parametrize(("depth", "side"), SHAPES)
def test_padding_changes_no_bit(depth: int, side: int):
    """Queries and keys with zeros at the end have the same products."""
    q, k, v, rows, columns = folded_inputs(depth, side)
    found = folded_attention(q, k, v, rows, columns, place_table(side, depth))
    row = torch.arange(side).repeat_interleave(side)
    column = torch.arange(side).repeat(side)
    place = torch.cat([F.one_hot(row, side), F.one_hot(column, side)], dim=1).float()
    queries = torch.cat([q, rows.flatten(2, 3), columns.flatten(2, 3)], dim=-1)
    keys = torch.cat([k, place.expand(2, 3, -1, -1)], dim=-1)
    expected = F.scaled_dot_product_attention(queries, keys, v, scale=depth**-0.5)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("dtype", "depth", "folded", "width"),
    [
        (torch.float32, 64, 96, 64),
        (torch.float32, 20, 48, 24),
        (torch.float64, 64, 96, 64),
        (torch.bfloat16, 64, 96, 96),
        (torch.float16, 80, 112, 112),
    ],
)
def test_width_of_values(dtype: torch.dtype, depth: int, folded: int, width: int):
    assert value_width(depth, folded, dtype) == width


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [224, 240, 512])
def test_every_attention_of_a_network_has_a_fused_kernel(amp: torch.dtype | None, size: int):
    """Under autocast the dtype of the values is that of autocast, in the mask decoder as well."""
    model = as_on_gpu(tiny_model(image_size=size))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, FusedAttention() as attention:
        without_content(model, mode)
        with torch.no_grad(), torch.autocast("cpu", amp, enabled=amp is not None):
            model(torch.empty(2, 3, size, size), full_size_masks=False)
    assert len(attention.calls) == len(model.sam.image_encoder.blocks) + 7  # of the mask decoder
    for call in attention.calls:
        assert call.dtype == (amp or torch.float32)
        assert efficient_takes(call, 80)
        assert call.dtype == torch.bfloat16 or efficient_takes(call, 75)
        assert call.dtype == torch.float32 or flash_takes(call, 80)


@pytest.mark.parametrize(("grid", "window"), [(32, 14), (15, 14), (14, 14), (28, 14), (14, None)])
def test_bf16_stays_near_the_plain_form(grid: int, window: int | None):
    layer = Attention(96, 3, grid, window)
    layer.device_type = "cuda"
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, grid, grid, 96)
    expected = PlainAttention(layer)(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() <= 3e-2 * expected.abs().max()


def test_tables_follow_the_layer_and_are_not_saved():
    layer = Attention(96, 3, 16, 14)
    tables = {"offset_of", "place", "token_of", "place_of"}
    assert {name for name, _ in layer.named_buffers()} == tables
    assert not tables & layer.state_dict().keys()
    shadow = copy.deepcopy(layer).to("meta")
    assert all(buffer.is_meta for buffer in shadow.buffers())
    shadow.device_type = "cuda"
    assert shadow(torch.empty(2, 16, 16, 96, device="meta")).shape == (2, 16, 16, 96)
    assert layer.double().place.dtype == torch.double


@pytest.mark.parametrize("window", [14, None])
def test_the_form_for_gpus_is_one_graph(window: int | None):
    """torch.compile needs no break, forward and backward, and gives the same numbers."""
    layer = Attention(96, 3, 16, window)
    layer.device_type = "cuda"
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 16, 16, 96, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    grads = [torch.autograd.grad(form(x).square().sum(), x)[0] for form in (layer, compiled)]
    assert torch.allclose(*grads, atol=1e-4 * float(grads[0].abs().max()))


@pytest.mark.parametrize("deterministic", [False, True])
def test_programs_that_repeat_leave_cudnn_attention_out(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # is put back afterwards
    torch.backends.cuda.enable_cudnn_sdp(deterministic)
    seed_everything(0, deterministic=deterministic)
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    seed_everything(0, deterministic=False)
    assert enabled is not deterministic
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
