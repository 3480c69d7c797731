"""Low-rank updates: how one is computed and merged, and what an adapter file holds."""

from .model import LoRAModel, Update

__all__ = ["LoRAModel", "Update"]
