"""What `--train` trains of a network with low-rank updates."""

from __future__ import annotations

from common.errors import InputError
from lora.layers import LoRALinear
from lora.model import LoRAModel
from lora.older_module import OlderModule
from lora.variants import SAMED

PUBLISHED_TRAIN = "adapter+decoder"
# For each value of `--train`: whether the updates train, and whether those weights of SAM do which
# the variant does not freeze.
TRAINABLE = {
    PUBLISHED_TRAIN: (True, True),
    "decoder": (False, True),
    "lora": (True, False),
    "all": (True, True),  # The frozen weights of SAM train too.
}


def train_only(model: LoRAModel, what: str) -> None:
    """Freeze what `--train` leaves out, or train every weight.

    What the adapter file holds does not depend on it, except that it holds every weight with `all`.

    Args:
        model: a network that holds all weights it starts from: the base and an adapter.
        what: a row of `TRAINABLE`.

    Raises:
        InputError: the variant cannot be trained so.
    """
    if what == PUBLISHED_TRAIN:
        return
    if isinstance(model, OlderModule):
        raise InputError(
            f"--train {what} has no effect on the LoRA variant {model.variant}, which decides by "
            "itself what trains; derive its class from lora.LoRAModel, or leave --train out"
        )
    if what == "all":
        model.train_all_weights()
    if what == "decoder" and any("mask_decoder." in update.layer for update in model.updates):
        raise InputError(
            f"--train decoder would leave the mask decoder of {model.variant} half trained, since "
            f"its updates there stay as they start; pass --module {SAMED}, or leave --train out"
        )
    updates_train, sam_trains = TRAINABLE[what]
    updates = {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, LoRALinear)
        for name, parameter in layer.named_parameters()
        if name not in ("weight", "bias")
    }
    for name, parameter in model.named_parameters():
        trains = updates_train if id(parameter) in updates else sam_trains
        if parameter.requires_grad and not trains:
            parameter.requires_grad_(False)
            # The adapter file holds it, so a training state has to hold it too.
            model.saved.add(name.removeprefix("sam."))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            f"--train {what} leaves nothing of the LoRA variant {model.variant} that trains; pass "
            "another --train"
        )
