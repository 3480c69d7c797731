"""The two-way transformer of SAM's mask decoder, in which tokens and image attend to each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .common import MLPBlock


class TwoWayTransformer(nn.Module):
    """`depth` two-way blocks, and a final attention from the tokens to the image.

    SAM has two blocks (SAM, appendix A). With base weights, each block beyond them starts as a copy
    of the second (`base_weights.fill_base_weights`), so that a deeper network starts near SAM, but
    not with its output. A block that starts as the identity is not possible: the blocks are
    post-norm. Without its attentions and its MLP, a block still normalises the tokens three times
    and the image once. The tokens that it gets are y = g·x + b, x normalised, with the trained g
    and b of the block before. The mean and the variance of y differ from token to token, so no gain
    and bias of a LayerNorm bring every normalised y back to y. They do so only if g and b are the
    same in all channels, as in a network of random weights.
    """

    def __init__(
        self, *, depth: int, embedding_dim: int, num_heads: int, mlp_dim: int, downsample: int = 2
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(
                embedding_dim, num_heads, mlp_dim, downsample, first_layer=index == 0
            )
            for index in range(depth)
        )
        self.final_attn_token_to_image = Attention(embedding_dim, num_heads, downsample)
        self.norm_final_attn = nn.LayerNorm(embedding_dim)

    def forward(
        self, image_embedding: torch.Tensor, image_pe: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Update the tokens and the image by attention between them.

        Args:
            image_embedding: (B, C, H, W).
            image_pe: (1, C, H, W), positional encoding of the image.
            tokens: (B, N, C); they also serve as their positional encoding.

        Returns:
            The tokens (B, N, C) and the image (B, H·W, C).
        """
        keys = rearrange(image_embedding, "b c h w -> b (h w) c")
        key_pe = rearrange(image_pe, "b c h w -> b (h w) c")
        queries = tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, key_pe)
        attended = self.final_attn_token_to_image(queries + tokens, keys + key_pe, keys)
        return self.norm_final_attn(queries + attended), keys


class TwoWayAttentionBlock(nn.Module):
    """Attention among the tokens, from tokens to image, an MLP, attention from image to tokens."""

    def __init__(
        self, width: int, heads: int, mlp_dim: int, downsample: int, *, first_layer: bool
    ) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = Attention(width, heads, downsample)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLPBlock(width, mlp_dim, nn.ReLU)
        self.norm3 = nn.LayerNorm(width)
        self.norm4 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = Attention(width, heads, downsample)
        self.first_layer = first_layer

    def forward(
        self,
        queries: torch.Tensor,  # (B, N, C)
        keys: torch.Tensor,  # (B, H·W, C)
        query_pe: torch.Tensor,  # (B, N, C)
        key_pe: torch.Tensor,  # (1, H·W, C)
    ) -> tuple[torch.Tensor, torch.Tensor]:  # (B, N, C), (B, H·W, C)
        if self.first_layer:  # Here the queries are their positional encoding: no residual.
            queries = self.self_attn(queries, queries, queries)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries)
        queries = self.norm1(queries)

        attended = self.cross_attn_token_to_image(queries + query_pe, keys + key_pe, keys)
        queries = self.norm2(queries + attended)
        queries = self.norm3(queries + self.mlp(queries))

        attended = self.cross_attn_image_to_token(keys + key_pe, queries + query_pe, queries)
        return queries, self.norm4(keys + attended)


class Attention(nn.Module):
    """Multi-head attention with an inner width of `width / downsample`."""

    def __init__(self, width: int, heads: int, downsample: int = 1) -> None:
        super().__init__()
        inner = width // downsample
        self.heads = heads
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:  # (B, N, C), (B, M, C), (B, M, C) -> (B, N, C)
        projected = (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        q, k, v = (
            rearrange(x, "b n (heads d) -> b heads n d", heads=self.heads) for x in projected
        )
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        return self.out_proj(rearrange(out, "b heads n d -> b n (heads d)"))
