"""The table of encoders, and how a `Sam` is built from one of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from common.errors import InputError

from .base_weights import (
    SAM_DEPTH,
    PublicWeights,
    decoder_depth,
    fill_base_weights,
    logits_side,
    read_base_weights,
)
from .modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from .modeling.mask_decoder import UPSCALINGS
from .shapes import print_shapes, shapes_are_wanted

PATCH_SIZE = 16
# Channels between the encoder and the decoder.
EMBED_DIM = 256


@dataclass(frozen=True)
class EncoderSpec:
    """A size of the image encoder, and its public weights."""

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]  # blocks that attend over the whole image
    weights: PublicWeights | None = None


@dataclass(frozen=True)
class DecoderSpec:
    """A size of the mask decoder; the defaults are SAM's.

    Args:
        depth: layers of the transformer, at least SAM's 2.
        logits: 1: the side of the logits is S/4; 2: it is S/2, by one more upscaling layer.

    Raises:
        InputError: a value is another one.
    """

    depth: int = SAM_DEPTH
    logits: int = 1

    def __post_init__(self) -> None:
        if self.depth < SAM_DEPTH or self.logits not in (1, 2):
            raise InputError(
                f"the mask decoder has depth {self.depth} and logits {self.logits}, expected a "
                f"depth of at least {SAM_DEPTH}, and logits 1 or 2"
            )

    def require_in(self, sam: nn.Module, variant: str) -> None:
        """Refuse a size that has no effect: a LoRA variant put a decoder of its own into `sam`."""
        keys = sam.state_dict()
        for flag, found, wanted, of_sam in (
            ("--decoder_depth", decoder_depth(keys), self.depth, SAM_DEPTH),
            ("--logits", logits_side(keys), self.logits, 1),
        ):
            if wanted not in (found, of_sam):
                raise InputError(
                    f"{flag} is {wanted}, but the LoRA variant {variant} has a mask decoder of its "
                    f"own; leave out {flag}, or pass another --module"
                )


SAM_DECODER = DecoderSpec()
ENCODERS = {
    # For CPUs, tests and the quickstart. It has no public weights.
    "vit_tiny": EncoderSpec(width=192, depth=4, heads=3, global_blocks=(1, 3)),
    "vit_b": EncoderSpec(
        width=768,
        depth=12,
        heads=12,
        global_blocks=(2, 5, 8, 11),
        weights=PublicWeights(
            "sam_vit_b_01ec64.pth",
            "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        ),
    ),
    "vit_l": EncoderSpec(
        width=1024,
        depth=24,
        heads=16,
        global_blocks=(5, 11, 17, 23),
        weights=PublicWeights(
            "sam_vit_l_0b3195.pth",
            "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        ),
    ),
    "vit_h": EncoderSpec(
        width=1280,
        depth=32,
        heads=16,
        global_blocks=(7, 15, 23, 31),
        weights=PublicWeights(
            "sam_vit_h_4b8939.pth",
            "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        ),
    ),
}


def build_network(
    name: str,
    image_size: int = 1024,
    num_classes: int = 3,
    pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
    pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
    checkpoint: str | Path | None = None,
    *,
    keep_mask_heads: bool | None = None,
    decoder: DecoderSpec = SAM_DECODER,
) -> tuple[Sam, int]:
    """Build a network, and fill in base weights if a checkpoint is given.

    Args:
        name: a row of `ENCODERS`.
        image_size: S, side of the square input in pixels, divisible by 16.
        num_classes: number of foreground classes; the decoder has a mask token more.
        pixel_mean, pixel_std: those of SAM by default; SAMed uses 0 and 1 for images in [0, 1].
        checkpoint: base weights for any image size; None: random weights.
        keep_mask_heads: which mask heads of the checkpoint to load. None: every tensor whose shape
            fits, as the original in effect did; True: all, strictly (SAM itself); False: none.
        decoder: size of the mask decoder. What SAM does not have starts from what it has: see
            `base_weights.fill_base_weights` and `mask_decoder.repeat_pixels`.

    Returns:
        The network and the side of its image embedding, S/16.

    Raises:
        InputError: the image size is not divisible by 16, or the checkpoint does not fit.
    """
    if image_size < PATCH_SIZE or image_size % PATCH_SIZE:
        raise InputError(
            f"image size {image_size} is not a positive multiple of {PATCH_SIZE}, the encoder's "
            f"patch size; pass --img_size {max(1, round(image_size / PATCH_SIZE)) * PATCH_SIZE}"
        )
    if num_classes < 1:
        raise InputError(f"num_classes is {num_classes}, expected at least 1 foreground class")
    if name not in ENCODERS:
        raise InputError(f"unknown encoder {name!r:.80}, expected {', '.join(ENCODERS)}")
    spec = ENCODERS[name]
    if checkpoint is not None:  # Building the network takes seconds, so check the file first.
        state = read_base_weights(
            checkpoint,
            name=name,
            widths={other: (row.width, row.depth) for other, row in ENCODERS.items()},
            public=spec.weights,
        )
    grid = image_size // PATCH_SIZE
    encoder, prompt_encoder, mask_decoder = _parts(spec, decoder, image_size, num_classes)
    sam = Sam(encoder, prompt_encoder, mask_decoder, pixel_mean, pixel_std)
    if checkpoint is not None:
        fill_base_weights(sam, state, source=checkpoint, keep_mask_heads=keep_mask_heads)
    if shapes_are_wanted():
        print_shapes(sam)
    return sam, grid


def _parts(
    spec: EncoderSpec, size: DecoderSpec, image_size: int, num_classes: int
) -> tuple[ImageEncoderViT, PromptEncoder, MaskDecoder]:
    """Return the three parts of a network with random weights."""
    grid = image_size // PATCH_SIZE
    encoder = ImageEncoderViT(
        image_size=image_size,
        width=spec.width,
        depth=spec.depth,
        heads=spec.heads,
        global_blocks=spec.global_blocks,
        patch_size=PATCH_SIZE,
        out_channels=EMBED_DIM,
    )
    prompt_encoder = PromptEncoder(
        embed_dim=EMBED_DIM,
        image_embedding_size=(grid, grid),
        input_image_size=(image_size, image_size),
    )
    transformer = TwoWayTransformer(
        depth=size.depth, embedding_dim=EMBED_DIM, num_heads=8, mlp_dim=2048
    )
    decoder = MaskDecoder(
        transformer_dim=EMBED_DIM,
        transformer=transformer,
        num_multimask_outputs=num_classes,
        upscalings=UPSCALINGS + size.logits - 1,
    )
    return encoder, prompt_encoder, decoder


def build_sam(*args: Any, **kwargs: Any) -> tuple[Sam, int]:
    """Build vit_h from (image_size, num_classes, …) as the original's function does.

    With the name of another encoder first, build that one (`build_network`).
    """
    is_named = "name" in kwargs or (args and isinstance(args[0], str))
    return build_network(*args, **kwargs) if is_named else build_sam_vit_h(*args, **kwargs)


build_sam_vit_b = partial(build_network, "vit_b")
build_sam_vit_l = partial(build_network, "vit_l")
build_sam_vit_h = partial(build_network, "vit_h")
sam_model_registry = {name: partial(build_network, name) for name in ENCODERS}
sam_model_registry["default"] = build_sam_vit_h
