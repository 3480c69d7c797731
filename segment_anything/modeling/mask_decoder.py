"""SAM's mask decoder with a mask token for each class (SAM, appendix A; SAMed, section 3.3)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .common import LayerNorm2d
from .transformer import TwoWayTransformer

UPSCALINGS = 2  # of SAM; each doubles the side


class MaskDecoder(nn.Module):
    """Computes mask logits and their predicted IoU from the image embedding and the prompts.

    Token 0 is background in SAMed, and the single mask in SAM. All masks are always returned.

    Args:
        upscalings: number of layers that double the side. Those beyond SAM's two start as
            `repeat_pixels`.
    """

    def __init__(
        self,
        *,
        transformer_dim: int,
        transformer: TwoWayTransformer,
        num_multimask_outputs: int,
        upscalings: int = UPSCALINGS,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
    ) -> None:
        super().__init__()
        width = transformer_dim
        self.num_mask_tokens = num_multimask_outputs + 1
        self.transformer = transformer
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, width)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, kernel_size=2, stride=2),
            LayerNorm2d(width // 4),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, kernel_size=2, stride=2),
            nn.GELU(),
            *(repeat_pixels(width // 8) for _ in range(upscalings - UPSCALINGS)),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(width, width, width // 8, depth=3) for _ in range(self.num_mask_tokens)
        )
        self.iou_prediction_head = MLP(
            width, iou_head_hidden_dim, self.num_mask_tokens, depth=iou_head_depth
        )

    def forward(
        self,
        image_embeddings: torch.Tensor,
        image_pe: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict a mask for each mask token.

        Args:
            image_embeddings: (B, C, H, W), or one image (1, C, H, W) for P prompts.
            image_pe: (1, C, H, W).
            sparse_prompt_embeddings: (P, tokens, C); P is 1 if all images have the same prompt.
            dense_prompt_embeddings: (P, C, H, W).

        Returns:
            Logits (max(B, P), masks, 4H, 4W), with a third upscaling (…, 8H, 8W), and predicted IoU
            (max(B, P), masks).
        """
        image = image_embeddings + dense_prompt_embeddings  # (max(B, P), C, H, W)
        own_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat(
            [
                own_tokens.expand(image.shape[0], -1, -1),
                sparse_prompt_embeddings.expand(image.shape[0], -1, -1),
            ],
            dim=1,
        )
        tokens, image = self.transformer(image, image_pe, tokens)
        iou_token, mask_tokens = tokens[:, 0], tokens[:, 1 : 1 + self.num_mask_tokens]

        pixels = rearrange(image, "b (h w) c -> b c h w", h=image_embeddings.shape[-2])
        pixels = self.output_upscaling(pixels)  # (B, C/8, 4H, 4W)
        kernels = torch.stack(
            [
                mlp(token)
                for mlp, token in zip(
                    self.output_hypernetworks_mlps, mask_tokens.unbind(1), strict=True
                )
            ],
            dim=1,
        )  # (B, masks, C/8)
        logits = (kernels @ pixels.flatten(2)).unflatten(2, pixels.shape[-2:])
        return logits, self.iou_prediction_head(iou_token)


def repeat_pixels(channels: int) -> nn.ConvTranspose2d:
    """Return a layer that doubles the side and starts by repeating every pixel, exactly.

    No activation follows it: each logit is a product of a kernel with the pixel's features, and
    these may be negative, as those of a GELU are. The random numbers go on as before, so that all
    other weights of a network start as without this layer.
    """
    with torch.random.fork_rng(devices=[]):
        layer = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
    nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(channels)[:, :, None, None])  # (in, out, 2, 2)
    return layer


class MLP(nn.Module):
    """`depth` linear layers with ReLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, depth: int) -> None:
        super().__init__()
        widths = [inputs, *[hidden] * (depth - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., inputs) -> (..., outputs)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)
