"""A LoRA module in the manner of the original's: a class of its own that knows its file."""

import math

import torch
import torch.nn as nn
from torch.nn.parameter import Parameter

from segment_anything.modeling import Sam


class _LoRA_qkv(nn.Module):
    def __init__(self, qkv, linear_a_q, linear_b_q, linear_a_v, linear_b_v):
        super().__init__()
        self.qkv = qkv
        self.linear_a_q, self.linear_b_q = linear_a_q, linear_b_q
        self.linear_a_v, self.linear_b_v = linear_a_v, linear_b_v
        self.dim = qkv.in_features

    def forward(self, x):
        qkv = self.qkv(x)  # B, N, N, 3 * dim
        qkv[:, :, :, : self.dim] += self.linear_b_q(self.linear_a_q(x))
        qkv[:, :, :, -self.dim :] += self.linear_b_v(self.linear_a_v(x))
        return qkv


class LoRA_Sam(nn.Module):
    def __init__(self, sam_model: Sam, r: int, lora_layer=None):
        super().__init__()
        assert r > 0
        blocks = sam_model.image_encoder.blocks
        self.lora_layer = lora_layer if lora_layer else list(range(len(blocks)))
        self.w_As, self.w_Bs = [], []
        for param in sam_model.image_encoder.parameters():
            param.requires_grad = False
        for t_layer_i, blk in enumerate(blocks):
            if t_layer_i not in self.lora_layer:
                continue
            dim = blk.attn.qkv.in_features
            a_q, a_v = nn.Linear(dim, r, bias=False), nn.Linear(dim, r, bias=False)
            b_q, b_v = nn.Linear(r, dim, bias=False), nn.Linear(r, dim, bias=False)
            self.w_As += [a_q, a_v]
            self.w_Bs += [b_q, b_v]
            blk.attn.qkv = _LoRA_qkv(blk.attn.qkv, a_q, b_q, a_v, b_v)
        self.reset_parameters()
        self.sam = sam_model

    def save_lora_parameters(self, filename: str) -> None:
        assert filename.endswith(".pt") or filename.endswith(".pth")
        tensors = {f"w_a_{i:03d}": layer.weight for i, layer in enumerate(self.w_As)}
        tensors.update({f"w_b_{i:03d}": layer.weight for i, layer in enumerate(self.w_Bs)})
        for key, value in self.sam.state_dict().items():
            if "prompt_encoder" in key or "mask_decoder" in key:
                tensors[key] = value
        torch.save(tensors, filename)

    def load_lora_parameters(self, filename: str) -> None:
        assert filename.endswith(".pt") or filename.endswith(".pth")
        state_dict = torch.load(filename)
        for i, layer in enumerate(self.w_As):
            layer.weight = Parameter(state_dict[f"w_a_{i:03d}"])
        for i, layer in enumerate(self.w_Bs):
            layer.weight = Parameter(state_dict[f"w_b_{i:03d}"])
        sam_dict = self.sam.state_dict()
        for key in sam_dict:
            if "prompt_encoder" in key or "mask_decoder" in key:
                sam_dict[key] = state_dict[key]
        self.sam.load_state_dict(sam_dict)

    def reset_parameters(self) -> None:
        for w_A in self.w_As:
            nn.init.kaiming_uniform_(w_A.weight, a=math.sqrt(5))
        for w_B in self.w_Bs:
            nn.init.zeros_(w_B.weight)

    def forward(self, batched_input, multimask_output, image_size):
        return self.sam(batched_input, multimask_output, image_size)
