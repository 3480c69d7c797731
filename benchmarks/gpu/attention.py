"""Attention of the image encoder against float64, forward and backward, and which kernels ran."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.plain import PlainAttention
from segment_anything.modeling.relative_attention import Attention
from utils import allow_tf32, seed_everything

from .rows import Row, Setting, at_most

HEADS, WINDOW = 2, 14
# Relative to the largest absolute value. bf16 rounds every factor to 8 bits.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# Names of kernels, or on a CPU of operators, that compute attention rather than products.
ATTENTION = re.compile(r"flash|fmha|attention|sdpa|softmax|cudnn.*(fprop|bprop)", re.IGNORECASE)


def attention(setting: Setting) -> Iterator[Row]:
    """Compare window and global attention of several sizes with the plain form in float64."""
    seed_everything(0, deterministic=True)
    allow_tf32(False)
    grids = (14, 15) if setting.small else (14, 15, 32, 64)
    for grid, window, width, dtype in itertools.product(grids, (WINDOW, None), (64, 80), BOUNDS):
        if window == grid:  # a grid of one window is computed as a whole
            continue
        yield attention_row(setting.device, grid, window, width, dtype)


def attention_row(
    device: torch.device, grid: int, window: int | None, width: int, dtype: torch.dtype
) -> Row:
    """Compare one size; the value is the largest error of the output and of all gradients.

    Args:
        window: side of the windows; None: global attention.
        width: channels of a head.
    """
    layer = Attention(HEADS * width, HEADS, grid, window)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    layer.device_type = "cuda"  # On a CPU, too, take the form for GPUs.
    x, gradient = (torch.randn(2, grid, grid, HEADS * width) for _ in range(2))
    layer, x, gradient = (item.to(device) for item in (layer, x, gradient))

    plain = PlainAttention(copy.deepcopy(layer).double())
    expected = results(plain, x.double(), gradient.double())
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        kernels = kernels_of(lambda: results(layer, x, gradient))
        found = results(layer, x, gradient)
    errors = {
        name: float((found[name].double() - value).abs().max() / value.abs().max())
        for name, value in expected.items()
    }
    worst = torch.tensor(list(errors.values())).max().item()  # of NaN and others, NaN
    form = "global" if window is None else "window"
    name = str(dtype).removeprefix("torch.")
    what = f"{form}, grid {grid}, head width {width}, {name}: error of output and gradients"
    told = f"output {errors['output']:.1e}; {', '.join(kernels) or 'no kernel of attention'}"
    return at_most(what, worst, BOUNDS[dtype], note=told)


def results(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the output and the gradients of the input and of all weights."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    output = layer(x)
    output.backward(gradient.to(output.dtype))
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "x": x.grad} | gradients


def kernels_of(run: Callable[[], object]) -> list[str]:
    """Return the short names of the attention kernels that ran; on a CPU, of the operators."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = profile.events()
    on_device = [event.name for event in events if event.device_type.name == "CUDA"]
    names = on_device or [event.name for event in events if event.name.startswith("aten::_")]
    return sorted({short(name) for name in names if ATTENTION.search(name)})


def short(name: str) -> str:
    """Shorten the name of a kernel: without return type, namespaces and template arguments."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").split("(")[0]
    plain, _, arguments = name.partition("<")
    return f"{plain.split('::')[-1]}{f'<{arguments}'[:60] if arguments else ''}"
