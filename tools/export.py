"""Write a network as one ONNX file, for programs without PyTorch: `python -m tools.export --help`.

The file is checked before it gets its name: `tools/onnx_check.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError, exit_on_bad_input
from common.files import sha256_of
from common.writing import atomic_path, require_same
from config.inference_flags import MERGE
from config.parser import Parser
from config.run_folder import newest_adapter
from config.settings import adapter_settings, config_path, dataset_spec, parse_args
from config.shared_flags import CONFIG
from evaluation.onnx_graph import OPSET, LowResLogits, in_half, to_onnx
from evaluation.onnx_network import (
    INPUT,
    LARGEST_FILE,
    SUFFIX,
    OnnxNetwork,
    read_onnx_settings,
    require_onnx,
)
from lora.adapter_file import SETTINGS_KEY, read_adapter
from tools.adapter import check_output
from tools.onnx_check import (
    BATCHES,
    FULL,
    HALF,
    Bounds,
    Difference,
    difference,
    phantom_images,
    require_within,
)
from utils import build_model, environment

# Bytes of a file that are not weights, at most.
GRAPH = 64 << 20


def main(argv: Sequence[str] | None = None) -> None:
    """Export the network of an adapter."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    given = parser.parse_args(words)
    require_onnx("onnxscript")
    check_output(given.output, given.overwrite, (SUFFIX,))
    if Path(given.lora_ckpt).is_dir():
        words = of_newest_adapter(words, given)
    args = parse_args(parser, words)
    found, digest = export(args, Path(args.output), HALF if args.fp16 else FULL)
    print(
        f"written: {args.output} ({'float16' if args.fp16 else 'float32'}, opset {OPSET}, "
        f"SHA-256 {digest})\n"
        f"against PyTorch, {max(BATCHES)} phantom slices: logits within {found.logits:.1e} "
        f"(allowed: {found.allowed:.1e}), probabilities within {found.probabilities:.1e}, another "
        f"label at {found.other_labels} of {found.pixels} pixels, all of them ties"
    )


def of_newest_adapter(words: Sequence[str], given: argparse.Namespace) -> list[str]:
    """Return the words of a command with a run folder's newest adapter in the place of the folder.

    Args:
        given: what the words mean; --config may name the same folder.
    """
    run = config_path(given.lora_ckpt).parent
    places = [place for place, word in enumerate(words) if word == given.lora_ckpt]
    place = next(place for place in places if words[place - 1] != "--config")
    rest = [] if given.config else ["--config", str(run)]
    return [*words[:place], str(newest_adapter(run)), *words[place + 1 :], *rest]


def build_parser() -> Parser:
    """Return the parser of the program."""
    parser = Parser(
        prog="python -m tools.export",
        description="Write the network of an adapter as one ONNX file, updates merged.\n\n"
        "  python -m tools.export output/RUN/epoch_159.pth model.onnx\n"
        "  python -m tools.export output/RUN model.onnx --fp16\n"
        "  python predict.py --onnx model.onnx --input scans/ --output out\n"
        "Input `images` (B, 3, S, S) float32 in [0, 1], output `low_res_logits` (B, classes + 1,\n"
        "s, s) float32, any B. The metadata hold classes, intensities, sizes and orientation.",
    )
    parser.add_argument(
        "lora_ckpt", metavar="ADAPTER", help="adapter file, or a run folder for its newest"
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help=f"the file to write, …{SUFFIX}")
    parser.add_argument(
        "--fp16",
        action="store_true",
        help="weights and products in float16: half the size, for GPUs; input and output stay "
        "float32",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    network = [flag for flag in MERGE["network"] if flag.name not in ("lora_ckpt", "device")]
    parser.add_flags({"data": (CONFIG, *MERGE["data"]), "network": network})
    return parser


def export(args: argparse.Namespace, output: Path, bounds: Bounds) -> tuple[Difference, str]:
    """Write the network that the flags describe.

    Returns:
        How it differs from PyTorch, and the SHA-256 of the file.

    Raises:
        InputError: the network is too large for one file, or cannot be exported, or the file does
            not give what PyTorch gives; nothing was written then.
    """
    model, _ = build_model(args, torch.device("cpu"))
    model.eval().requires_grad_(False)
    model.merge()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.sam.parameters())
    if size + GRAPH > LARGEST_FILE:
        raise InputError(
            f"the weights of --vit_name {args.vit_name} take {size:,} bytes, but one ONNX file "
            f"holds {LARGEST_FILE - GRAPH:,} at most; use the adapter itself, or a smaller encoder"
        )
    network, images = LowResLogits(model), phantom_images(args.img_size)
    with torch.no_grad():
        logits = network(images)
    proto = to_onnx(network, images[:2], args.module)
    if args.fp16:
        proto = in_half(proto)
    describe(proto, args)
    content = proto.SerializeToString()
    digest = hashlib.sha256(content).hexdigest()
    with atomic_path(output) as temporary:
        temporary.write_bytes(content)
        require_same(output, sha256_of(temporary) == digest)
        read_onnx_settings(temporary)  # as predict.py will
        found = difference(OnnxNetwork(temporary, torch.device("cpu")), images, logits, bounds)
        require_within(found, bounds, output)
    return found, digest


def describe(proto: Any, args: argparse.Namespace) -> None:
    """Write into the metadata what the adapter records, and the same in readable entries."""
    _, recorded = read_adapter(args.lora_ckpt)
    spec, made_by = dataset_spec(args), environment(torch.device("cpu"))
    # The code that it was trained with, as far as it is known.
    settings = recorded | adapter_settings(args) | {"code": recorded.get("code")}
    texts = {
        SETTINGS_KEY: json.dumps(settings),
        "samed_adapter_sha256": sha256_of(Path(args.lora_ckpt)),
        "samed_commit": made_by["commit"],
        "samed_torch": made_by["torch"],
        "samed_precision": "float16" if args.fp16 else "float32",
        "samed_opset": OPSET,
        "classes": json.dumps(["background", *spec.class_names]),
        "input": f"{INPUT}: (B, 3, {args.img_size}, {args.img_size}) float32 in [0, 1]"
        + (", the slice before, the slice, the slice after" if args.input_slices == 3 else ""),
        "intensity": spec.intensity,
        "training_slices": f"{spec.size or args.img_size} pixels, then resized to {args.img_size}",
        "orientation": spec.orientation or "not recorded",
    }
    proto.producer_name = "SAMed"
    del proto.metadata_props[:]
    for key, value in texts.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, str(value)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
