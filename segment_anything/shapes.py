"""The shapes along the network, printed by `SAMED_DEBUG=1 python train.py …`."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

import torch
from torch import nn

from common.errors import require_package

from .modeling import Sam

VARIABLE = "SAMED_DEBUG"
NETWORK = "network"


def shapes_are_wanted() -> bool:
    """Return whether the environment asks for the shapes."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def print_shapes(sam: Sam) -> None:
    """Print the input and output shapes of every part of the network, for each new input shape.

    The hooks that do it exist only after this call, so a network costs nothing without them.
    """
    require_package("icecream")
    from icecream import IceCreamDebugger

    ic = IceCreamDebugger(prefix="shapes | ", outputFunction=partial(print, file=sys.stderr))
    ic.lineWrapWidth = 1000
    printer = _Printer(ic)
    sam.register_forward_pre_hook(printer.begin, with_kwargs=True)
    for name, module in _parts(sam).items():
        module.register_forward_hook(partial(printer.show, name), with_kwargs=True)


def _parts(sam: Sam) -> dict[str, nn.Module]:
    encoder, decoder = sam.image_encoder, sam.mask_decoder
    blocks = {f"encoder block {index}": block for index, block in enumerate(encoder.blocks)}
    return {
        "patch embedding": encoder.patch_embed,
        **blocks,
        "neck": encoder.neck,
        "prompt encoder": sam.prompt_encoder,
        "decoder transformer": decoder.transformer,
        "decoder upscaling": decoder.output_upscaling,
        "mask decoder": decoder,
        NETWORK: sam,
    }


class _Printer:
    """Decides once per forward pass whether its input is new, and prints shapes if it is."""

    def __init__(self, ic: Any) -> None:
        self.ic = ic
        self.seen: set[str] = set()
        self.is_new = False

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes = str(_shapes(args))
        self.is_new = shapes not in self.seen
        self.seen.add(shapes)

    def show(
        self, part: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        if self.is_new:
            inputs, outputs = _shapes((*args, *kwargs.values())), _shapes(out)
            self.ic(part, inputs, outputs)
        if part == NETWORK:  # `--checkpoint_blocks` computes blocks a second time.
            self.is_new = False


def _shapes(value: Any) -> Any:
    """Replace every tensor in a container by its shape, and leave other values out."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: _shapes(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_shapes(item) for item in value if isinstance(item, (torch.Tensor, tuple, list))]
    return None
