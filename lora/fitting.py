"""Whether an adapter file fits a network, before anything is loaded from it."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.errors import InputError, first_few
from lora.adapter_file import (
    class_count,
    depth_of,
    form_of,
    holds_every_weight,
    logits_of,
    rank_of,
    variant_of,
)
from segment_anything.base_weights import decoder_depth, logits_side, same_base

if TYPE_CHECKING:
    from lora.model import LoRAModel


def require_same_network(
    model: LoRAModel,
    state: dict[str, torch.Tensor],
    settings: dict[str, Any],
    filename: str | Path,
) -> None:
    """Refuse an adapter of another variant, rank, form, classes, decoder, encoder or base."""
    own = model.sam.state_dict()
    classes = len(model.sam.mask_decoder.mask_tokens.weight) - 1
    kind, alpha = form_of(state, settings)
    for label, flag, found, expected in (
        ("variant", "--module", variant_of(state, settings), model.variant),
        ("LoRA rank", "--rank", rank_of(state, settings), model.rank),
        ("updates of the form", "--lora_kind", kind, model.form.kind),
        ("LoRA alpha", "--lora_alpha", alpha or model.rank, model.form.alpha or model.rank),
        ("number of classes", "--num_classes", class_count(state, settings), classes),
        ("decoder depth", "--decoder_depth", depth_of(state, settings), decoder_depth(own)),
        ("logits", "--logits", logits_of(state, settings), logits_side(own)),
    ):
        # A decoder of a user's own module may have depth 0.
        if expected and found not in (None, expected):
            raise InputError(
                f"{filename} has {label} {found}, this network was built with {expected}; "
                f"pass {flag} {found}"
            )
    # The first update that is in the same place in the file, as far as the file tells.
    rows = settings.get("updates")
    told = isinstance(rows, list)
    here = [row for row in model.updates if not told or list(astuple(row)) in rows]
    first = here[0].down if here else None
    width, expected = (
        tensors[first].shape[-1] if first in tensors and tensors[first].ndim else None
        for tensors in (state, model.adapter_state())
    )
    if width not in (None, expected):
        raise InputError(
            f"{filename} was trained with another encoder, of width {width}; the width of this "
            f"network is {expected}; pass --vit_name "
            f"{settings.get('vit_name', 'of its training')!s:.40}"
        )
    trained_on, loaded = settings.get("base_fingerprint"), model.sam.base_fingerprint
    other = isinstance(trained_on, str) and not same_base(trained_on, loaded)
    if other and not holds_every_weight(state):
        raise InputError(
            f"{filename} was trained on base weights {trained_on!a:.40}, this network holds "
            f"{loaded or 'none'}; pass the --ckpt of its training"
        )


def require_same_tensors(
    model: LoRAModel,
    state: dict[str, torch.Tensor],
    targets: dict[str, torch.Tensor],
    filename: str | Path,
) -> None:
    """Refuse an adapter that lacks a tensor, has one too many, or one of another shape."""
    missing = sorted(targets.keys() - state.keys())
    unexpected = sorted(state.keys() - targets.keys())
    if missing or unexpected:
        raise InputError(
            f"{filename} does not fit this {model.variant} network: missing "
            f"{first_few(missing) or 'nothing'}, unexpected "
            f"{first_few(unexpected) or 'nothing'}; pass the --vit_name of its training"
        )
    wrong = [
        f"{key} {tuple(state[key].shape)} for {tuple(tensor.shape)}"
        for key, tensor in targets.items()
        if tensor.shape != state[key].shape
    ]
    if wrong:
        raise InputError(
            f"{filename} was trained with another encoder or image size than this network: "
            f"{first_few(wrong)}; pass the --vit_name and --img_size of its training"
        )


def require_same_updates(model: LoRAModel, settings: dict[str, Any], filename: str | Path) -> None:
    """Refuse an adapter whose updates belong to other layers; old files do not record them."""
    recorded = settings.get("updates")
    rows = [list(astuple(update)) for update in model.updates]
    if recorded is None or recorded == rows:
        return
    pairs = zip(recorded, rows, strict=False) if isinstance(recorded, list) else ()
    found, expected = next(((a, b) for a, b in pairs if a != b), (recorded, rows[:1]))
    flags = [
        f", --{name} {' '.join(map(str, settings[name]))}"
        for name in ("lora_targets", "lora_blocks")
        if isinstance(settings.get(name), list)
    ]
    raise InputError(
        f"{filename} has its updates in other layers than this network: {found!s:.120} for "
        f"{expected!s:.120}; build the network with the layers of its training{''.join(flags)}"
    )
