"""How long each kernel of attention takes at the shapes of training, and on a new shape."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import timed
from utils import allow_tf32, seed_everything

from .machine import seconds_of
from .rows import Row, Setting, not_run

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Copies of the logits that the math form holds at the same time.
MAPS = 6


@dataclass(frozen=True)
class Shape:
    """A call of attention in vit_b at 512 px.

    Args:
        count: batch times windows.
        tokens: of a window or of the image.
        width: channels of queries and keys, with those for the relative positions.
        values: channels of values.
    """

    name: str
    count: int
    heads: int
    tokens: int
    width: int
    values: int

    def __str__(self) -> str:
        size = f"{self.name} ({self.count}, {self.heads}, {self.tokens}, {self.width})"
        return size if self.values == self.width else f"{size}, values {self.values} wide"

    def inputs(self, setting: Setting, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return queries, keys and values, random, with a gradient."""
        return [
            torch.randn(
                self.count,
                self.heads,
                self.tokens,
                width,
                device=setting.device,
                dtype=dtype,
                requires_grad=True,
            )
            for width in (self.width, self.width, self.values)
        ]


WINDOWS = Shape("windows", 216, 12, 196, 92, 92)  # 24 images of 9 windows
GLOBAL = Shape("global", 24, 12, 1024, 128, 128)
SHAPES = [
    WINDOWS,
    replace(WINDOWS, width=96, values=96),
    replace(WINDOWS, width=96, values=64),
    GLOBAL,
    replace(GLOBAL, values=64),
]
NEW_BATCHES = (23, 17, 5)  # images; a batch that an epoch or a volume may end with


def kernels(setting: Setting) -> Iterator[Row]:
    """Time attention by each kernel, forward and backward, and its first call on new shapes."""
    allow_tf32(False)
    shapes = SHAPES
    if setting.small:
        shapes = [replace(shape, count=2, heads=2, tokens=16) for shape in SHAPES]
    for shape, (name, dtype) in itertools.product(shapes, DTYPES.items()):
        refusing = []
        for kernel, backend in KERNELS.items():
            what = f"{shape}, {name}, {kernel}"
            if kernel == "math" and not math_fits(shape, dtype, setting):
                yield not_run(what, "its logits would not fit into the memory")
                continue
            try:
                yield times(what, shape.inputs(setting, dtype), backend, setting)
            except RuntimeError as error:  # also if it refuses only the backward pass
                reason = str(error).splitlines()[0][:60]
                refusing.append(f"{kernel} ({reason})")
        if refusing:
            yield Row(f"{shape}, {name}, kernels that refuse", "; ".join(refusing))
    if setting.device.type != "cuda":
        yield not_run("first call on a new batch size")
        return
    for shape, kernel in itertools.product((shapes[1], shapes[3]), ("flash", "cuDNN")):
        yield first_calls(shape, kernel, setting)


def math_fits(shape: Shape, dtype: torch.dtype, setting: Setting) -> bool:
    """Return whether the logits of the math form take at most half of the free memory."""
    if setting.device.type != "cuda":
        return True
    logits = shape.count * shape.heads * shape.tokens**2 * dtype.itemsize
    return MAPS * logits <= torch.cuda.mem_get_info(setting.device)[0] / 2


def times(what: str, inputs: list[torch.Tensor], backend: SDPBackend, setting: Setting) -> Row:
    """Time a kernel's forward and backward pass; the note adds those in strict determinism.

    Raises:
        RuntimeError: the kernel does not take these inputs.
    """
    seed_everything(0, deterministic=False)
    one_way, back = milliseconds(inputs, backend, setting)
    note = f"forward {one_way:.3g}, backward {back:.3g}"
    seed_everything(0, deterministic=True)
    try:
        strict = milliseconds(inputs, backend, setting)
        note += f"; deterministic: {strict[0]:.3g}, {strict[1]:.3g}"
    except RuntimeError:
        note += "; refuses strict determinism"
    return Row(what, one_way + back, "ms", note=note)


def milliseconds(
    inputs: list[torch.Tensor], backend: SDPBackend, setting: Setting
) -> tuple[float, float]:
    """Return the milliseconds of a forward and of a backward pass."""
    repeats = 1 if setting.small else 10
    with sdpa_kernel(backend):
        output = F.scaled_dot_product_attention(*inputs)
        gradient = torch.randn_like(output)

        def forward() -> object:
            return F.scaled_dot_product_attention(*inputs)

        def backward() -> object:
            return torch.autograd.grad(output, inputs, gradient, retain_graph=True)

        found = [seconds_of(run, setting, repeats=repeats) for run in (forward, backward)]
    return 1e3 * found[0], 1e3 * found[1]


def first_calls(shape: Shape, kernel: str, setting: Setting) -> Row:
    """Time the first forward pass on batch sizes that the process has not seen."""
    what = f"{shape.name}, bf16, {kernel}: first call on a new batch size"
    seed_everything(0, deterministic=False)  # In strict determinism PyTorch leaves cuDNN out.
    first, again = [], []
    with sdpa_kernel(KERNELS[kernel]), torch.inference_mode():
        for images in NEW_BATCHES:
            count = shape.count // 24 * images
            inputs = replace(shape, count=count).inputs(setting, torch.bfloat16)

            def run(inputs: list[torch.Tensor] = inputs) -> object:
                return F.scaled_dot_product_attention(*inputs)

            try:
                first.append(1e3 * timed(run, setting.device))
            except RuntimeError as error:
                return not_run(what, str(error).splitlines()[0])
            again.append(1e3 * timed(run, setting.device))
    note = f"later calls {statistics.median(again):.3g} ms; batches of {NEW_BATCHES}"
    return Row(what, statistics.median(first), "ms", note=note)
