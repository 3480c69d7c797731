"""Inputs of the benchmarks: organ-like volumes, training slices and networks, equal in each run."""

from __future__ import annotations

import argparse
import atexit
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from scipy import ndimage
from torch import nn

from config.flags import test_parser
from datasets.dataset_synapse import Synapse_dataset
from datasets.registry import SYNAPSE
from lora import LoRAModel
from preprocess.phantom_volume import Phantom, make_phantom
from sam_lora_image_encoder import LoRA_Sam
from segment_anything import sam_model_registry

NUM_CLASSES = SYNAPSE.num_classes


def scratch_folder() -> Path:
    """Make an empty folder that is deleted when the program ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


class Scene(NamedTuple):
    """A volume with its label and a prediction, each (D, H, W)."""

    image: np.ndarray  # float32 in [0, 1]
    label: np.ndarray  # uint8
    prediction: np.ndarray  # uint8

    def part(self, start: int, stop: int) -> Scene:
        """Return the slices `start`…`stop - 1` alone."""
        part = slice(start, stop)
        return Scene(self.image[part], self.label[part], self.prediction[part])


@lru_cache(maxsize=2)
def scene(slices: int = 150, size: int = 512) -> Scene:
    """Make a phantom CT of the abdomen and a prediction of its organs.

    The prediction is the label under a smooth random warp of a few voxels: it finds every organ,
    none perfectly, and its surfaces are like those of a fair segmentation.
    """
    image, label = prepared(make_phantom(3, size=size, slices=-(-slices // 3)))  # slices of 5 mm
    image, label = (
        np.repeat(a, 3, axis=0)[:slices] for a in (image, label)
    )  # thin slices, about as many as a BTCV scan has
    return Scene(image, label, warped(label))


def prepared(phantom: Phantom) -> tuple[np.ndarray, np.ndarray]:
    """Return image (float32 in [0, 1]) and classes (uint8) of a phantom, as preprocess does."""
    low, high = SYNAPSE.intensity.low, SYNAPSE.intensity.high
    image = ((phantom.image.clip(low, high) - low) / (high - low)).astype(np.float32)
    to_class = np.zeros(256, dtype=np.uint8)
    for raw, index in SYNAPSE.raw_labels.items():
        to_class[raw] = index
    return image, to_class[phantom.label]


def warped(label: np.ndarray) -> np.ndarray:
    """Warp labels (D, H, W) smoothly, by about one slice and three rows and columns."""
    rng = np.random.default_rng(0)
    places = []
    for axis, (length, spread) in enumerate(zip(label.shape, (1, 3, 3), strict=True)):
        coarse = ndimage.gaussian_filter(rng.standard_normal((10, 16, 16)), 1)
        factors = [n / m for n, m in zip(label.shape, coarse.shape, strict=True)]
        shift = ndimage.zoom((coarse * spread / coarse.std()).astype(np.float32), factors, order=1)
        grid = np.arange(length).reshape([-1 if a == axis else 1 for a in range(3)])
        places.append(np.rint(grid + shift).clip(0, length - 1).astype(np.int32))
    return label[tuple(places)]


def scattered(prediction: np.ndarray, per_class: int = 60) -> np.ndarray:
    """Copy a prediction and add stray voxels of each class all over the volume."""
    rng, strewn = np.random.default_rng(1), prediction.copy()
    for index in range(1, NUM_CLASSES + 1):
        strewn.ravel()[rng.integers(0, strewn.size, per_class)] = index
    return strewn


def write_h5(path: Path, image: np.ndarray, label: np.ndarray) -> Path:
    """Write a test volume as preprocess does, with the labels in float32 as in the original."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = image, label.astype(np.float32)
        file.attrs.update(spacing=(0.74, 0.74, 1.67), origin=(0.0, 0.0, 0.0))
        file.attrs["direction"] = (1.0, 0, 0, 0, 1, 0, 0, 0, 1)
    return path


def test_data(
    folder: Path,
    volumes: dict[str, tuple[np.ndarray, np.ndarray]],
    *flags: str,
    num_classes: int = NUM_CLASSES,
) -> tuple[argparse.Namespace, Synapse_dataset]:
    """Write test volumes and return the arguments and the data set of `test.py`.

    Args:
        volumes: (image, label), each (D, H, W), by case.
        flags: more flags of `test.py`.
    """
    for case, (image, label) in volumes.items():
        write_h5(folder / "test_vol_h5" / f"{case}.npy.h5", image, label)
    (folder / "lists").mkdir()
    (folder / "lists" / "test_vol.txt").write_text("".join(f"{case}\n" for case in volumes))
    args = test_parser().parse_args(
        ["--num_classes", str(num_classes), "--input_size", "224", *flags]
    )
    args.spec = SYNAPSE.of_plain_classes(num_classes).to_json()
    return args, Synapse_dataset(folder, None, "test_vol", num_classes=num_classes)


def write_slices(folder: Path, count: int, size: int = 224) -> list[Path]:
    """Write training slices as preprocess does; return their paths."""
    image, label, _ = scene()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in np.linspace(20, len(image) - 20, count).astype(int):
        factor = size / image.shape[1]
        paths.append(folder / f"case0005_slice{index:03d}.npz")
        np.savez(
            paths[-1],
            image=ndimage.zoom(image[index], factor, order=3),
            label=ndimage.zoom(label[index], factor, order=0).astype(np.float32),
        )
    return paths


def network(vit_name: str = "vit_b", image_size: int = 512, *, seed: int = 0) -> LoRAModel:
    """Build SAMed with random weights; relative positions and LoRA updates are not zero."""
    torch.manual_seed(seed)
    sam, _ = sam_model_registry[vit_name](
        image_size=image_size,
        num_classes=NUM_CLASSES,
        checkpoint=None,
        pixel_mean=[0, 0, 0],
        pixel_std=[1, 1, 1],
    )
    model = LoRA_Sam(sam, 4)
    for name, parameter in model.named_parameters():
        if "rel_pos" in name or "pos_embed" in name or ".up." in name:
            nn.init.normal_(parameter, std=0.02)
    return model


class Answers(nn.Module):
    """A network that answers with given masks, as if it had been trained.

    A network with random weights finds no organ, so there would be nothing to score.

    Args:
        labels: (D, S, S) classes, in the order in which the slices will be segmented.
        inner: a network whose forward pass is made too; its logits are kept for comparison.
    """

    def __init__(self, labels: np.ndarray, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.anchor = nn.Parameter(torch.zeros(()))  # `predict_volume` reads its device
        classes = torch.arange(NUM_CLASSES + 1)[:, None, None]
        one_hot = torch.from_numpy(labels)[:, None] == classes
        self.register_buffer("masks", one_hot.float())  # (D, classes + 1, S, S)
        self.restart()

    def restart(self) -> None:
        """Start again at the first slice."""
        self.asked = 0
        self.logits: list[torch.Tensor] = []

    def forward(
        self, images: torch.Tensor, multimask_output: bool, image_size: int
    ) -> dict[str, torch.Tensor]:
        """Return the masks of the next `len(images)` slices."""
        if self.inner is not None:
            self.logits.append(self.inner(images, multimask_output, image_size)["low_res_logits"])
        start, self.asked = self.asked, self.asked + len(images)
        return {"masks": self.masks[start : self.asked]}
