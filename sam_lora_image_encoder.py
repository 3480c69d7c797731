"""SAMed: low-rank updates on q and v of every block of the image encoder (section 3.2).

The encoder is frozen; the prompt encoder and the mask decoder train in full.
"""

from __future__ import annotations

from collections.abc import Sequence

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


class LoRA_Sam(LoRAModel):
    """SAMed.

    Args:
        sam_model: the network to adapt, changed in place.
        r: rank of every update.
        lora_layer: encoder blocks that get updates; all by default.
    """

    def __init__(self, sam_model: Sam, r: int, lora_layer: Sequence[int] | None = None) -> None:
        blocks = range(len(sam_model.image_encoder.blocks)) if lora_layer is None else lora_layer
        super().__init__(
            sam_model,
            r,
            updates=encoder_updates(blocks),
            frozen=("image_encoder.",),
        )
