"""Look into adapter files, convert and merge them: `python -m tools.adapter --help`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from common.errors import InputError, exit_on_bad_input
from common.files import atomic_path, save_tensors, sha256_of
from config.flags import add_dataset_flag, add_network_flags
from config.settings import parse_args
from lora.adapter_file import (
    SAFETENSORS,
    SETTINGS_KEY,
    holds_every_weight,
    is_safetensors,
    read_adapter,
    trained_classes,
    variant_of,
)
from utils import build_model

SUFFIXES = (".pth", SAFETENSORS)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.adapter",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Look into adapter files, convert and merge them.\n\n"
        "  python -m tools.adapter show output/RUN/best.pth\n"
        "  python -m tools.adapter convert output/RUN/best.pth best.safetensors   (and back)\n"
        "  python -m tools.adapter merge merged.pth --lora_ckpt output/RUN/best.pth",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="what a file holds")
    show.add_argument("file", type=Path)
    convert = commands.add_parser("convert", help=".pth to .safetensors, or back")
    convert.add_argument("file", type=Path)
    convert.add_argument("output", type=Path)
    merge = commands.add_parser(
        "merge", help="write a plain SAM checkpoint, its updates folded in, for use without LoRA"
    )
    merge.add_argument("output", type=Path)
    merge.add_argument("--num_classes", type=int, help="foreground classes of the adapter")
    add_dataset_flag(merge)
    add_network_flags(merge)
    for command in (convert, merge):
        command.add_argument("--overwrite", action="store_true", help="replace what is there")
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


def check_output(path: Path, overwrite: bool, suffixes: Sequence[str]) -> None:
    """Refuse a name of another format, and one that is taken."""
    if path.suffix.lower() not in suffixes:
        raise InputError(
            f"output {path} is named {path.suffix or 'without suffix'!r}, expected "
            f"{' or '.join(suffixes)}"
        )
    if path.exists() and not overwrite:
        raise InputError(f"output {path} exists; choose another, or pass --overwrite")


def description(file: Path) -> str:
    """What an adapter file holds, line by line."""
    state, settings = read_adapter(file)
    classes = trained_classes(state, settings)
    count = len(state.get("mask_decoder.mask_tokens.weight", ())) - 1
    lines = {
        "variant": variant_of(state),
        "rank": len(state["w_a_000"]),
        "classes": f"{count}: {', '.join(classes) if classes else 'not named'}",
        "tensors": f"{len(state)}, {sum(t.numel() for t in state.values()):,} parameters",
        "holds": "every weight" if holds_every_weight(state) else "what was trained beside SAM",
        "bytes": f"{file.stat().st_size:,}",
        "SHA-256": sha256_of(file),
        "settings": json.dumps(settings, indent=2, default=str) if settings else "none",
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items())


def write_adapter(path: Path, state: dict[str, torch.Tensor], settings: dict[str, Any]) -> str:
    """Write an adapter in the format of its name; returns its SHA-256."""
    if not is_safetensors(path):
        extra = {SETTINGS_KEY: settings} if settings else {}
        return save_tensors(state | extra, path)[1]
    metadata = {SETTINGS_KEY: json.dumps(settings)} if settings else None
    with atomic_path(path) as temporary:
        tensors = {key: value.contiguous() for key, value in state.items()}
        temporary.write_bytes(safetensors.torch.save(tensors, metadata))
    return sha256_of(path)


def write_merged(args: argparse.Namespace) -> str:
    """Write the whole network with SAM's own keys; returns the file's SHA-256."""
    model, _ = build_model(args, torch.device("cpu"))
    state = {key: value.clone() for key, value in model.plain_state().items()}
    return save_tensors(state, args.output)[1]


if __name__ == "__main__":
    main()
