"""The encoder's blocks as compiled code: `python train.py --compile`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from common.errors import InputError
from lora import LoRAModel

# Graphs of the blocks that may exist at once. A shape has up to five: windows and the whole image,
# with and without gradient, and the first block, whose input needs none. Training has at most three
# shapes: a part, the last part of a batch, the last part of an epoch.
MOST_GRAPHS = 64


def compile_blocks(model: LoRAModel, backend: str | Callable = "inductor") -> None:
    """Compile the blocks of the image encoder one by one, in place.

    Blocks of one kind share their code, so that a network of any depth compiles in the time of a
    few blocks. Every batch size gets code of its own: the last, smaller batch of an epoch
    would otherwise turn the code for all batches into slower code for any size. The names in the
    state dict stay as they are.

    Args:
        backend: for `torch.compile`.

    Raises:
        InputError: the image encoder of a user's own module has no blocks.
    """
    blocks = getattr(model.sam.image_encoder, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise InputError(
            f"--compile compiles the list `blocks` of the image encoder, which the network of "
            f"{model.variant} does not have; leave out --compile"
        )
    # PyTorch's own limit is 8. Beyond it, blocks would silently run without being compiled.
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
