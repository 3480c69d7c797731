"""SAMed: low-rank updates on q and v of every block of the image encoder (section 3.2).

The encoder is frozen; the prompt encoder and the mask decoder train in full. `--lora_targets` and
`--lora_blocks` choose other layers and blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from common.errors import InputError, first_few
from lora import LoRAModel, Update
from segment_anything.modeling import Sam

# What may get an update in a block, in the order of the names on disk: linear layer, part of its
# output, number of its equal parts (q, k and v are one fused projection).
TARGETS = {
    "q": ("attn.qkv", 0, 3),
    "k": ("attn.qkv", 1, 3),
    "v": ("attn.qkv", 2, 3),
    "proj": ("attn.proj", 0, 1),
    "lin1": ("mlp.lin1", 0, 1),
    "lin2": ("mlp.lin2", 0, 1),
}
PUBLISHED_TARGETS = ("q", "v")
ALL_BLOCKS = "all"


def encoder_updates(
    blocks: Sequence[int], targets: Iterable[str] = PUBLISHED_TARGETS
) -> list[Update]:
    """Rows `w_*_000` (first target of the first block), `w_*_001` (its second target), …

    The targets of a block stand in the order of `TARGETS`, whatever the order they are given in: as
    published, `w_*_000` is q of the first block and `w_*_001` its v.

    Raises:
        InputError: a target is no row of `TARGETS`.
    """
    targets = list(targets)
    wrong = [target for target in targets if target not in TARGETS]
    if wrong:
        raise InputError(f"the targets are {first_few(wrong)}, expected {' '.join(TARGETS)}")
    chosen = [place for target, place in TARGETS.items() if target in targets]
    places = [(block, *place) for block in blocks for place in chosen]
    return [
        Update(
            layer=f"image_encoder.blocks.{block}.{layer}",
            part=part,
            parts=parts,
            down=f"w_a_{index:03d}",
            up=f"w_b_{index:03d}",
        )
        for index, (block, layer, part, parts) in enumerate(places)
    ]


def blocks_with_updates(sam: Sam, lora_layer: Sequence[int] | None) -> list[int]:
    """Return the encoder blocks that get updates, in the order of the network.

    The order of `lora_layer` means nothing: as in the original, `w_a_000` belongs to the first of
    these blocks in the network. None and an empty sequence mean all blocks.

    Raises:
        InputError: the encoder has no block of such a number.
    """
    blocks = range(len(sam.image_encoder.blocks))
    wrong = sorted(set(lora_layer or ()) - set(blocks))
    if wrong:
        raise InputError(
            f"lora_layer names the blocks {first_few(wrong)}, expected 0…{blocks[-1]} of this "
            "encoder"
        )
    return [block for block in blocks if not lora_layer or block in lora_layer]


def chosen_blocks(words: Sequence[str], depth: int) -> list[int]:
    """Return the blocks that `--lora_blocks` names, in the order of the network.

    Args:
        words: `all`, `first_half`, `last_half`, `every_N` (from block 0) or numbers from 0.
        depth: number of blocks of the encoder.

    Raises:
        InputError: another word, several words, or a block that the encoder does not have.
    """
    named = _named_blocks(depth)
    if len(words) == 1 and words[0] in named:
        return named[words[0]]
    shown = first_few([ascii(word)[1:-1] for word in words]) or "nothing"
    if not words or not all(re.fullmatch(r"\d{1,6}", word, re.ASCII) for word in words):
        raise InputError(
            f"--lora_blocks is {shown:.80}, expected all, first_half, last_half, one of "
            f"every_2…every_{max(depth - 1, 2)}, or numbers of blocks alone"
        )
    wrong = sorted({int(word) for word in words} - {*range(depth)})
    if wrong:
        raise InputError(
            f"--lora_blocks names the blocks {first_few(wrong)}, expected 0…{depth - 1} of this "
            "encoder"
        )
    return sorted({int(word) for word in words})


def plainest_blocks(words: Sequence[str], depth: int) -> list[str]:
    """Return `--lora_blocks` in the one form that all ways to name the same blocks share.

    That is a word if there is one for these blocks, else their numbers in order. So `last_half` and
    `6 7 8 9 10 11` of vit_b are the same settings.
    """
    blocks = chosen_blocks(words, depth)
    word = next((word for word, found in _named_blocks(depth).items() if found == blocks), None)
    return [word] if word else [str(block) for block in blocks]


def _named_blocks(depth: int) -> dict[str, list[int]]:
    """Return the blocks of every word; a word that would name no block is left out."""
    blocks = list(range(depth))
    halves = {"first_half": blocks[: depth // 2], "last_half": blocks[depth // 2 :]}
    every = {f"every_{step}": blocks[::step] for step in range(1, depth)}
    named = {ALL_BLOCKS: blocks, **halves, **every}
    return {word: found for word, found in named.items() if found}


def places_are_published(sam: Sam, blocks: Sequence[int], targets: Iterable[str]) -> bool:
    """Return whether q and v of every block get updates, and nothing else in the encoder."""
    return len(blocks) == len(sam.image_encoder.blocks) and {*targets} == {*PUBLISHED_TARGETS}


class LoRA_Sam(LoRAModel):
    """SAMed.

    Args:
        sam_model: the network to adapt, changed in place.
        r: rank of every update.
        lora_layer: encoder blocks that get updates; all by default (`blocks_with_updates`).
        targets: rows of `TARGETS` that get an update in each of these blocks.
    """

    def __init__(
        self,
        sam_model: Sam,
        r: int,
        lora_layer: Sequence[int] | None = None,
        *,
        targets: Sequence[str] = PUBLISHED_TARGETS,
    ) -> None:
        blocks = blocks_with_updates(sam_model, lora_layer)
        super().__init__(
            sam_model,
            r,
            updates=encoder_updates(blocks, targets),
            frozen=("image_encoder.",),
        )
        self.is_published = places_are_published(sam_model, blocks, targets)
