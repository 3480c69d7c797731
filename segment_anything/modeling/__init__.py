"""The parts of the Segment Anything Model (arXiv 2304.02643)."""

from .image_encoder import ImageEncoderViT
from .mask_decoder import MaskDecoder
from .prompt_encoder import OrganPrompts, PromptEncoder
from .sam import Sam
from .transformer import TwoWayTransformer

__all__ = [
    "ImageEncoderViT",
    "MaskDecoder",
    "OrganPrompts",
    "PromptEncoder",
    "Sam",
    "TwoWayTransformer",
]
