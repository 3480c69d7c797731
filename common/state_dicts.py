"""State dicts as other programs save them: inside a checkpoint, under the prefix of a wrapper."""

from __future__ import annotations

from typing import Any

import torch

# Entries of a training checkpoint that hold the weights.
CONTAINERS = ("model", "state_dict", "model_state_dict")
# What DataParallel, torch.compile and classes around a network put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.", "sam.")


def unwrapped(content: Any) -> Any:
    """Return the state dict inside the content of a checkpoint, under the network's own names.

    Weights under an entry of `CONTAINERS` are taken out. A prefix of `PREFIXES` is cut off where
    all tensors have it. Anything else is returned as it is, for the caller to check.
    """
    while isinstance(content, dict):
        inner = next((content[key] for key in CONTAINERS if _is_state(content.get(key))), None)
        if inner is None:
            break
        content = inner
    if not _is_state(content):
        return content
    while prefix := _common_prefix(content):
        content = {
            key.removeprefix(prefix) if isinstance(key, str) else key: value
            for key, value in content.items()
        }
    return content


def _is_state(content: Any) -> bool:
    return isinstance(content, dict) and (
        any(isinstance(value, torch.Tensor) for value in content.values())
        or any(_is_state(content.get(key)) for key in CONTAINERS)
    )


def _common_prefix(state: dict[Any, Any]) -> str | None:
    names = [key for key, value in state.items() if isinstance(value, torch.Tensor)]
    if not names or not all(isinstance(name, str) for name in names):
        return None
    return next((p for p in PREFIXES if all(name.startswith(p) for name in names)), None)
