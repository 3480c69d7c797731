"""A stage in its own process: its rows go to a file descriptor, one JSON line each."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from .rows import Row, Setting, to_json

PACKAGES = ("numpy", "scipy", "h5py", "einops", "safetensors")


def run_child(target: str, descriptor: int, device_flag: str, *, small: bool) -> None:
    """Run a stage and send what it finds.

    Args:
        target: the stage as `module:function`.
        descriptor: where the lines go. What libraries print on stdout or stderr does not mix
            with them.
    """
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the parent asks where it hangs
    os.set_inheritable(descriptor, False)  # for the processes that the stage starts

    def send(content: dict[str, Any]) -> None:
        os.write(descriptor, json.dumps(content, allow_nan=False).encode() + b"\n")

    import torch

    from benchmarks.where import where
    from utils import CUBLAS_WORKSPACE, REPEATABLE_WORKSPACES, choose_device

    # PyTorch reads this once, at the first product on the GPU. A stage whose first product need not
    # be repeatable could otherwise make none in strict mode.
    os.environ[CUBLAS_WORKSPACE] = REPEATABLE_WORKSPACES[0]
    device = choose_device(device_flag)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    send({"where": where(device, PACKAGES)})
    module, _, name = target.partition(":")
    stage: Callable[[Setting], Iterator[Row]] = getattr(import_module(module), name)
    for row in stage(Setting(device, small)):
        send({"row": to_json(row)})
    send({"finished": True})
