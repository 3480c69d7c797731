"""What the machine can do: versions, bandwidth, products."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.timing import timed
from utils import allow_tf32

from .rows import Row, Setting, not_run


def machine(setting: Setting) -> Iterator[Row]:
    """Say what the hardware is, and measure the ceilings that the other stages compare with."""
    device = setting.device
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        yield Row("card", facts.name, note=f"compute capability {facts.major}.{facts.minor}")
        yield Row("multiprocessors", facts.multi_processor_count)
        yield Row("memory", facts.total_memory / 2**30, "GiB")
        yield Row("CUDA", torch.version.cuda, note=f"cuDNN {torch.backends.cudnn.version()}")
    else:
        yield not_run("card, memory, versions of CUDA and cuDNN")
    yield Row("copy", bandwidth(setting) / 1e12, "TB/s", note="bytes read and bytes written")
    size = product_size(setting)
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("float32", torch.float32, False),
        ("TF32", torch.float32, True),
    ):
        speed = product_speed(setting, dtype, tf32=tf32)
        yield Row(f"product of {size} × {size} matrices, {name}", speed / 1e12, "TFLOP/s")


def bandwidth(setting: Setting) -> float:
    """Return the bytes per second, read and written together, of copies within the device."""
    count = 1 << (22 if setting.small else 28)  # 1 GiB on a GPU, far more than its cache
    source = torch.ones(count, device=setting.device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), setting, repeats=20)
    return 2 * source.nbytes / seconds


def product_speed(setting: Setting, dtype: torch.dtype, *, tf32: bool = False) -> float:
    """Return the operations per second of a large matrix product: what kernels here can reach."""
    size = product_size(setting)
    allow_tf32(tf32)
    a, b = (torch.randn(size, size, device=setting.device, dtype=dtype) for _ in range(2))
    seconds = seconds_of(lambda: a @ b, setting, repeats=20)
    allow_tf32(False)
    return 2 * size**3 / seconds


def product_size(setting: Setting) -> int:
    """Return the side of the matrices of `product_speed`."""
    return 256 if setting.small else 8192


def seconds_of(run, setting: Setting, *, repeats: int) -> float:
    """Return the seconds of one call, the mean of `repeats` after 3 to warm up."""

    def several(count: int) -> None:
        for _ in range(count):
            run()

    timed(lambda: several(3), setting.device)
    return timed(lambda: several(repeats), setting.device) / repeats
