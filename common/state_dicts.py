"""State dicts as other programs save them: inside a checkpoint, under the prefix of a wrapper."""

from __future__ import annotations

from typing import Any

import torch

# Entries of a training checkpoint that hold the weights.
CONTAINERS = ("model", "state_dict", "model_state_dict")
# Checkpoints inside a checkpoint, at most.
DEEPEST = 3
# What DataParallel, torch.compile and classes around a network put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.", "sam.")


def unwrapped(content: Any) -> Any:
    """Return the state dict inside the content of a checkpoint, under the network's own names.

    Weights under an entry of `CONTAINERS` are taken out. A prefix of `PREFIXES` is cut off where
    all tensors have it. Anything else is returned as it is, for the caller to check.
    """
    state = content
    for _ in range(DEEPEST):
        inside = (state.get(key) for key in CONTAINERS) if isinstance(state, dict) else ()
        state = next((inner for inner in inside if isinstance(inner, dict)), state)
    if not isinstance(state, dict) or not _tensor_names(state):
        return content
    for _ in PREFIXES:  # at most one wrapper of each kind
        prefix = _common_prefix(state) or ""
        state = {
            key.removeprefix(prefix) if isinstance(key, str) else key: value
            for key, value in state.items()
        }
    return state


def _tensor_names(state: dict[Any, Any]) -> list[Any]:
    return [key for key, value in state.items() if isinstance(value, torch.Tensor)]


def _common_prefix(state: dict[Any, Any]) -> str | None:
    names = _tensor_names(state)
    if not all(isinstance(name, str) for name in names):
        return None
    return next((p for p in PREFIXES if all(name.startswith(p) for name in names)), None)
