"""The Segment Anything Model, written for fine-tuning on medical images."""

from .build_sam import ENCODERS, EncoderSpec, sam_model_registry
from .modeling import Sam
from .predictor import SamPredictor

__all__ = ["ENCODERS", "EncoderSpec", "Sam", "SamPredictor", "sam_model_registry"]
