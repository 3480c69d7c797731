"""SAM as a network from a batch of images to a map of logits for each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .common import resize_bilinear
from .image_encoder import ImageEncoderViT
from .mask_decoder import MaskDecoder
from .prompt_encoder import OrganPrompts, PromptEncoder


class Sam(nn.Module):
    """Image encoder, prompt encoder and mask decoder.

    Args:
        pixel_mean, pixel_std: for each channel. SAMed uses 0 and 1 for images in [0, 1]; SAM uses
            the statistics of its training images in 0…255.
    """

    # Binary masks (SamPredictor) hold the pixels whose logit is above this value.
    mask_threshold = 0.0
    # Fingerprint of the base weights (`base_weights.fingerprint`); None: no weights were loaded.
    base_fingerprint: str | None = None
    # Which mask heads come from the base weights, in words; None: no weights were loaded.
    head_start: str | None = None

    def __init__(
        self,
        image_encoder: ImageEncoderViT,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        mean = torch.tensor(pixel_mean, dtype=torch.float32).view(-1, 1, 1)
        std = torch.tensor(pixel_std, dtype=torch.float32).view(-1, 1, 1)
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.pixel_mean.device

    @property
    def takes_unit_range(self) -> bool:
        """Whether images lie in [0, 1], as in SAMed, and not in 0…255, as in SAM."""
        return bool((self.pixel_mean.abs() <= 1).all() and (self.pixel_std <= 1).all())

    def forward(
        self,
        batched_input: torch.Tensor | list[dict[str, Any]],
        multimask_output: bool = True,
        image_size: int | None = None,
        *,
        full_size_masks: bool = True,
    ) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        """Segment a batch of images without prompts, or a list of records with prompts.

        Args:
            batched_input: (B, 3, H, W) float images in the range that fits pixel_mean and
                pixel_std, H and W up to S; or records, see `forward_records`.
            multimask_output: has no effect; every mask is returned.
            image_size: side of the returned `masks`; None: S.
            full_size_masks: False: leave `masks` out. Training needs only `low_res_logits`.

        Returns:
            For a tensor: `low_res_logits` (B, classes + 1, s, s), `iou_predictions`
            (B, classes + 1) and `masks` (B, classes + 1, image_size, image_size), logits too. The
            side s is S/4, or S/2 if the decoder has a third upscaling.
        """
        del multimask_output
        if not isinstance(batched_input, torch.Tensor):
            return self.forward_records(batched_input)
        embeddings = self.image_encoder(self.preprocess(batched_input))
        logits, iou = self.decode(embeddings)
        outputs = {"low_res_logits": logits, "iou_predictions": iou}
        if full_size_masks:
            side = image_size or self.image_encoder.img_size
            # In bf16, neighbouring logits would be rounded to the same value.
            outputs["masks"] = self.postprocess_masks(logits.float(), (side, side), (side, side))
        return outputs

    def decode(
        self, embeddings: torch.Tensor, prompts: OrganPrompts | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the logits of all classes from the embeddings of images.

        Args:
            embeddings: (B, 256, S/16, S/16), from the image encoder.
            prompts: of the B images; None: none, as published.

        Returns:
            low_res_logits (B, classes + 1, s, s) and iou_predictions (B, classes + 1).
        """
        sparse, dense = self.prompt_encoder(points=None, boxes=None, masks=None)
        if prompts is not None:
            tokens = self.mask_decoder.mask_tokens.weight
            sparse, put = self.prompt_encoder.embed_organs(prompts, tokens)
            dense = dense + put
        return self.mask_decoder(embeddings, self.prompt_encoder.get_dense_pe(), sparse, dense)

    @torch.no_grad()
    def forward_records(self, records: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
        """Segment images, each with its prompts.

        Args:
            records: dicts with `image` (3, H, W) and `original_size` (rows, columns), and
                optionally `point_coords` (P, N, 2) with `point_labels` (P, N), `boxes` (P, 4) and
                `mask_inputs` (P, 1, s, s), in pixels of `image`.

        Returns:
            For each record, `masks` (P, masks, rows, columns) bool, `iou_predictions` (P, masks)
            and `low_res_logits` (P, masks, s, s).
        """
        images = torch.cat([self.preprocess(record["image"][None]) for record in records])
        embeddings = self.image_encoder(images)
        outputs = []
        for record, embedding in zip(records, embeddings, strict=True):
            points = None
            if "point_coords" in record:
                points = (record["point_coords"], record["point_labels"])
            sparse, dense = self.prompt_encoder(
                points=points, boxes=record.get("boxes"), masks=record.get("mask_inputs")
            )
            logits, iou = self.mask_decoder(
                embedding[None], self.prompt_encoder.get_dense_pe(), sparse, dense
            )
            masks = self.postprocess_masks(
                logits, record["image"].shape[-2:], record["original_size"]
            )
            outputs.append(
                {
                    "masks": masks > self.mask_threshold,
                    "iou_predictions": iou,
                    "low_res_logits": logits,
                }
            )
        return outputs

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:  # (B, 3, H, W) -> (B, 3, S, S)
        """Normalise the images and pad them with zeros at the bottom and right to a square."""
        side = self.image_encoder.img_size
        height, width = images.shape[-2:]
        if height > side or width > side:
            raise ValueError(f"images are {height}×{width}, expected at most {side}×{side}")
        normalised = (images - self.pixel_mean) / self.pixel_std
        return F.pad(normalised, (0, side - width, 0, side - height))

    def postprocess_masks(
        self, logits: torch.Tensor, input_size: tuple[int, int], original_size: tuple[int, int]
    ) -> torch.Tensor:
        """Scale logits to the padded square, cut off the padding, and scale to the original size.

        Args:
            logits: (B, masks, s, s), of any side s.
            input_size: (rows, columns) of the image inside the square.
            original_size: (rows, columns) of the image before it was resized.

        Returns:
            (B, masks, *original_size) logits.
        """
        side = self.image_encoder.img_size
        square = resize_bilinear(logits, (side, side))
        masks = square[..., : input_size[0], : input_size[1]]
        if tuple(masks.shape[-2:]) == tuple(original_size):
            return masks
        return resize_bilinear(masks, original_size)
