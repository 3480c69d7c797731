"""How a low-rank update is computed, merged, saved and restored (SAMed, section 3.2).

Which projections get one is the business of `sam_lora_image_encoder.py` and
`sam_lora_image_encoder_mask_decoder.py`: each is a list of `Update` rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import InputError, first_few
from common.files import save_tensors
from lora.adapter_file import (
    SETTINGS_KEY,
    holds_every_weight,
    read_adapter,
    variant_of,
    with_classes,
)
from lora.layers import LoRABranch, LoRALinear

TRAINED_WITH_THE_ADAPTER = ("prompt_encoder.", "mask_decoder.")


@dataclass(frozen=True)
class Update:
    """One low-rank update: where it is added and what its two matrices are called on disk."""

    layer: str  # path of the linear layer inside the network
    part: int  # which of the equal parts of its output: q, k, v of a fused projection
    parts: int  # how many parts the layer's output has
    down: str  # key of A, (rank, in)
    up: str  # key of B, (out / parts, rank)


class LoRAModel(nn.Module):
    """A `Sam` with low-rank updates, and the adapter file that holds what was trained.

    Args:
        sam: the network; its updated layers are replaced in place.
        rank: of every update.
        updates: the rows of the variant.
        frozen: name prefixes of the parameters that do not train.
        variant: module name that users pass by `--module`.
    """

    def __init__(
        self,
        sam: nn.Module,
        rank: int,
        *,
        updates: Sequence[Update],
        frozen: Sequence[str],
        variant: str,
    ) -> None:
        super().__init__()
        self.sam = sam
        self.rank = rank
        self.updates = tuple(updates)
        self.variant = variant
        # Of an adapter for other classes: the names whose heads were taken over, and the others.
        self.moved_heads: list[list[str]] = []
        # SAM's own tensors that the adapter file holds; parameters outside it do not train.
        self.saved = {
            name
            for name in sam.state_dict()
            if name.startswith(TRAINED_WITH_THE_ADAPTER) and not name.startswith(tuple(frozen))
        }
        for name, parameter in sam.named_parameters():
            parameter.requires_grad_(name in self.saved)
        for path in dict.fromkeys(update.layer for update in updates):
            rows = [update for update in updates if update.layer == path]
            layer = LoRALinear(
                sam.get_submodule(path),
                rank,
                parts=rows[0].parts,
                updated=[row.part for row in rows],
            )
            sam.set_submodule(path, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `Sam.forward`."""
        return self.sam(*args, **kwargs)

    def reset_parameters(self) -> None:
        """Start every update anew at zero."""
        for update in self.updates:
            self._branch(update).reset_parameters()

    def train_all_weights(self) -> None:
        """Unfreeze the network: a random encoder is of no use frozen (`--ckpt none`).

        What is saved from then on holds the encoder too, so it needs no base weights.
        """
        self.saved = {name for name, _ in self._plain_tensors()}
        for parameter in self.sam.parameters():
            parameter.requires_grad_(True)

    def merge(self) -> None:
        """Fold every update into its layer, for inference."""
        for layer in self._lora_layers():
            layer.merge()

    def unmerge(self) -> None:
        """Undo `merge`, exactly."""
        for layer in self._lora_layers():
            layer.unmerge()

    def plain_state(self) -> dict[str, torch.Tensor]:
        """The network without LoRA, by SAM's own keys: every update folded into its weight."""
        state = {name: value.detach() for name, value in self._plain_tensors()}
        for path in dict.fromkeys(update.layer for update in self.updates):
            layer = self.sam.get_submodule(path)
            state[f"{path}.weight"] = layer.folded_weight()
        return state

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """What the adapter file holds, by its published keys; the tensors are the live ones."""
        return {key: value.detach() for key, value in self._adapter_tensors().items()}

    def save_lora_parameters(
        self, filename: str | Path, settings: dict[str, Any] | None = None
    ) -> str:
        """Write the adapter file; returns its SHA-256.

        Args:
            filename: `….pth`.
            settings: plain values to keep beside the tensors (classes, image size, …); with
                None the file holds the published keys alone.
        """
        state: dict[str, Any] = {
            key: value.cpu().clone() for key, value in self.adapter_state().items()
        }
        if settings is not None:
            own = {"rank": self.rank, "module": self.variant}
            base = {"base_fingerprint": getattr(self.sam, "base_fingerprint", None)}
            state[SETTINGS_KEY] = settings | own | base
        return save_tensors(state, filename)[1]

    def load_lora_parameters(
        self,
        filename: str | Path,
        classes: tuple[Sequence[str], Sequence[str]] | None = None,
    ) -> dict[str, Any]:
        """Fill the adapter's tensors from a file, this project's or the original's.

        A file that also holds the frozen weights (`train_all_weights`) restores them too.

        Args:
            classes: names of the file's classes and of this network's, to move the heads of those
                with the same name; `moved_heads` then says which. None: the classes are the same.

        Returns:
            The settings saved beside the tensors, {} where there are none.

        Raises:
            InputError: another variant, rank, number of classes or encoder, or anything missing.
        """
        state, settings = read_adapter(filename)
        own = self._adapter_tensors()
        if classes is not None:
            state, *self.moved_heads = with_classes(state, *classes, self.adapter_state())
        self._require_fit(state, settings, filename)
        if holds_every_weight(state):
            own |= dict(self._plain_tensors())
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected:
            raise InputError(
                f"{filename} does not fit this {self.variant} network: missing "
                f"{first_few(missing) or 'nothing'}, unexpected "
                f"{first_few(unexpected) or 'nothing'}; pass the --vit_name of its training"
            )
        wrong = [key for key in own if own[key].shape != state[key].shape]
        if wrong:
            found = [
                f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in wrong
            ]
            raise InputError(
                f"{filename} was trained with another encoder or image size than this network: "
                f"{first_few(found)}; pass the --vit_name and --img_size of its training"
            )
        self.unmerge()  # what was merged is about to change
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(state[key])
        return settings

    def _adapter_tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for update in self.updates:
            tensors[update.down] = self._branch(update).down.weight
        for update in self.updates:
            tensors[update.up] = self._branch(update).up.weight
        tensors |= {name: value for name, value in self._plain_tensors() if name in self.saved}
        return tensors

    def _plain_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """SAM's own parameters and persistent buffers by their public names."""
        state = self.sam.state_dict(keep_vars=True)
        yield from ((name, value) for name, value in state.items() if ".updates." not in name)

    def _lora_layers(self) -> list[LoRALinear]:
        return [module for module in self.modules() if isinstance(module, LoRALinear)]

    def _branch(self, update: Update) -> LoRABranch:
        return self.sam.get_submodule(update.layer).updates[str(update.part)]

    def _require_fit(
        self, state: dict[str, torch.Tensor], settings: dict[str, Any], filename: str | Path
    ) -> None:
        """Name the cause where an adapter is of another variant, rank, class count or base."""
        for label, flag, found, own in (
            ("variant", "--module", variant_of(state), self.variant),
            ("LoRA rank", "--rank", len(state["w_a_000"]), self.rank),
            (
                "number of classes",
                "--num_classes",
                len(state.get("mask_decoder.mask_tokens.weight", [])) - 1,
                len(self.sam.mask_decoder.mask_tokens.weight) - 1,
            ),
        ):
            if found != own:
                raise InputError(
                    f"{filename} has {label} {found}, this network was built with {own}; "
                    f"pass {flag} {found}"
                )
        width = self.adapter_state()["w_a_000"].shape[1]
        if state["w_a_000"].shape[1] != width:
            raise InputError(
                f"{filename} was trained with another encoder, of width "
                f"{state['w_a_000'].shape[1]}, this network's is {width}; pass --vit_name "
                f"{settings.get('vit_name', 'of its training')}"
            )
        trained_on = settings.get("base_fingerprint")
        loaded = getattr(self.sam, "base_fingerprint", None)
        if not holds_every_weight(state) and trained_on != loaded and trained_on is not None:
            raise InputError(
                f"{filename} was trained on base weights {trained_on}, this network holds "
                f"{loaded or 'none'}; pass the --ckpt of its training"
            )
