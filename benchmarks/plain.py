"""SAMed written plainly, as the paper describes it.

The benchmarks time the fast code against it, and tests require equal results. Each module here
takes its weights from a module of the project. Windows are padded before they are projected,
attention maps are computed in full, each LoRA update is a separate product, and a test goes slice
by slice through scipy.
"""

from __future__ import annotations

import copy
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

from datasets.augmentation import Augmentation
from evaluation.medpy_check import medpy_scores
from lora import LoRAModel
from lora.layers import LoRALinear
from segment_anything.modeling import relative_attention, transformer
from training.losses import SegmentationLoss


class PlainAttention(nn.Module):
    """`relative_attention.Attention` with padded projections and full attention maps."""

    def __init__(self, fast: relative_attention.Attention) -> None:
        super().__init__()
        self.heads, self.window = fast.heads, fast.window
        self.qkv, self.proj = fast.qkv, fast.proj
        self.rel_pos_h, self.rel_pos_w = fast.rel_pos_h, fast.rel_pos_w

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, H, W, C)
        if self.window is None:
            return self.attend(x)
        side = self.window
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (B, rows, w, columns, w, C)
        rows, columns = x.shape[1], x.shape[3]
        x = self.attend(x.transpose(2, 3).flatten(0, 2)).unflatten(0, (-1, rows, columns))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]

    def attend(self, x: torch.Tensor) -> torch.Tensor:  # (N, H, W, C) -> (N, H, W, C)
        height, width = x.shape[1:3]
        parts = self.qkv(x).flatten(1, 2).chunk(3, dim=-1)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (N, heads, H·W, H·W)
        grid = q.unflatten(2, (height, width))
        rows = torch.einsum("nahwd,hkd->nahwk", grid, offsets(self.rel_pos_h, height))
        columns = torch.einsum("nahwd,wkd->nahwk", grid, offsets(self.rel_pos_w, width))
        logits = logits.unflatten(2, (height, width)).unflatten(4, (height, width))
        logits = (logits + rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)
        out = logits.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2).unflatten(1, (height, width)))


class PlainDecoderAttention(nn.Module):
    """`transformer.Attention` with full attention maps."""

    def __init__(self, fast: transformer.Attention) -> None:
        super().__init__()
        self.heads = fast.heads
        self.q_proj, self.k_proj, self.v_proj = fast.q_proj, fast.k_proj, fast.v_proj
        self.out_proj = fast.out_proj

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:  # (B, N, C), (B, M, C), (B, M, C) -> (B, N, C)
        parts = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return self.out_proj((logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class PlainLoRALinear(nn.Module):
    """`LoRALinear` with a separate product for each update."""

    def __init__(self, fast: LoRALinear) -> None:
        super().__init__()
        self.weight, self.bias, self.updates = fast.weight, fast.bias, fast.updates
        self.part_width = fast.part_width

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        parts = list(F.linear(x, self.weight, self.bias).split(self.part_width, dim=-1))
        for part, branch in self.updates.items():
            parts[int(part)] = parts[int(part)] + branch.up(branch.down(x))
        return torch.cat(parts, dim=-1)


PLAIN_FORMS = {
    relative_attention.Attention: PlainAttention,
    transformer.Attention: PlainDecoderAttention,
    LoRALinear: PlainLoRALinear,
}


def plain_copy(model: LoRAModel) -> LoRAModel:
    """Copy a network and its weights, with each fast module in its plain form."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if type(module) is LoRALinear:  # first, because the other plain modules contain them
            model.set_submodule(path, PlainLoRALinear(module))
    for path, module in list(model.named_modules()):
        if type(module) in PLAIN_FORMS:
            model.set_submodule(path, PLAIN_FORMS[type(module)](module))
    return model


def plain_step(
    model: LoRAModel,
    batch: dict[str, torch.Tensor],
    criterion: SegmentationLoss,
    optimizer: torch.optim.Optimizer,
    lr: float,
) -> dict[str, float]:
    """Make one update as the original does: with unused full-size masks, a sync for each number."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    outputs = model(batch["image"])
    F.interpolate(outputs["masks"], outputs["masks"].shape[-2:], mode="bilinear")  # done twice
    terms = criterion(outputs["low_res_logits"], batch["low_res_label"])
    optimizer.zero_grad()
    terms["loss"].backward()
    optimizer.step()
    return {name: value.item() for name, value in terms.items()}


def offsets(rel_pos: torch.Tensor, side: int) -> torch.Tensor:  # (2·side - 1, d) -> (side, side, d)
    """Return a table whose entry (i, j) is the embedding of the offset i - j."""
    i, j = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return rel_pos[(i - j + side - 1).to(rel_pos.device)]


def plain_zoom(image: np.ndarray, size: tuple[int, int], order: int) -> np.ndarray:
    """Zoom a slice (H, W) to `size` with scipy."""
    factors = [target / source for target, source in zip(size, image.shape, strict=True)]
    return ndimage.zoom(image, factors, order=order)


def plain_sample(
    path: Path, choice: Augmentation, size: int, low_res: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read, augment and resize one training slice.

    Returns:
        Image and label (size, size), and the label at the size of the logits (low_res, low_res).
    """
    with np.load(path) as file:
        image, label = file["image"], file["label"]
    if choice.angle is not None:
        image, label = (
            ndimage.rotate(a, choice.angle, order=0, reshape=False) for a in (image, label)
        )
    elif choice.flip_axis is not None:
        image, label = (
            np.flip(np.rot90(a, choice.quarter_turns), axis=choice.flip_axis).copy()
            for a in (image, label)
        )
    image = plain_zoom(image, (size, size), order=3)
    label = plain_zoom(label, (size, size), order=0)
    low_res_label = plain_zoom(label, (low_res, low_res), order=0)
    return (
        torch.from_numpy(image.astype(np.float32)),
        torch.from_numpy(label.astype(np.int64)),
        torch.from_numpy(low_res_label.astype(np.int64)),
    )


def plain_test(
    path: Path, net: nn.Module, *, classes: int, input_size: int, image_size: int, folder: Path
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Segment, score and write one volume as the original does, a slice at a time.

    Returns:
        The prediction (D, H, W), and DSC and HD95 of each class in the whole volume.
    """
    import SimpleITK as sitk

    with h5py.File(path, "r") as file:
        image, label = file["image"][()], file["label"][()]
    prediction = plain_prediction(image, net, input_size=input_size, image_size=image_size)
    scores = [medpy_scores(prediction == c, label == c) for c in range(1, classes + 1)]
    for suffix, array in (("pred", prediction), ("img", image), ("gt", label)):
        volume = sitk.GetImageFromArray(array.astype(np.float32))
        volume.SetSpacing((1, 1, 1))
        sitk.WriteImage(volume, str(folder / f"{path.name}_{suffix}.nii.gz"))
    return prediction, scores


def plain_prediction(
    image: np.ndarray, net: nn.Module, *, input_size: int, image_size: int
) -> np.ndarray:  # (D, H, W) -> (D, H, W) uint8
    """Segment one volume as the original does, a slice at a time."""
    prediction = np.zeros(image.shape, dtype=np.uint8)
    for index, plane in enumerate(image):
        small = plain_zoom(plane, (input_size, input_size), order=3)
        inputs = plain_zoom(small, (image_size, image_size), order=3)
        inputs = torch.from_numpy(inputs)[None, None].float().repeat(1, 3, 1, 1)
        with torch.no_grad():
            masks = net(inputs.to(next(net.parameters()).device), True, image_size)["masks"]
            out = masks.softmax(dim=1).argmax(dim=1)[0].cpu().numpy()
        prediction[index] = (
            out if out.shape == plane.shape else plain_zoom(out, plane.shape, order=0)
        )
    return prediction
