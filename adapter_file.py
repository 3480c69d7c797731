"""What an adapter file holds: a flat dict of tensors by their published keys, and settings.

`w_a_000` … are the low-rank matrices, `prompt_encoder.*` and `mask_decoder.*` what trains beside
them. One entry, `samed_settings`, is no tensor: plain values that rebuild the network. A network
trained from scratch adds `image_encoder.*`, so that the file needs no base weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from safe_io import InputError, first_few, load_tensors, require_file

SETTINGS_KEY = "samed_settings"


def read_adapter(filename: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of an adapter file and the settings saved beside them ({} if none).

    Raises:
        InputError: not an adapter, or damaged.
    """
    require_file(filename, what="adapter", remedy="put one there or pass another by --lora_ckpt")
    state = load_tensors(filename)
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
