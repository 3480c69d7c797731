"""Files of random content for the programs that the stages run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lora.variants import load_variant
from segment_anything import sam_model_registry

NUM_CLASSES = 8


def write_slices(folder: Path, count: int, size: int) -> Path:
    """Write training slices (size, size) whose classes are blocks, and their list.

    Returns:
        `folder`, for `--root_path`.
    """
    rng = np.random.default_rng(0)
    (folder / "train_npz").mkdir(parents=True)
    names = [f"case0005_slice{index:03d}" for index in range(count)]
    for name in names:
        image, label = blocks(rng, size)
        np.savez(folder / "train_npz" / f"{name}.npz", image=image, label=label)
    return listed(folder, "train", names)


def write_volume(folder: Path, depth: int, size: int) -> Path:
    """Write a test volume (depth, size, size) and its list.

    Returns:
        `folder`, for `--volume_path`.
    """
    from benchmarks.scenes import write_h5

    rng = np.random.default_rng(1)
    volume = np.stack([blocks(rng, size) for _ in range(depth)])  # (D, 2, H, W)
    write_h5(folder / "test_vol_h5" / "case0001.npy.h5", volume[:, 0], volume[:, 1])
    return listed(folder, "test_vol", ["case0001"])


def blocks(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image in [0, 1] and its label of square blocks, (size, size) float32 both."""
    label = np.kron(rng.integers(0, NUM_CLASSES + 1, (4, 4)), np.ones((size // 4, size // 4)))
    image = label / NUM_CLASSES * 0.8 + 0.1 * rng.random(label.shape)
    return image.astype(np.float32), label.astype(np.float32)


def listed(folder: Path, split: str, names: list[str]) -> Path:
    """Write the list of a split; return `folder`."""
    (folder / "lists").mkdir(exist_ok=True)
    text = "".join(f"{name}\n" for name in names)
    (folder / "lists" / f"{split}.txt").write_text(text, encoding="utf-8")
    return folder


def write_base(path: Path, vit_name: str, size: int) -> Path:
    """Write random base weights with the public keys; return `path`, for `--ckpt`."""
    torch.manual_seed(0)
    sam, _ = sam_model_registry[vit_name](image_size=size, num_classes=3, checkpoint=None)
    for name, parameter in sam.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    torch.save(sam.state_dict(), path)
    return path


def write_adapter(path: Path, vit_name: str, size: int) -> Path:
    """Write an adapter that holds every weight, random ones; return `path`, for `--lora_ckpt`."""
    torch.manual_seed(0)
    sam, _ = sam_model_registry[vit_name](image_size=size, num_classes=NUM_CLASSES, checkpoint=None)
    model = load_variant("sam_lora_image_encoder")(sam, 4)
    model.train_all_weights()
    model.save_lora_parameters(path)
    return path
