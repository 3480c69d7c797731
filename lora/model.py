"""A SAM network with low-rank updates: which tensors train, which are saved, how they are loaded.

The variants (`sam_lora_image_encoder.py`, `sam_lora_image_encoder_mask_decoder.py`, or a module of
your own beside them) say which projections get an update, as a list of `Update` rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import InputError, first_few
from common.tensors import save_tensors
from lora.adapter_file import SETTINGS_KEY, holds_every_weight, read_adapter, with_classes
from lora.fitting import require_same_network, require_same_tensors, require_same_updates
from lora.form import SliceDropout, UpdateForm
from lora.layers import LoRABranch, LoRALinear

# The letter of A in its key: `w_a_000`, `fati_qa`.
A_IN_KEY = re.compile(r"(_[qkvo]?)a(_\d+)?$")


@dataclass(frozen=True)
class Update:
    """One low-rank update: where it is added, and the names of its two matrices in the file."""

    layer: str  # path of the linear layer inside the network
    part: int  # index of the equal part of the layer's output: 0, 1, 2 for q, k, v of a fused qkv
    parts: int  # number of equal parts
    down: str  # key of A, (rank, in)
    up: str  # key of B, (out / parts, rank)

    @property
    def magnitude(self) -> str:
        """Key of DoRA's lengths (out / parts,): `w_m_000` beside `w_a_000`, `fati_qm`."""
        key, found = A_IN_KEY.subn(r"\1m\2", self.down)
        return key if found else f"{self.down}_m"


class LoRAModel(nn.Module):
    """A `Sam` with low-rank updates, and the adapter file that holds what was trained.

    Args:
        sam: the network; its updated layers are replaced in place.
        rank: rank of every update.
        updates: the rows of the variant.
        frozen: name prefixes of the parameters that do not train.
        not_saved: name prefixes of the tensors that the adapter file leaves out, because the base
            weights hold them; None: those of `frozen`. A frozen part that starts at random, as the
            mask heads do, has to be saved.
        variant: name of the module that defines the subclass, as users pass it by `--module`; None:
            the module where the subclass is defined.
    """

    is_published = True  # the updates are where a file that does not record them has them
    input_slices = 1  # that the network sees at once; `utils.build_model` sets it
    prompt_prob = 0.0  # `--prompt_prob` of its training (`lora.prompts`); set there too
    form = UpdateForm()
    dropout: SliceDropout | None = None

    def __init__(
        self,
        sam: nn.Module,
        rank: int,
        *,
        updates: Sequence[Update],
        frozen: Sequence[str],
        not_saved: Sequence[str] | None = None,
        variant: str | None = None,
    ) -> None:
        super().__init__()
        self.sam = sam
        self.rank = rank
        self.updates = tuple(updates)
        self.variant = variant or type(self).__module__
        # After loading an adapter of other classes: the names of the classes whose heads were taken
        # from it, and the names of those that start fresh.
        self.moved_heads: list[list[str]] = []
        left_out = tuple(frozen if not_saved is None else not_saved)
        # Tensors that the adapter file and a training state hold, trained or not.
        self.saved = {name for name in sam.state_dict() if not name.startswith(left_out)}
        for name, parameter in sam.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(frozen)))
        for path in dict.fromkeys(update.layer for update in updates):
            rows = [update for update in updates if update.layer == path]
            layer = LoRALinear(
                sam.get_submodule(path),
                rank,
                parts=rows[0].parts,
                updated=[row.part for row in rows],
            )
            sam.set_submodule(path, layer)
        # For scripts of the field: A and B of the encoder's updates, as linear layers in the order
        # of their names: q of the first block, v of the first block, …
        encoder = [update for update in updates if update.down.startswith("w_a_")]
        self.w_As = [self._branch(update).down for update in encoder]
        self.w_Bs = [self._branch(update).up for update in encoder]
        self.require_trained_is_saved()

    def require_trained_is_saved(self) -> None:
        """Raise an `InputError` if a parameter trains that the adapter file would not hold."""
        saved = {id(tensor) for tensor in self._adapter_tensors().values()}
        lost = [
            name.removeprefix("sam.")
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and id(parameter) not in saved
        ]
        if lost:
            raise InputError(
                f"the LoRA variant {self.variant} trains {len(lost)} parameters that its adapter "
                f"file does not hold, first {first_few(lost, 3)}; freeze them (frozen=), save them "
                "(not_saved=), or list them as an Update"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute `Sam.forward`."""
        return self.sam(*args, **kwargs)

    def reset_parameters(self) -> None:
        """Start every update at zero again."""
        for update in self.updates:
            self._branch(update).reset_parameters()
        for layer in self._lora_layers():
            layer.reset_magnitudes()

    def set_form(self, form: UpdateForm) -> None:
        """Compute the updates in this form; DoRA's lengths start as those of the weights now here.

        Raises:
            InputError: the module computes its updates by itself.
        """
        if form != UpdateForm() and not self.updates:
            raise InputError(
                f"the LoRA variant {self.variant} computes its updates by itself, so --lora_kind, "
                "--lora_alpha and --lora_dropout do nothing in it; leave them out, or derive its "
                "class from lora.LoRAModel with Update rows"
            )
        self.form = form
        self.dropout = SliceDropout(form.dropout) if form.dropout else None
        for number, layer in enumerate(self._lora_layers()):
            layer.set_form(form, self.rank, self.dropout, number)

    def seed_dropout(self, seeds: Sequence[int]) -> None:
        """Let the dropout of each slice of the next batch follow from its number.

        The numbers hold until the next call, for passes that compute the batch once more.

        Raises:
            InputError: the network was built without dropout.
        """
        if self.dropout is None:
            raise InputError(
                f"this network of {self.variant} was built without dropout; build it by "
                "utils.build_model with lora_dropout, or leave out --lora_dropout"
            )
        self.dropout.seeds = seeds

    def train_all_weights(self) -> None:
        """Train and save every weight (`--ckpt none`): a frozen random encoder would be useless.

        The adapter file then holds the encoder too and needs no base weights.
        """
        self.saved = {name for name, _ in self._plain_tensors()}
        for parameter in self.sam.parameters():
            parameter.requires_grad_(True)

    def merge(self) -> None:
        """Fold every update into its layer, for inference."""
        for layer in self._lora_layers():
            layer.merge()

    def unmerge(self) -> None:
        """Undo `merge` exactly."""
        for layer in self._lora_layers():
            layer.unmerge()

    def plain_state(self) -> dict[str, torch.Tensor]:
        """Return the network without LoRA under SAM's keys, each update folded into its weight."""
        state = {name: value.detach() for name, value in self._plain_tensors()}
        for path in dict.fromkeys(update.layer for update in self.updates):
            state[f"{path}.weight"] = self.sam.get_submodule(path).folded_weight()
        return state

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Return what the adapter file holds under its published keys; values are not copied."""
        return {key: value.detach() for key, value in self._adapter_tensors().items()}

    def save_lora_parameters(
        self, filename: str | Path, settings: dict[str, Any] | None = None
    ) -> str:
        """Write the adapter file and return its SHA-256.

        Args:
            filename: `….pth`.
            settings: plain values to record beside the tensors (classes, image size, …). None:
                the file holds nothing but the published keys, if the updates are the published.
        """
        state: dict[str, Any] = {
            key: value.cpu().clone() for key, value in self.adapter_state().items()
        }
        if settings is not None or not self.is_published or self.form != UpdateForm():
            state[SETTINGS_KEY] = (settings or {}) | {
                "rank": self.rank,
                "module": self.variant,
                "lora_kind": self.form.kind,
                # As the flags write it: so no file looks as if it had another scale than its twin.
                "lora_alpha": None if self.form.alpha == self.rank else self.form.alpha,
                **self._recorded_updates(),
                "base_fingerprint": self.sam.base_fingerprint,
            }
        return save_tensors(state, filename)[1]

    def _recorded_updates(self) -> dict[str, Any]:
        return {"updates": [list(astuple(update)) for update in self.updates]}

    def load_lora_parameters(
        self,
        filename: str | Path,
        classes: tuple[Sequence[str], Sequence[str]] | None = None,
    ) -> dict[str, Any]:
        """Fill the adapter's tensors from a file of this project or of the original.

        A file that also holds the frozen weights (`train_all_weights`) restores these too.

        Args:
            classes: class names of the file and of this network. Heads move to classes of the same
                name, and `moved_heads` says which ones. None: the classes are the same.

        Returns:
            The settings that the file records beside the tensors; {} if it has none.

        Raises:
            InputError: the variant, rank, form, number of classes, encoder, base weights or updated
                layers differ, or a tensor is missing. Nothing was changed then.
        """
        state, settings = read_adapter(filename)
        if classes is not None:
            state, *self.moved_heads = with_classes(state, *classes, self.adapter_state())
        require_same_network(self, state, settings, filename)
        targets = self._adapter_tensors()
        if holds_every_weight(state):
            targets |= dict(self._plain_tensors())
        require_same_updates(self, settings, filename)
        require_same_tensors(self, state, targets, filename)
        self.unmerge()  # The merged weights are about to become wrong.
        with torch.no_grad():
            for key, tensor in targets.items():
                tensor.copy_(state[key])
        return settings

    def _adapter_tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for update in self.updates:
            tensors[update.down] = self._branch(update).down.weight
        for update in self.updates:
            tensors[update.up] = self._branch(update).up.weight
        for update in self.updates:
            if (magnitude := self._branch(update).magnitude) is not None:
                tensors[update.magnitude] = magnitude
        tensors |= {name: value for name, value in self._plain_tensors() if name in self.saved}
        return tensors

    def _plain_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield SAM's parameters and persistent buffers under their public names."""
        state = self.sam.state_dict(keep_vars=True)
        yield from ((name, value) for name, value in state.items() if ".updates." not in name)

    def _lora_layers(self) -> list[LoRALinear]:
        return [module for module in self.modules() if isinstance(module, LoRALinear)]

    def _branch(self, update: Update) -> LoRABranch:
        return self.sam.get_submodule(update.layer).updates[str(update.part)]
