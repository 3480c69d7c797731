"""Whether a network knows prompts: clicks and boxes that each speak of one organ.

A network learns them by `--prompt_prob`, which its adapter file records. One that was trained
without them answers them by chance, so everything that would ask it with prompts looks here first.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from common.errors import InputError
from lora.model import LoRAModel


def recorded_prompt_prob(settings: dict[str, Any], source: object) -> float:
    """Return the `--prompt_prob` that an adapter file records; 0: it records none.

    Args:
        settings: those inside the file (`read_adapter`).
        source: the file, for the message.

    Raises:
        InputError: the entry is no probability.
    """
    found = settings.get("prompt_prob", 0.0)
    if type(found) not in (int, float) or not 0 <= found <= 1:
        raise InputError(
            f"{source} has prompt_prob = {found!a:.60}, expected 0…1; it is damaged, or was not "
            "written by this project"
        )
    return float(found)


def knows_prompts(model: nn.Module) -> bool:
    """Return whether the network of `utils.build_model` was trained with prompts.

    A network in an ONNX file takes none.
    """
    return getattr(model, "prompt_prob", 0.0) > 0


def require_knows_prompts(model: nn.Module, source: object = "this network") -> None:
    """Raise an `InputError` if the network was not trained with prompts.

    Args:
        source: how the message names the network, for example by its adapter file.
    """
    if not knows_prompts(model):
        raise InputError(
            f"{source} knows no prompts, since it was trained without --prompt_prob; correct its "
            "results by its logits (the default, `reach`), or train it further by train.py "
            "--lora_ckpt ADAPTER --prompt_prob 0.5"
        )


def require_takes_prompts(model: nn.Module, advice: str) -> None:
    """Raise an `InputError` if the decoder of a network cannot be asked apart from its encoder.

    Args:
        advice: how the message ends, for those who cannot change the module.
    """
    if not isinstance(model, LoRAModel):
        raise InputError(f"a network in an ONNX file takes no prompts; {advice}")
    is_plain = type(model).forward is LoRAModel.forward
    if not is_plain or not callable(getattr(model.sam, "decode", None)):
        raise InputError(
            f"the LoRA variant {model.variant} computes its forward pass by itself, so it takes no "
            f"prompts; {advice}, or derive its class from lora.LoRAModel without a forward of its "
            "own"
        )
