"""The adapter file: a flat dict of tensors under their published keys, and settings.

`w_a_000` … are the low-rank matrices, `w_m_000` … DoRA's lengths of rows; `prompt_encoder.*` and
`mask_decoder.*` are the parts of SAM that train with them. One entry, `samed_settings`, is no
tensor: it holds plain values that rebuild the network. A network trained from scratch adds
`image_encoder.*`, so that its file needs no base weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError, first_few, first_line
from common.files import parse_json, require_file
from common.state_dicts import unwrapped
from common.tensors import load_safetensors, load_tensors, plain_tensors
from lora.form import KINDS, UpdateForm
from lora.variants import SAMED, SAMED_S
from segment_anything.base_weights import decoder_depth, logits_side

SETTINGS_KEY = "samed_settings"
# A of the first update, in every published adapter.
FIRST_KEY = "w_a_000"
# In this format the settings stand as JSON in the file's metadata.
SAFETENSORS = ".safetensors"
# Each class has a row in these tensors and a small network, background first.
HEAD_ROWS = (
    "mask_decoder.mask_tokens.weight",
    "mask_decoder.iou_prediction_head.layers.2.weight",
    "mask_decoder.iou_prediction_head.layers.2.bias",
)
HEAD_NETWORKS = "mask_decoder.output_hypernetworks_mlps."
# Characters as JSON; ten thousand training cases take less than one MiB.
LARGEST_SETTINGS = 16 << 20
DEEPEST_SETTINGS = 16  # levels of nesting


def read_adapter(filename: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the tensors of an adapter file and the settings beside them ({} if there are none).

    The tensors may lie inside a checkpoint or under a prefix (`common.state_dicts.unwrapped`).

    Raises:
        InputError: the file is no adapter, or it is damaged.
    """
    require_file(filename, what="adapter", remedy="put one there or pass another by --lora_ckpt")
    content = _read_safetensors(filename) if is_safetensors(filename) else load_tensors(filename)
    state = unwrapped(content)
    settings = state.pop(SETTINGS_KEY, None) if isinstance(state, dict) else None
    settings = _plain_settings(settings, filename) if isinstance(settings, dict) else {}
    if not isinstance(state, dict) or not (FIRST_KEY in state or settings):
        raise InputError(
            f"{filename} is not a LoRA adapter (it has no {FIRST_KEY}); {_what_instead(state)}"
        )
    state = plain_tensors(state, filename)
    for key in (FIRST_KEY, HEAD_ROWS[0]):
        if key in state and state[key].ndim != 2:
            raise InputError(
                f"{filename} has {key} of shape {tuple(state[key].shape)}, expected a matrix; "
                "fetch or save it again"
            )
    return state, settings


def _plain_settings(settings: dict[Any, Any], filename: str | Path) -> dict[str, Any]:
    """Return settings as they come back from JSON, which both formats of adapters can hold.

    A `.pth` may hold a list that contains itself, or ten that each name the next ten times.
    """
    try:
        text, size = [], 0
        for piece in json.JSONEncoder(allow_nan=False).iterencode(settings):
            text.append(piece)
            size += len(piece)
            if size > LARGEST_SETTINGS:
                raise ValueError("they are too long")
        plain = parse_json("".join(text))
        layer = [plain]
        for _ in range(DEEPEST_SETTINGS):
            layer = [inner for value in layer for inner in _inside(value)]
        if layer:
            raise ValueError("they are nested too deeply")
    except (TypeError, ValueError, RecursionError) as error:
        problem = "too deep" if isinstance(error, RecursionError) else first_line(error)
        raise InputError(
            f"{filename} has settings that are no plain values ({problem}); save or convert it "
            "again"
        ) from None
    return plain


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _what_instead(state: Any) -> str:
    """Say what a file is that is no adapter, and what to pass instead."""
    names = [key for key in state if isinstance(key, str)] if isinstance(state, dict) else []
    if any(".updates." in name or ".linear_a_" in name for name in names):
        return (
            "it holds a whole network with LoRA layers; pass the file that save_lora_parameters "
            "wrote, in a run folder best.pth or epoch_N.pth"
        )
    if "image_encoder.pos_embed" in names:
        return "it looks like base weights: pass it by --ckpt"
    return f"it holds {first_few(names, 3) or type(state).__name__}; pass another file"


def holds_every_weight(state: dict[str, torch.Tensor]) -> bool:
    """Return whether an adapter file holds the encoder too, so that it needs no base weights."""
    return {"image_encoder.pos_embed", "image_encoder.blocks.0.attn.qkv.weight"} <= state.keys()


def variant_of(state: dict[str, torch.Tensor], settings: dict[str, Any]) -> str:
    """Return the module whose `LoRA_Sam` wrote an adapter; published ones show it by their keys."""
    recorded = settings.get("module")
    if isinstance(recorded, str) and recorded.isidentifier():
        return recorded
    both = "sa_a_000" in state
    return SAMED_S if both else SAMED


def rank_of(state: dict[str, torch.Tensor], settings: dict[str, Any]) -> int | None:
    """Return the rank of an adapter; None if the file does not show it."""
    return len(state[FIRST_KEY]) if FIRST_KEY in state else _count(settings.get("rank"))


def form_of(state: dict[str, torch.Tensor], settings: dict[str, Any]) -> tuple[str, float | None]:
    """Return kind and alpha of an adapter's updates (`UpdateForm`); alpha None means the rank.

    Without a record of them, the updates have the published form.
    """
    kind, alpha = settings.get("lora_kind", UpdateForm.kind), settings.get("lora_alpha")
    known = kind if kind in KINDS else f"{kind!a:.40}"
    return known, alpha if type(alpha) in (int, float) else None


def class_count(state: dict[str, torch.Tensor], settings: dict[str, Any]) -> int | None:
    """Return the number of foreground classes of an adapter; None if the file does not show it."""
    tokens = state.get(HEAD_ROWS[0])
    return _count(settings.get("num_classes")) if tokens is None else len(tokens) - 1


def depth_of(state: dict[str, torch.Tensor], settings: dict[str, Any]) -> int | None:
    """Return the layers of an adapter's mask decoder; None if the file does not show it."""
    # SAMed_s updates q and v of the self attention of each layer, and saves no layer.
    shown = decoder_depth(state) or sum(key.startswith("sa_a_") for key in state) // 2
    return shown or _of_settings(settings, "decoder_depth", before=2)


def logits_of(state: dict[str, torch.Tensor], settings: dict[str, Any]) -> int | None:
    """Return the value of `--logits` of an adapter; None if the file does not show it."""
    if any(key.startswith("mask_decoder.output_upscaling.") for key in state):
        return logits_side(state)
    return _of_settings(settings, "logits", before=1)


def _of_settings(settings: dict[str, Any], name: str, *, before: int) -> int | None:
    """Return a recorded count; `before`: that of adapters older than the flag."""
    return _count(settings.get(name, before)) if settings else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def is_safetensors(filename: str | Path) -> bool:
    """Return whether the name of a file says that its format is safetensors."""
    return Path(filename).suffix.lower() == SAFETENSORS


def _read_safetensors(filename: str | Path) -> dict[str, Any]:
    state, metadata = load_safetensors(filename)
    try:
        settings = parse_json(metadata[SETTINGS_KEY]) if SETTINGS_KEY in metadata else None
    except ValueError as error:
        raise InputError(
            f"{filename} has settings that are not JSON ({str(error)[:80]}); convert it again"
        ) from None
    return state if settings is None else {**state, SETTINGS_KEY: settings}


def trained_classes(state: dict[str, torch.Tensor], settings: dict[str, Any]) -> list[str] | None:
    """Return the class names of an adapter in order; None for a published one, which has none."""
    names = settings.get("class_names")
    valid = isinstance(names, list) and all(
        isinstance(name, str) and name.isprintable() for name in names
    )
    return names if valid and len(names) == class_count(state, settings) else None


def with_classes(
    state: dict[str, torch.Tensor],
    trained: Sequence[str],
    wanted: Sequence[str],
    fresh: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], list[str], list[str]]:
    """Convert an adapter to other classes: heads move to classes of the same name.

    The heads of all other classes start as in a network without the adapter. Case, `_` and spaces
    do not matter in names. The background head always moves.

    Args:
        state: tensors of the adapter.
        trained, wanted: class names without background, in the order of the heads.
        fresh: the state of a new network for the wanted classes.

    Returns:
        The state for the new network, the names that moved, and the names that start fresh.

    Raises:
        InputError: a name occurs twice, or the adapter's heads do not fit its class names.
    """
    place = {name: index for index, name in enumerate(_plain_names(trained), start=1)}
    # For each head of the new network: the head of the adapter that it takes, or None.
    sources = [0, *(place.get(name) for name in _plain_names(wanted))]
    result = {
        key: value
        for key, value in state.items()
        if key not in HEAD_ROWS and HEAD_NETWORKS not in key
    }
    for key, new in fresh.items():
        if key in HEAD_ROWS:
            old = state.get(key)
            if old is None or old.shape != (len(trained) + 1, *new.shape[1:]):
                raise InputError(f"the adapter's {key} does not fit its {len(trained)} classes")
            rows = [
                new[index] if source is None else old[source]
                for index, source in enumerate(sources)
            ]
            result[key] = torch.stack(rows)
        elif key.startswith(HEAD_NETWORKS):
            index, rest = key.removeprefix(HEAD_NETWORKS).split(".", 1)
            source = sources[int(index)]
            old = new if source is None else state.get(f"{HEAD_NETWORKS}{source}.{rest}")
            if old is not None:  # Loading reports what is missing.
                result[key] = old
    moved = [name for name, source in zip(wanted, sources[1:], strict=True) if source is not None]
    return result, moved, [name for name in wanted if name not in moved]


def _plain_names(names: Sequence[str]) -> list[str]:
    """Return class names as they are compared; raise an `InputError` if two are the same."""
    plain = [name.lower().replace("_", "").replace(" ", "") for name in names]
    doubled = sorted({name for name in plain if plain.count(name) > 1})
    if doubled:
        raise InputError(f"the class names {first_few(doubled)} are there twice; rename one")
    return plain
