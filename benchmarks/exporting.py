"""Time the network in PyTorch against the same network in an ONNX file."""

from __future__ import annotations

import copy

import torch

from evaluation.cpu_speed import pack_encoder
from evaluation.onnx_graph import LowResLogits, to_onnx
from evaluation.onnx_network import OUTPUT, OnnxNetwork

from . import scenes
from .timing import Comparison, Row, compare, largest

# Encoder, side of the input, images at once: what predict.py takes on a CPU.
NETWORKS = (("vit_tiny", 224, 2), ("vit_b", 224, 2))


def onnx_rows(device: torch.device) -> list[Row]:
    """Time encoder and decoder from images to logits, as predict.py computes them."""
    return [onnx_row(*network, device) for network in NETWORKS]


def onnx_row(vit_name: str, side: int, count: int, device: torch.device) -> Row:
    """Time one size of the network; both have the updates merged and the same threads."""
    model = scenes.network(vit_name, side).eval().requires_grad_(False)
    model.merge()
    images = torch.rand(count, 3, side, side)
    file = scenes.scratch_folder() / "model.onnx"
    proto = to_onnx(LowResLogits(copy.deepcopy(model)), images, model.variant)
    file.write_bytes(proto.SerializeToString())
    del proto
    model, images = model.to(device), images.to(device)
    pack_encoder(model)
    exported = OnnxNetwork(file, device)

    @torch.inference_mode()
    def ours() -> torch.Tensor:
        return model(images, full_size_masks=False)[OUTPUT]

    @torch.inference_mode()
    def peer() -> torch.Tensor:
        return exported(images)[OUTPUT]

    comparison = Comparison(
        name="onnx",
        what=f"images to logits, {vit_name}, {side} px, batch {count}, float32",
        peer_name="the same network as ONNX, onnxruntime",
        ours=ours,
        peer=peer,
        difference=largest,
        tolerance=1e-4,
        target=None,
    )
    return compare(comparison, repeats=5, device=device)
