"""Small ONNX files made operator by operator, right and wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SETTINGS = ""  # those of the network


def write_onnx(
    path: Path,
    spec: dict[str, Any],
    *,
    settings: str | None = SETTINGS,
    side: int = 64,
    domain: str = "",
    operator: str = "Conv",
    weights: str | None = None,
    cut: int | None = None,
) -> None:
    """Write a network for images of 64 pixels: one convolution of 4 × 4 pixels.

    Args:
        spec: description of the data.
        settings: text of the settings; None: there are none.
        side: of the input that the graph says it takes.
        domain, operator: of its only operator.
        weights: the file that is said to hold the weights; None: the file itself.
        cut: bytes of the file that are written; None: all.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    classes = len(spec["class_names"]) + 1
    kernel = np.random.default_rng(0).standard_normal((classes, 3, 4, 4)).astype(np.float32)
    tensor = numpy_helper.from_array(kernel, "kernel")
    if weights is not None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", weights
    node = helper.make_node(
        operator, ["images", "kernel"], ["low_res_logits"], domain=domain, strides=[4, 4]
    )
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, side, side])
    logits = helper.make_tensor_value_info(
        "low_res_logits", TensorProto.FLOAT, ["batch", classes, 16, 16]
    )
    graph = helper.make_graph([node], "network", [images], [logits], [tensor])
    opsets = [helper.make_opsetid("", 18)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if settings is not None:
        network = {"vit_name": "vit_tiny", "img_size": 64, "num_classes": classes - 1}
        text = settings or json.dumps(network | {"spec": spec})
        helper.set_model_props(model, {"samed_settings": text})
    path.write_bytes(model.SerializeToString()[:cut])
