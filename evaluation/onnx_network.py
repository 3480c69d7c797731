"""A network in an ONNX file that `python -m tools.export` wrote: what it says, and running it.

The file holds the merged image encoder and mask decoder as one graph, and in its metadata what the
adapter file records beside the tensors. Files may come from strangers: nothing in one is run before
it was looked through, and it can name neither other files nor code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import InputError, first_few, first_line, require_package
from common.files import parse_json, require_file
from common.precision import tf32_products
from lora.adapter_file import LARGEST_SETTINGS, SETTINGS_KEY
from segment_anything.modeling.common import resize_bilinear

REQUIREMENTS = "requirements-onnx.txt"
SUFFIX = ".onnx"
INPUT, OUTPUT = "images", "low_res_logits"
# Domains of operators that every runtime has; any other is a library of its own.
STANDARD_DOMAINS = ("", "ai.onnx")
# Bytes; the format of the file, protobuf, has no larger messages.
LARGEST_FILE = (2 << 30) - 1
AGAIN = "fetch it again, or write it again by python -m tools.export"


def require_onnx(*more: str) -> None:
    """Raise an `InputError` if a package that reads or runs ONNX files is not installed.

    Args:
        more: further packages that the caller needs.
    """
    for name in ("onnx", "onnxruntime", *more):
        require_package(name, REQUIREMENTS)


def read_onnx_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings inside an ONNX file, those of its adapter (`adapter_settings`).

    Raises:
        MissingFileError: there is no such file.
        InputError: a package is missing, or the file is damaged, or no network of this project, or
            needs other files or operators.
    """
    require_onnx()
    path = require_file(path, what="ONNX file", remedy="write one by python -m tools.export")
    model = _parse(path)
    settings = _settings(model, path)
    _require_self_contained(model, path)
    _require_interface(model, settings, path)
    return settings


def _parse(path: Path) -> Any:  # -> onnx.ModelProto
    """Read the file without the files that it may name."""
    import onnx

    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, more than the format allows")
        model = onnx.load(path, "protobuf", load_external_data=False)
        if not model.graph.node:
            raise ValueError("it holds no network")
        return model
    except Exception as error:  # Damaged bytes make the parser raise nearly anything.
        raise InputError(
            f"{path} is not a readable ONNX file ({first_line(error)}); {AGAIN}"
        ) from None


def _settings(model: Any, path: Path) -> dict[str, Any]:
    texts = [entry.value for entry in model.metadata_props if entry.key == SETTINGS_KEY]
    if len(texts) != 1:
        raise InputError(
            f"{path} does not say which classes and images its network is for (no {SETTINGS_KEY} "
            "in its metadata), so another program wrote it; pass a file of python -m tools.export"
        )
    try:
        if len(texts[0]) > LARGEST_SETTINGS:
            raise ValueError(f"they have {len(texts[0]):,} characters")
        settings = parse_json(texts[0])
        if not isinstance(settings, dict):
            raise ValueError(f"they are a {type(settings).__name__}")
        lacking = [name for name in ("img_size", "num_classes", "spec") if name not in settings]
        if lacking:
            raise ValueError(f"they lack {first_few(lacking)}")
    except ValueError as error:
        raise InputError(f"{path} has damaged settings ({first_line(error)}); {AGAIN}") from None
    return settings


def _require_self_contained(model: Any, path: Path) -> None:
    """Refuse operators of other libraries, and weights in other files, wherever they stand."""
    nodes = model.graph.node
    domains = {node.domain for node in nodes} | {entry.domain for entry in model.opset_import}
    foreign = sorted(domains - {*STANDARD_DOMAINS})
    if foreign or model.functions:
        what = ascii(foreign[0])[1:-1][:60] if foreign else "its own"
        raise InputError(
            f"{path} uses operators of {what}, expected those of the ONNX standard alone; {AGAIN}"
        )
    tensors = [*model.graph.initializer]
    tensors += [part for sparse in model.graph.sparse_initializer for part in _parts(sparse)]
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        tensors += [attribute.t, *attribute.tensors]
        tensors += _parts(attribute.sparse_tensor)
        tensors += [part for sparse in attribute.sparse_tensors for part in _parts(sparse)]
        if attribute.HasField("g") or attribute.graphs:
            raise InputError(f"{path} holds branches or loops, which no network here has; {AGAIN}")
    if any(tensor.external_data or tensor.data_location == tensor.EXTERNAL for tensor in tensors):
        raise InputError(
            f"{path} keeps weights in another file, which is not opened; pass a file with all "
            "weights in it, as python -m tools.export writes it"
        )


def _parts(sparse: Any) -> list[Any]:
    return [sparse.values, sparse.indices]


def _require_interface(model: Any, settings: dict[str, Any], path: Path) -> None:
    """Refuse a network whose input or output is not what its settings say."""
    side, classes = settings["img_size"], settings["num_classes"]
    if not all(type(number) is int and number > 0 for number in (side, classes)):
        raise InputError(f"{path} has damaged settings (img_size or num_classes); {AGAIN}")
    logits = side // 4 * (2 if settings.get("logits") == 2 else 1)
    for kind, values, name, shape in (
        ("input", model.graph.input, INPUT, (3, side, side)),
        ("output", model.graph.output, OUTPUT, (classes + 1, logits, logits)),
    ):
        told = [_describe(value) for value in values]
        wanted = f"{name} float32 (B, {', '.join(map(str, shape))})"
        if told != [wanted]:
            raise InputError(
                f"{path} has the {kind} {ascii(first_few(told, 3) or 'nothing')[1:-1]:.200}, "
                f"expected {wanted}; {AGAIN}"
            )


def _describe(value: Any) -> str:
    """Describe an input: `images float32 (B, 3, 512, 512)`; B is any number of images."""
    from onnx import TensorProto

    tensor = value.type.tensor_type
    axes = [axis.dim_value if axis.HasField("dim_value") else "B" for axis in tensor.shape.dim]
    is_float = tensor.elem_type == TensorProto.FLOAT
    kind = "float32" if is_float else f"of type {tensor.elem_type}"
    return f"{value.name} {kind} ({', '.join(map(str, axes))})"


class OnnxNetwork(nn.Module):
    """The network of an ONNX file, called as `Sam` is; it computes without gradients.

    onnxruntime gets the threads, TF32 and the repeatability that PyTorch is set to.

    Args:
        path: a file that `read_onnx_settings` accepted.
        device: a GPU needs onnxruntime's CUDA provider.

    Raises:
        InputError: onnxruntime cannot compute there, or does not take the file.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        super().__init__()
        self.path = Path(path)
        # Holds no number: it tells callers on which device images are expected.
        self.place = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.session = open_session(self.path, device)

    def forward(
        self, images: torch.Tensor, multimask_output: bool = True, image_size: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Segment images (B, 3, S, S) in [0, 1].

        Args:
            multimask_output: has no effect; every mask is returned.
            image_size: side of `masks`; None: S.

        Returns:
            `low_res_logits` (B, classes + 1, s, s) and `masks` (B, classes + 1, image_size,
            image_size), logits too, float32.
        """
        del multimask_output
        try:
            (logits,) = self.session.run([OUTPUT], {INPUT: images.float().cpu().numpy()})
        except Exception as error:  # onnxruntime has no common class of its errors
            raise InputError(
                f"onnxruntime cannot compute {self.path} for {len(images)} slices "
                f"({first_line(error)}); if memory is short, pass a smaller --batch_size"
            ) from None
        logits = torch.from_numpy(logits).to(images.device)
        side = image_size or images.shape[-1]
        return {"low_res_logits": logits, "masks": resize_bilinear(logits, (side, side))}


def open_session(path: Path, device: torch.device) -> Any:  # -> onnxruntime.InferenceSession
    """Load a network for computing on a device."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = torch.are_deterministic_algorithms_enabled()
    options.log_severity_level = 3  # errors
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise InputError(
                f"--device is {device} but this onnxruntime computes on a CPU alone; run: pip "
                "install onnxruntime-gpu in place of onnxruntime, or pass --device cpu"
            )
        gpu = {"device_id": device.index or 0, "use_tf32": int(tf32_products())}
        providers.insert(0, ("CUDAExecutionProvider", gpu))
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime has no common class of its errors
        raise InputError(
            f"onnxruntime does not take {path} ({first_line(error)}); {AGAIN}"
        ) from None
    if len(session.get_providers()) < len(providers):  # it only warns, and would be slow
        raise InputError(
            f"--device is {device} but onnxruntime cannot start its CUDA provider, whose versions "
            "of CUDA and cuDNN may not be those of this machine; install what it needs, or pass "
            "--device cpu"
        )
    return session
