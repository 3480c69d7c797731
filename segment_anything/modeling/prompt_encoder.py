"""SAM's prompt encoder for points, boxes and masks (SAM, appendix A)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .common import LayerNorm2d

# Kinds of prompt tokens: a place outside the organ, a place inside, and the corners of a box.
PADDING, OUTSIDE, INSIDE, TOP_LEFT, BOTTOM_RIGHT = -1, 0, 1, 2, 3
# The number of tokens for prompts is a multiple of it. Attention sees padding too, so that a
# slice's result would else depend on how many prompts its neighbours in the batch have.
TOKENS = 8


@dataclass(frozen=True)
class OrganPrompts:
    """Clicks and corners of boxes on B images, each of which speaks of one organ.

    SAM's prompts speak of one mask. SAMed predicts the masks of all organs at once, so a prompt has
    to name its organ.

    Args:
        coords: (B, N, 2) float32, as (x, y) in pixels of the network's square input.
        kinds: (B, N) int64: `OUTSIDE`, `INSIDE`, `TOP_LEFT`, `BOTTOM_RIGHT`, or `PADDING`.
        organs: (B, N) int64 classes 1…C; of padding, any.
    """

    coords: torch.Tensor
    kinds: torch.Tensor
    organs: torch.Tensor

    def padded(self) -> OrganPrompts:
        """Return the same prompts with padding up to a multiple of `TOKENS`."""
        missing = -self.kinds.shape[1] % TOKENS
        return OrganPrompts(
            F.pad(self.coords, (0, 0, 0, missing)),
            F.pad(self.kinds, (0, missing), value=PADDING),
            F.pad(self.organs, (0, missing)),
        )


class PromptEncoder(nn.Module):
    """Computes sparse embeddings of points and boxes, and dense embeddings of masks.

    Args:
        embed_dim: number of channels of an embedding.
        image_embedding_size: (H, W) of the image embedding.
        input_image_size: (rows, columns) of the square input that prompts refer to, in pixels.
        mask_in_chans: number of channels inside the mask downscaling.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        image_embedding_size: tuple[int, int],
        input_image_size: tuple[int, int],
        mask_in_chans: int = 16,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.image_embedding_size = image_embedding_size
        self.input_image_size = input_image_size
        self.pe_layer = PositionEmbeddingRandom(embed_dim // 2)
        # background point, foreground point, top-left corner, bottom-right corner
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, embed_dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_in_chans // 4, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans // 4),
            nn.GELU(),
            nn.Conv2d(mask_in_chans // 4, mask_in_chans, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans),
            nn.GELU(),
            nn.Conv2d(mask_in_chans, embed_dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)

    def get_dense_pe(self) -> torch.Tensor:  # -> (1, C, H, W)
        """Return the positional encoding of every place of the image embedding."""
        return self.pe_layer(self.image_embedding_size)[None]

    def forward(
        self,
        points: tuple[torch.Tensor, torch.Tensor] | None,
        boxes: torch.Tensor | None,
        masks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed the prompts of B masks of one image.

        Args:
            points: coordinates (B, N, 2) as (x, y) in input pixels and labels (B, N): 1 inside,
                0 outside, -1 padding.
            boxes: (B, 4) as (x0, y0, x1, y1) in input pixels.
            masks: (B, 1, 4H, 4W) logits; those of twice the side, as a decoder with a third
                upscaling returns them, are averaged.

        Returns:
            Sparse embeddings (B, tokens, C), without tokens if there is no prompt, and dense
            embeddings (B, C, H, W). Without any prompt B is 1.
        """
        batch = next((len(p) for p in (points and points[0], boxes, masks) if p is not None), 1)
        sparse = [self.no_mask_embed.weight.new_empty(batch, 0, self.embed_dim)]
        if points is not None:
            sparse.append(self._embed_points(*points, pad=boxes is None))
        if boxes is not None:
            sparse.append(self._embed_boxes(boxes))
        if masks is not None:
            if masks.shape[-1] == 8 * self.image_embedding_size[1]:
                masks = F.avg_pool2d(masks, 2)
            dense = self.mask_downscaling(masks)
        else:
            no_mask = self.no_mask_embed.weight[:, :, None, None]
            dense = no_mask.expand(batch, -1, *self.image_embedding_size)
        return torch.cat(sparse, dim=1), dense

    def embed_organs(
        self, prompts: OrganPrompts, organ_tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed prompts that speak of organs: what is said (kind and organ), and of which place.

        It is said twice: by a token, as in SAM, whose position is encoded in it, and in the image
        embedding at its place, as SAM does with masks. A decoder that was never trained with
        prompts does not learn in a training of usual length to find the place that a token means.

        Args:
            organ_tokens: (classes + 1, C), the decoder's own tokens of its masks, so that naming an
                organ needs no new weights.

        Returns:
            Sparse embeddings (B, N, C), N rounded up to a multiple of `TOKENS`, and what is added
            to the dense ones, (B, C, H, W).
        """
        prompts = prompts.padded()
        is_padding = (prompts.kinds == PADDING)[..., None]
        # A product in half precision would move places by pixels.
        with torch.autocast(prompts.coords.device.type, enabled=False):
            kinds = torch.cat([self.not_a_point_embed.weight, *self._kind_embeddings()])  # (5, C)
            said = kinds[prompts.kinds + 1] + organ_tokens[prompts.organs]
            position = self.pe_layer.at(prompts.coords + 0.5, self.input_image_size)
            token = torch.where(is_padding, kinds[0], said + position)
            dense = self._put(said.masked_fill(is_padding, 0), prompts.coords + 0.5)
        return token, dense

    def _put(self, vectors: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
        """Put vectors (B, N, C) where they belong, each shared by the four nearest places.

        Args:
            coords: (B, N, 2) as (x, y) in input pixels, 0.5 the centre of the first.

        Returns:
            (B, C, H, W).
        """
        shares = []
        for axis, places in ((1, self.image_embedding_size[0]), (0, self.image_embedding_size[1])):
            pixels = self.input_image_size[1 - axis] / places
            at = (coords[..., axis, None] / pixels - 0.5).clamp(0, places - 1)  # (B, N, 1)
            line = torch.arange(places, device=coords.device)
            shares.append((1 - (at - line).abs()).clamp(min=0))
        return torch.einsum("bnc,bnh,bnw->bchw", vectors, *shares)

    def _kind_embeddings(self) -> list[torch.Tensor]:
        return [embedding.weight for embedding in self.point_embeddings]  # each (1, C)

    def _embed_points(
        self, coords: torch.Tensor, labels: torch.Tensor, *, pad: bool
    ) -> torch.Tensor:  # (B, N, 2), (B, N) -> (B, N or N + 1, C)
        coords = coords + 0.5  # the centre of a pixel
        if pad:  # SAM was trained with a padding point in place of a missing box.
            coords = torch.cat([coords, coords.new_zeros(len(coords), 1, 2)], dim=1)
            labels = torch.cat([labels, -labels.new_ones(len(labels), 1)], dim=1)
        position = self.pe_layer.at(coords, self.input_image_size)
        is_point = (labels >= 0)[..., None]
        kinds = torch.stack([p.weight[0] for p in self.point_embeddings[:2]])  # (2, C)
        point = position + kinds[(labels == 1).long()]
        return torch.where(is_point, point, self.not_a_point_embed.weight[0])

    def _embed_boxes(self, boxes: torch.Tensor) -> torch.Tensor:  # (B, 4) -> (B, 2, C)
        corners = rearrange(boxes, "b (corner xy) -> b corner xy", xy=2) + 0.5  # centres of pixels
        corners = self.pe_layer.at(corners, self.input_image_size)
        return corners + torch.stack([p.weight[0] for p in self.point_embeddings[2:]])


class PositionEmbeddingRandom(nn.Module):
    """Encodes positions in [0, 1]² as sines and cosines of random frequencies."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, features))

    def forward(self, size: tuple[int, int]) -> torch.Tensor:  # -> (C, H, W)
        height, width = size
        matrix = self.positional_encoding_gaussian_matrix
        rows = (torch.arange(height, device=matrix.device, dtype=matrix.dtype) + 0.5) / height
        columns = (torch.arange(width, device=matrix.device, dtype=matrix.dtype) + 0.5) / width
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)  # (H, W, xy)
        return rearrange(self._encode(grid), "h w c -> c h w")

    def at(self, coords: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """Encode (..., 2) positions (x, y), in pixels of an image of (rows, columns)."""
        scale = coords.new_tensor([image_size[1], image_size[0]], dtype=torch.float32)
        return self._encode(coords.float() / scale)

    def _encode(self, unit_coords: torch.Tensor) -> torch.Tensor:  # (..., 2) -> (..., C)
        angles = 2 * math.pi * ((2 * unit_coords - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
