"""SAMed: low-rank updates on q and v of every block of the image encoder (section 3.2).

The encoder is frozen; the prompt encoder and the mask decoder train in full.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import InputError, first_few
from lora import LoRAModel, Update
from segment_anything.modeling import Sam

Q, V = 0, 2  # parts of the fused qkv projection


def encoder_updates(blocks: Sequence[int]) -> list[Update]:
    """Rows `w_*_000` (q of the first block), `w_*_001` (v of the first block), …"""
    places = [(block, part) for block in blocks for part in (Q, V)]
    return [
        Update(
            layer=f"image_encoder.blocks.{block}.attn.qkv",
            part=part,
            parts=3,
            down=f"w_a_{index:03d}",
            up=f"w_b_{index:03d}",
        )
        for index, (block, part) in enumerate(places)
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


class LoRA_Sam(LoRAModel):
    """SAMed.

    Args:
        sam_model: the network to adapt, changed in place.
        r: rank of every update.
        lora_layer: encoder blocks that get updates; all by default (`blocks_with_updates`).
    """

    def __init__(self, sam_model: Sam, r: int, lora_layer: Sequence[int] | None = None) -> None:
        super().__init__(
            sam_model,
            r,
            updates=encoder_updates(blocks_with_updates(sam_model, lora_layer)),
            frozen=("image_encoder.",),
        )
