"""What an adapter file holds: a flat dict of tensors by their published keys, and settings.

`w_a_000` … are the low-rank matrices, `prompt_encoder.*` and `mask_decoder.*` what trains beside
them. One entry, `samed_settings`, is no tensor: plain values that rebuild the network. A network
trained from scratch adds `image_encoder.*`, so that the file needs no base weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError, first_few
from common.files import load_safetensors, load_tensors, require_file

SETTINGS_KEY = "samed_settings"
SAFETENSORS = ".safetensors"  # the same tensors; the settings as JSON in the file's metadata
# What the mask decoder has for every class, background first: rows of these, and a network each.
HEAD_ROWS = (
    "mask_decoder.mask_tokens.weight",
    "mask_decoder.iou_prediction_head.layers.2.weight",
    "mask_decoder.iou_prediction_head.layers.2.bias",
)
HEAD_NETWORKS = "mask_decoder.output_hypernetworks_mlps."


def read_adapter(filename: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of an adapter file and the settings saved beside them ({} if none).

    Raises:
        InputError: not an adapter, or damaged.
    """
    require_file(filename, what="adapter", remedy="put one there or pass another by --lora_ckpt")
    state = _read_safetensors(filename) if is_safetensors(filename) else load_tensors(filename)
    if not isinstance(state, dict) or "w_a_000" not in state:
        is_base = isinstance(state, dict) and "image_encoder.pos_embed" in state
        raise InputError(
            f"{filename} is not a LoRA adapter (it has no w_a_000); "
            + ("it looks like base weights: pass it by --ckpt" if is_base else "pass another file")
        )
    settings = state.pop(SETTINGS_KEY, None)
    not_tensors = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if not_tensors:
        raise InputError(f"{filename} holds entries that are no tensors: {first_few(not_tensors)}")
    return state, settings if isinstance(settings, dict) else {}


def holds_every_weight(state: dict[str, torch.Tensor]) -> bool:
    """Whether an adapter file brings the encoder too, so that no base weights are needed."""
    return "image_encoder.pos_embed" in state


def variant_of(state: dict[str, torch.Tensor]) -> str:
    """The module whose `LoRA_Sam` wrote an adapter, told by its keys."""
    both = "sa_a_000" in state
    return "sam_lora_image_encoder_mask_decoder" if both else "sam_lora_image_encoder"


def is_safetensors(filename: str | Path) -> bool:
    """Whether a file is of the safetensors format, by its name."""
    return Path(filename).suffix.lower() == SAFETENSORS


def _read_safetensors(filename: str | Path) -> dict[str, Any]:
    state, metadata = load_safetensors(filename)
    try:
        settings = json.loads(metadata[SETTINGS_KEY]) if SETTINGS_KEY in metadata else None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{filename} has settings that are not JSON ({str(error)[:80]}); convert it again"
        ) from None
    return state if settings is None else {**state, SETTINGS_KEY: settings}


def trained_classes(state: dict[str, torch.Tensor], settings: dict[str, Any]) -> list[str] | None:
    """The class names of an adapter in order; None if it does not tell, as published ones."""
    names = settings.get("class_names")
    count = len(state.get("mask_decoder.mask_tokens.weight", ())) - 1
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if known and len(names) == count else None


def with_classes(
    state: dict[str, torch.Tensor],
    trained: Sequence[str],
    wanted: Sequence[str],
    fresh: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], list[str], list[str]]:
    """An adapter for other classes: heads of classes with the same name move, others start fresh.

    Names are the same without regard to case, `_` and spaces. Background always moves.

    Args:
        state: of the adapter.
        trained, wanted: class names without background, in the order of the heads.
        fresh: the state of a new network for the wanted classes.

    Returns:
        The state for the new network, the names that moved and those that start fresh.

    Raises:
        InputError: a name is there twice, or the adapter's heads are not those of its names.
    """
    plain = [["".join(name.lower().split("_")).replace(" ", "") for name in n]
             for n in (trained, wanted)]  # fmt: skip
    for names in plain:
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise InputError(f"the class names {first_few(doubled)} are there twice; rename one")
    place = {name: index for index, name in enumerate(plain[0], start=1)}
    sources = [0, *(place.get(name) for name in plain[1])]
    result = {k: v for k, v in state.items() if k not in HEAD_ROWS and HEAD_NETWORKS not in k}
    for key, own in fresh.items():
        if key in HEAD_ROWS:
            theirs = state.get(key)
            if theirs is None or theirs.shape != (len(trained) + 1, *own.shape[1:]):
                raise InputError(f"the adapter's {key} does not fit its {len(trained)} classes")
            rows = [own[i] if s is None else theirs[s] for i, s in enumerate(sources)]
            result[key] = torch.stack(rows)
        elif key.startswith(HEAD_NETWORKS):
            index, rest = key.removeprefix(HEAD_NETWORKS).split(".", 1)
            source = sources[int(index)]
            theirs = own if source is None else state.get(f"{HEAD_NETWORKS}{source}.{rest}")
            if theirs is not None:  # what is missing is named when it is loaded
                result[key] = theirs
    moved = [name for name, source in zip(wanted, sources[1:], strict=True) if source is not None]
    return result, moved, [name for name in wanted if name not in moved]
