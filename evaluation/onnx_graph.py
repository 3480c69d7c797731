"""Converting a network of PyTorch into an ONNX graph, in float32 or float16."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from common.errors import InputError, first_line
from evaluation.onnx_network import INPUT, OUTPUT
from segment_anything.modeling.relative_attention import Attention

# Of the operators, from 2022; LayerNormalization is an operator since 17.
OPSET = 18


class LowResLogits(nn.Module):
    """The network without full-size masks, which predict.py makes of the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # (B, 3, S, S) -> (B, C, s, s)
        return self.model(images, full_size_masks=False)[OUTPUT]


def to_onnx(network: nn.Module, images: torch.Tensor, module: str) -> Any:  # -> onnx.ModelProto
    """Convert a network for any number of images.

    Args:
        images: two or more; PyTorch takes a batch of one for a constant.
        module: the LoRA variant, for messages.
    """
    for layer in network.modules():
        if isinstance(layer, Attention):
            # A CPU's form loops over parts of a batch, whose number would become a constant.
            layer.device_type = "cuda"
    batch = {0: torch.export.Dim("batch")}
    try:
        with quiet(), torch.no_grad():
            # By itself first: torch.onnx would silently fix a batch size that it cannot vary.
            program = torch.export.export(network, (images,), dynamic_shapes=(batch,))
            proto = torch.onnx.export(
                program,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=(batch,),
                verbose=False,
            ).model_proto
    except Exception as error:  # PyTorch raises nearly anything for code that it cannot follow
        raise InputError(
            f"PyTorch cannot write the network of --module {module} as ONNX ({first_line(error)}); "
            "its code may depend on values or on the number of images: change that, or use the "
            "adapter itself"
        ) from None
    forget_sources(proto)
    return proto


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what the exporter prints of its progress and of packages that nothing here needs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def forget_sources(proto: Any) -> None:
    """Remove the exporter's notes, which hold the paths of this machine's source files."""
    graph = proto.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("metadata_props")
    graph.ClearField("doc_string")


def in_half(proto: Any) -> Any:  # onnx.ModelProto -> onnx.ModelProto
    """Convert weights and products to float16 by onnxruntime's own converter.

    Input and output stay float32. Layer norms add up in float32 by their definition (stash_type).
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with quiet():
        return convert_float_to_float16(proto, keep_io_types=True)
