"""SAMed_s: updates on the image encoder and on the mask decoder's transformer (section 4.4).

The encoder and the decoder's transformer are frozen, so the adapter file is a third of SAMed's.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora import LoRAModel, Update
from sam_lora_image_encoder import (
    PUBLISHED_TARGETS,
    blocks_with_updates,
    encoder_updates,
    places_are_published,
)
from segment_anything.modeling import Sam

# Of `--lora_targets`: the updates of this module's decoder.
DECODER = "decoder"
TRANSFORMER = "mask_decoder.transformer"
# Prefix of the names on disk -> attention of each decoder layer.
LAYER_ATTENTIONS = {
    "sa": "self_attn",
    "cti": "cross_attn_token_to_image",
    "cit": "cross_attn_image_to_token",
}
PROJECTIONS = ("q_proj", "v_proj")


def decoder_updates(depth: int) -> list[Update]:
    """Rows `sa_*_000` (layer 0 q), `sa_*_001` (layer 0 v), …, and `fati_{q,v}{a,b}`."""
    rows = [
        Update(
            layer=f"{TRANSFORMER}.layers.{index // 2}.{attention}.{PROJECTIONS[index % 2]}",
            part=0,
            parts=1,
            down=f"{prefix}_a_{index:03d}",
            up=f"{prefix}_b_{index:03d}",
        )
        for prefix, attention in LAYER_ATTENTIONS.items()
        for index in range(2 * depth)
    ]
    for letter, projection in zip("qv", PROJECTIONS, strict=True):
        rows.append(
            Update(
                layer=f"{TRANSFORMER}.final_attn_token_to_image.{projection}",
                part=0,
                parts=1,
                down=f"fati_{letter}a",
                up=f"fati_{letter}b",
            )
        )
    return rows


class LoRA_Sam(LoRAModel):
    """SAMed_s.

    Args:
        sam_model, r, lora_layer: those of `sam_lora_image_encoder.LoRA_Sam`.
        targets: rows of its `TARGETS`. The decoder always gets its updates: `decoder` may be named
            too, and by itself it means that the encoder gets none.
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
        in_encoder = [target for target in targets if target != DECODER]
        depth = len(sam_model.mask_decoder.transformer.layers)
        super().__init__(
            sam_model,
            r,
            updates=[*encoder_updates(blocks, in_encoder), *decoder_updates(depth)],
            frozen=("image_encoder.", f"{TRANSFORMER}."),
        )
        self.is_published = places_are_published(sam_model, blocks, in_encoder)
