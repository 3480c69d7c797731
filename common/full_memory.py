"""Errors of full memory, a GPU's or the main one: recognised in all forms, told in one sentence."""

from __future__ import annotations

import contextlib
import errno
import re
import traceback
from collections.abc import Iterator

import torch

from common.errors import InputError

# Words of PyTorch, CUDA, Triton, cuBLAS, cuDNN and NCCL for memory that they did not get.
FULL = re.compile(
    r"out[ _]of[ _]memory|cudaErrorMemoryAllocation|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
    r"|DEVICE_ALLOCATION_FAILED",
    re.IGNORECASE,
)
# Words of a library that cannot start or go on. Most often it lacks memory, but a broken
# installation sounds the same.
PERHAPS_FULL = re.compile(
    r"CU(BLAS|DNN)_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR)|unable to find an engine"
    r"|No valid (engine configs|execution plans)|unhandled cuda error",
    re.IGNORECASE,
)
# Words of PyTorch, NumPy and Linux for main memory that they did not get.
MAIN_FULL = re.compile(r"DefaultCPUAllocator|MemoryError|Cannot allocate memory|bad_alloc")
# Bytes of free memory with which cuBLAS and cuDNN can surely start.
ENOUGH_TO_START = 2**28


def is_gpu_full(error: BaseException) -> bool:
    """Return whether a GPU's memory was too small, by the error that an operation raised."""
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or (isinstance(error, RuntimeError) and FULL.search(text) is not None)
        or (
            isinstance(error, RuntimeError)
            and PERHAPS_FULL.search(text) is not None
            and _memory_ran_out()
        )
    )


def _memory_ran_out() -> bool:
    """Return whether the current GPU has hardly any memory left, or PyTorch was refused some."""
    if not torch.cuda.is_available():
        return False
    try:
        free, _ = torch.cuda.mem_get_info()
    except RuntimeError:  # CUDA fails as a whole, so memory is not what is wrong.
        return False
    # cuDNN tries method after method and hides that each got no memory; PyTorch counts that.
    return free < ENOUGH_TO_START or torch.cuda.memory_stats().get("num_ooms", 0) > 0


def is_main_full(error: BaseException) -> bool:
    """Return whether the main memory was too small; the system may also kill without an error."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and MAIN_FULL.search(str(error)) is not None)
    )


def what_is_full(error: BaseException) -> str | None:
    """Return which memory was too small, with the library's words; None: it was another error."""
    if is_gpu_full(error):
        return f"the GPU's memory was too small ({_first_line(str(error))})"
    if not is_main_full(error):
        return None
    lines = str(error).splitlines()  # of a process that did a part: its traceback
    said = next((line for line in reversed(lines) if MAIN_FULL.search(line)), str(error))
    return f"the main memory was too small ({_first_line(said) or type(error).__name__})"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]


@contextlib.contextmanager
def telling_full_memory(batch_size: int = 1, *, use_amp: bool = True) -> Iterator[None]:
    """Turn the error of full memory into an `InputError` that names the flags that help.

    What the failed computation held on the GPU is released, so that the next one has room.

    Args:
        batch_size: slices computed at once; 1: fewer cannot be computed, or would not help.
        use_amp: whether --use_amp is on, or would not help.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        told = what_is_full(error)
        if told is None:
            raise
        traceback.clear_frames(error.__traceback__)  # They refer to tensors on the GPU.
        flags = [f"--batch_size {batch_size // 2}"] if batch_size > 1 else []
        if is_gpu_full(error):
            with contextlib.suppress(RuntimeError):  # CUDA itself may not have started.
                torch.cuda.empty_cache()
            flags += [] if use_amp else ["--use_amp"]
            remedies = f"pass {', or '.join([*flags, '--device cpu, which is slow'])}"
        else:
            others = "end other programs on this machine"
            remedies = f"pass {flags[0]}, or {others}" if flags else others
        raise InputError(f"{told}; {remedies}") from None
