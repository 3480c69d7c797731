"""The Segment Anything Model, written for fine-tuning on medical images."""

from .automatic_mask_generator import SamAutomaticMaskGenerator
from .build_sam import (
    ENCODERS,
    DecoderSpec,
    EncoderSpec,
    build_sam,
    build_sam_vit_b,
    build_sam_vit_h,
    build_sam_vit_l,
    sam_model_registry,
)
from .modeling import Sam
from .predictor import SamPredictor

__all__ = [
    "ENCODERS",
    "DecoderSpec",
    "EncoderSpec",
    "Sam",
    "SamAutomaticMaskGenerator",
    "SamPredictor",
    "build_sam",
    "build_sam_vit_b",
    "build_sam_vit_h",
    "build_sam_vit_l",
    "sam_model_registry",
]
