"""Show, convert and merge adapter files: `python -m tools.adapter --help`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from common.console import printable
from common.errors import InputError, exit_on_bad_input
from common.files import sha256_of
from common.tensors import save_tensors
from common.writing import remove_partials, write_bytes
from config.inference_flags import MERGE
from config.network_flags import INPUT_AND_DECODER, LORA
from config.parser import Parser
from config.settings import parse_args
from lora.adapter_file import (
    SAFETENSORS,
    SETTINGS_KEY,
    class_count,
    holds_every_weight,
    is_safetensors,
    rank_of,
    read_adapter,
    trained_classes,
    variant_of,
)
from utils import build_model

SUFFIXES = (".pth", SAFETENSORS)
# Settings that `show` sums up instead of printing them.
LONG_SETTINGS = ("updates", "code", "trained_on")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the commands."""
    parser, merge = build_parsers()
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    with exit_on_bad_input():
        if args.command == "show":
            print(description(args.file))
            return
        converts = args.command == "convert"
        check_output(args.output, args.overwrite, SUFFIXES if converts else SUFFIXES[:1])
        if converts:
            digest = write_adapter(args.output, *read_adapter(args.file))
        else:
            digest = write_merged(parse_args(merge, words[1:]))
        print(f"written: {args.output} (SHA-256 {digest})")


def build_parsers() -> tuple[Parser, Parser]:
    """Return the parser of the program, and that of its command `merge`."""
    parser = Parser(
        prog="python -m tools.adapter",
        description="Show, convert and merge adapter files.\n\n"
        "  python -m tools.adapter show output/RUN/epoch_159.pth\n"
        "  python -m tools.adapter convert output/RUN/epoch_159.pth adapter.safetensors\n"
        "  python -m tools.adapter merge merged.pth --lora_ckpt output/RUN/epoch_159.pth",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print what a file holds")
    show.add_argument("file", type=Path)
    convert = commands.add_parser("convert", help="convert .pth to .safetensors, or back")
    convert.add_argument("file", type=Path)
    convert.add_argument("output", type=Path)
    merge = commands.add_parser(
        "merge",
        help="write a plain SAM checkpoint with the updates folded in, for use without LoRA",
    )
    merge.add_argument("output", type=Path)
    merge.add_flags(MERGE)
    for command in (convert, merge):
        command.add_argument(
            "--overwrite", action="store_true", help="replace the output if it exists"
        )
    return parser, merge


def check_output(path: Path, overwrite: bool, suffixes: Sequence[str]) -> None:
    """Refuse a name of another format, and the name of an existing file."""
    if path.suffix.lower() not in suffixes:
        raise InputError(
            f"output {path} is named {path.suffix or 'without suffix'!r}, expected "
            f"{' or '.join(suffixes)}"
        )
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise InputError(f"output {path} exists; choose another, or pass --overwrite")
    remove_partials(path.parent)


def description(file: Path) -> str:
    """Describe an adapter file, one property per line."""
    state, settings = read_adapter(file)
    classes = trained_classes(state, settings)
    shown = {name: value for name, value in settings.items() if name not in LONG_SETTINGS}
    code = settings.get("code")
    lines = {
        "variant": variant_of(state, settings),
        "rank": rank_of(state, settings),
        "classes": f"{class_count(state, settings)}: "
        f"{', '.join(classes) if classes else 'not named'}",
        "updates": describe_updates(settings.get("updates")),
        "network": describe_network(settings),
        "tensors": f"{len(state)}, {sum(t.numel() for t in state.values()):,} parameters",
        "holds": "every weight"
        if holds_every_weight(state)
        else "the updates and the parts of SAM that trained with them",
        "source code": f"fingerprints of {len(code)} files"
        if isinstance(code, dict)
        else "not recorded",
        "bytes": f"{file.stat().st_size:,}",
        "SHA-256": sha256_of(file),
        "settings": json.dumps(shown, indent=2, default=str) if shown else "none",
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items())


def describe_updates(rows: Any) -> str:
    """Describe which layers have updates: `24 in 12 layers, image_encoder.blocks.0… to …`."""
    if not isinstance(rows, list) or not rows:
        return "not recorded"
    if not all(isinstance(row, list) and row for row in rows):
        return "not readable"
    layers = list(dict.fromkeys(str(row[0]) for row in rows))
    return f"{len(rows)} in {len(layers)} layers, {layers[0]} to {layers[-1]}"


def describe_network(settings: dict[str, Any]) -> str:
    """Describe what is unlike the published network, as flags: `--lora_targets q k v`."""
    found = []
    for flag in (*LORA, *INPUT_AND_DECODER):
        value = settings.get(flag.name, flag.default)
        if value != flag.default:
            words = " ".join(map(str, value)) if isinstance(value, list) else value
            found.append(f"--{flag.name} {words}")
    return printable(" ".join(found)) or "as published"


def write_adapter(path: Path, state: dict[str, torch.Tensor], settings: dict[str, Any]) -> str:
    """Write an adapter in the format that its name says; return its SHA-256."""
    if not is_safetensors(path):
        extra = {SETTINGS_KEY: settings} if settings else {}
        return save_tensors(state | extra, path)[1]
    metadata = {SETTINGS_KEY: json.dumps(settings)} if settings else None
    # Two names may mean one tensor, which this format does not allow.
    tensors = {key: value.clone() for key, value in state.items()}
    write_bytes(path, safetensors.torch.save(tensors, metadata))
    return sha256_of(path)


def write_merged(args: argparse.Namespace) -> str:
    """Write the whole network under SAM's own keys; return the SHA-256 of the file."""
    model, _ = build_model(args, torch.device("cpu"))
    state = {key: value.clone() for key, value in model.plain_state().items()}
    return save_tensors(state, args.output)[1]


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
