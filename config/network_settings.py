"""What the flags of the network mean together: one form of them, and what contradicts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from common.errors import InputError
from config.network_flags import INPUT_AND_DECODER, LORA
from config.parser import Parser
from config.shared_flags import SCRATCH
from lora.trainable import PUBLISHED_TRAIN
from lora.variants import SAMED, SAMED_S
from sam_lora_image_encoder import (
    ALL_BLOCKS,
    PUBLISHED_TARGETS,
    TARGETS,
    chosen_blocks,
    plainest_blocks,
)
from sam_lora_image_encoder_mask_decoder import DECODER
from segment_anything import ENCODERS


def lora_choices(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of a variant's `LoRA_Sam` for layers other than the published ones."""
    # A script written against the original does not have these flags.
    targets = tuple(getattr(args, "lora_targets", PUBLISHED_TARGETS))
    blocks = list(getattr(args, "lora_blocks", [ALL_BLOCKS]))
    choices: dict[str, Any] = {}
    if targets != PUBLISHED_TARGETS:
        choices["targets"] = targets
    if blocks != [ALL_BLOCKS]:
        choices["lora_layer"] = chosen_blocks(blocks, ENCODERS[args.vit_name].depth)
    return choices


def write_plainly(args: argparse.Namespace) -> None:
    """Bring the flags of equal networks into one form, so that all programs see them as equal.

    Raises:
        InputError: the encoder does not have these blocks, or a flag has no effect.
    """
    args.lora_blocks = plainest_blocks(args.lora_blocks, ENCODERS[args.vit_name].depth)
    args.lora_targets = [name for name in (*TARGETS, DECODER) if name in args.lora_targets]
    if not args.lora_targets:
        raise InputError("--lora_targets is an empty list; name a layer, or leave it out")
    if DECODER in args.lora_targets and args.module == SAMED:
        args.module = SAMED_S
    if args.module == SAMED_S and args.lora_targets != [DECODER]:
        args.lora_targets = [name for name in args.lora_targets if name != DECODER]
    if args.lora_targets == [DECODER] and args.lora_blocks != [ALL_BLOCKS]:
        raise InputError(
            "--lora_blocks has no effect with --lora_targets decoder, which leaves the encoder "
            "without updates; leave one of them out"
        )
    if args.lora_alpha == args.rank:
        args.lora_alpha = None  # the default
    if getattr(args, "train", None) == "all" and args.ckpt == SCRATCH:
        args.train = PUBLISHED_TRAIN  # Without base weights every weight trains anyway.


def require_recorded_flags(
    args: argparse.Namespace, settings: dict[str, Any], adapter: str, *, training: bool
) -> None:
    """Refuse flags that contradict what an adapter records, where its tensors may not show it.

    Args:
        settings: those inside the adapter file. A file without an entry has the flag's default.
        training: a run may start from an adapter with another input; `lora.fitting` compares the
            decoders.
    """
    known: tuple[str, ...] = ()
    if settings.get("updates") is not None:  # These rows tell more, and `LoRAModel` compares them.
        known = ("lora_targets", "lora_blocks")
    elif "lora_blocks" not in settings:  # Older scripts do not record their `lora_layer`.
        known = ("lora_blocks",)
    for flag in LORA if training else (*LORA, *INPUT_AND_DECODER):
        before, now = settings.get(flag.name, flag.default), getattr(args, flag.name)
        if before != now and flag.name not in known:
            raise InputError(
                f"{adapter} was trained with --{flag.name} {_words(before)}, not {_words(now)}; "
                f"leave --{flag.name} out, or pass another adapter"
            )


# Flags that mean nothing beside an ONNX file, and those that an adapter records (`in_adapter`).
BESIDE_ONNX = ("config", "ckpt", "lora_ckpt", "same_code", "use_amp")


def refuse_beside_onnx(parser: Parser, argv: Sequence[str] | None) -> None:
    """Refuse flags that choose a network or its precision beside `--onnx`, which holds both."""
    absent = object()
    names = [name for name, flag in parser.flags.items() if flag.in_adapter]
    names += BESIDE_ONNX
    given, _ = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
    if chosen := [name for name in names if getattr(given, name) is not absent]:
        raise InputError(
            f"--onnx names a complete network with its precision, so --{chosen[0]} has no effect; "
            "leave out one of them"
        )


def _words(value: Any) -> str:
    """Return the value of a flag as it stands in a command line."""
    if value is None:
        return "as by default"
    return f"{' '.join(map(str, value)) if isinstance(value, list) else value!s:.80}"


def require_train_has_effect(
    args: argparse.Namespace, settings: dict[str, Any], every_weight: bool
) -> None:
    """Refuse a `--train` that contradicts other flags.

    Args:
        settings: what the adapter to start from records; {}: there is none.
        every_weight: whether it holds the encoder too.
    """
    if args.train in ("decoder", "lora") and (every_weight or args.ckpt == SCRATCH):
        cause, instead = "--ckpt none", "pass base weights by --ckpt"
        if every_weight:
            cause, instead = f"{args.lora_ckpt}", "make base weights of it (tools.adapter merge)"
        raise InputError(
            f"--train {args.train} has no effect with {cause}, with which every weight trains; "
            f"{instead}, or leave --train out"
        )
    idle = [flag.name for flag in LORA if getattr(args, flag.name) != flag.default]
    idle += ["lora_dropout"] if args.lora_dropout else []
    if args.train == "decoder" and idle and not args.lora_ckpt:
        raise InputError(
            f"--{idle[0]} has no effect with --train decoder, whose updates stay at zero; leave it "
            "out, or start from an adapter by --lora_ckpt"
        )
    if args.train == "lora" and args.prompt_prob and not settings.get("prompt_prob"):
        raise InputError(
            f"--prompt_prob {args.prompt_prob:g} cannot teach prompts with --train lora, which "
            "trains nothing that takes them; leave one of them out, or start by --lora_ckpt from "
            "an adapter that knows prompts"
        )
