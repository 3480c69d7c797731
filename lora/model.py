"""A SAM network with low-rank updates: which tensors train, which are saved, how they are loaded.

The variants (`sam_lora_image_encoder.py`, `sam_lora_image_encoder_mask_decoder.py`, or a module of
your own beside them) say which projections get an update, as a list of `Update` rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import InputError, first_few
from common.tensors import save_tensors
from lora.adapter_file import (
    SETTINGS_KEY,
    class_count,
    holds_every_weight,
    rank_of,
    read_adapter,
    variant_of,
    with_classes,
)
from lora.layers import LoRABranch, LoRALinear
from segment_anything.base_weights import same_base


@dataclass(frozen=True)
class Update:
    """One low-rank update: where it is added, and the names of its two matrices in the file."""

    layer: str  # path of the linear layer inside the network
    part: int  # index of the equal part of the layer's output: 0, 1, 2 for q, k, v of a fused qkv
    parts: int  # number of equal parts
    down: str  # key of A, (rank, in)
    up: str  # key of B, (out / parts, rank)


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
        # SAM's tensors that the adapter file holds.
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
                the file holds nothing but the published keys.
        """
        state: dict[str, Any] = {
            key: value.cpu().clone() for key, value in self.adapter_state().items()
        }
        if settings is not None:
            state[SETTINGS_KEY] = settings | {
                "rank": self.rank,
                "module": self.variant,
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
            InputError: the variant, rank, number of classes, encoder, base weights or updated
                layers differ, or a tensor is missing. Nothing was changed then.
        """
        state, settings = read_adapter(filename)
        if classes is not None:
            state, *self.moved_heads = with_classes(state, *classes, self.adapter_state())
        self._require_same_network(state, settings, filename)
        targets = self._adapter_tensors()
        if holds_every_weight(state):
            targets |= dict(self._plain_tensors())
        self._require_same_tensors(state, targets, filename)
        self._require_same_updates(settings, filename)
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

    def _require_same_network(
        self, state: dict[str, torch.Tensor], settings: dict[str, Any], filename: str | Path
    ) -> None:
        """Refuse an adapter of another variant, rank, number of classes, encoder or base."""
        classes = len(self.sam.mask_decoder.mask_tokens.weight) - 1
        for label, flag, found, expected in (
            ("variant", "--module", variant_of(state, settings), self.variant),
            ("LoRA rank", "--rank", rank_of(state, settings), self.rank),
            ("number of classes", "--num_classes", class_count(state, settings), classes),
        ):
            if found not in (None, expected):
                raise InputError(
                    f"{filename} has {label} {found}, this network was built with {expected}; "
                    f"pass {flag} {found}"
                )
        first = self.updates[0].down if self.updates else None
        width, expected = (
            tensors[first].shape[-1] if first in tensors and tensors[first].ndim else None
            for tensors in (state, self._adapter_tensors())
        )
        if width not in (None, expected):
            raise InputError(
                f"{filename} was trained with another encoder, of width {width}; the width of this "
                f"network is {expected}; pass --vit_name "
                f"{settings.get('vit_name', 'of its training')!s:.40}"
            )
        trained_on, loaded = settings.get("base_fingerprint"), self.sam.base_fingerprint
        other = isinstance(trained_on, str) and not same_base(trained_on, loaded)
        if other and not holds_every_weight(state):
            raise InputError(
                f"{filename} was trained on base weights {trained_on!a:.40}, this network holds "
                f"{loaded or 'none'}; pass the --ckpt of its training"
            )

    def _require_same_tensors(
        self,
        state: dict[str, torch.Tensor],
        targets: dict[str, torch.Tensor],
        filename: str | Path,
    ) -> None:
        """Refuse an adapter that lacks a tensor, has one too many, or one of another shape."""
        missing = sorted(targets.keys() - state.keys())
        unexpected = sorted(state.keys() - targets.keys())
        if missing or unexpected:
            raise InputError(
                f"{filename} does not fit this {self.variant} network: missing "
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

    def _require_same_updates(self, settings: dict[str, Any], filename: str | Path) -> None:
        """Refuse an adapter whose updates belong to other layers; old files do not record them."""
        recorded = settings.get("updates")
        rows = [list(astuple(update)) for update in self.updates]
        if recorded is None or recorded == rows:
            return
        pairs = zip(recorded, rows, strict=False) if isinstance(recorded, list) else ()
        found, expected = next(((a, b) for a, b in pairs if a != b), (recorded, rows[:1]))
        raise InputError(
            f"{filename} has its updates in other layers than this network: {found!s:.120} for "
            f"{expected}; build the network with the layers of its training"
        )
