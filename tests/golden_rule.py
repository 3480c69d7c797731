"""The rule that makes the golden weights and inputs (tests/golden/README.md)."""

from __future__ import annotations

import functools
import json
import math
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from common.precision import allow_tf32
from lora import LoRAModel
from segment_anything import sam_model_registry
from trainer import StepOptions, freeze_unreached, learning_rate, make_optimizer, training_step
from training.losses import SegmentationLoss

GOLDEN = Path(__file__).parent / "golden"
MODULES = {
    "encoder": "sam_lora_image_encoder",
    "encoder_decoder": "sam_lora_image_encoder_mask_decoder",
}


@functools.cache  # most of the time of a golden test would go into these random numbers
def golden_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Return the tensor that the rule makes for a public key name; never change it in place."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    x = rng.standard_normal(shape).astype(np.float32)
    if "gaussian" in name:
        return torch.from_numpy(x)
    if len(shape) == 1 and name.split(".")[-1] == "weight":
        return torch.from_numpy(1 + np.float32(0.02) * x)
    return torch.from_numpy(np.float32(0.02) * x)


def golden_model(
    size: int, variant: str = "encoder", *, vit: str = "vit_b", zero_up: bool = False
) -> LoRAModel:
    """Return a network with weights and adapter by the rule; `zero_up` leaves B at zero.

    TF32 is off from then on, because it misses the tolerance of `assert_golden` on a GPU.
    """
    allow_tf32(False)
    sam, _ = sam_model_registry[vit](
        image_size=size, num_classes=8, checkpoint=None, pixel_mean=[0, 0, 0], pixel_std=[1, 1, 1]
    )
    with torch.no_grad():
        for name, tensor in sam.state_dict(keep_vars=True).items():
            tensor.copy_(golden_tensor(name, tuple(tensor.shape)))
    model = import_module(MODULES[variant]).LoRA_Sam(sam, 4)
    set_adapter(model, zero_up=zero_up)
    return model


def set_adapter(model: LoRAModel, *, zero_up: bool = False) -> None:
    """Set the low-rank matrices by the rule."""
    up_keys = {update.up for update in model.updates}
    down_keys = {update.down for update in model.updates}
    with torch.no_grad():
        for key, tensor in model.adapter_state().items():
            if key in down_keys or (key in up_keys and not zero_up):
                tensor.copy_(golden_tensor(key, tuple(tensor.shape)))


def golden_images(size: int, batch: int = 1, seed: int = 0) -> torch.Tensor:  # (B, 3, S, S)
    """Return the input images of the golden outputs."""
    rng = np.random.default_rng([seed, size])
    image = rng.random((batch, 1, size, size), dtype=np.float32)
    return torch.from_numpy(image).repeat(1, 3, 1, 1)


def read_json(name: str) -> dict:
    """Return the content of a golden JSON file."""
    return json.loads((GOLDEN / name).read_text())


def read_npz(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of a golden npz file."""
    with np.load(GOLDEN / name, allow_pickle=False) as archive:
        return dict(archive)


def golden_bound(expected: np.ndarray) -> float:
    """Return the largest absolute error: 1e-5 + 1e-4 · (largest absolute value)."""
    return 1e-5 + 1e-4 * float(np.abs(expected).max())


def assert_golden(found: torch.Tensor | np.ndarray, expected: np.ndarray) -> None:
    """Require an absolute error within `golden_bound`."""
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else found
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= golden_bound(expected)


def golden_steps(
    variant: str, device: torch.device
) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
    """Make the eight golden training steps.

    Yields:
        Of each step, what was found (`lr_used`, `grad_norm` and the loss terms) and the reference.
    """
    expected = read_json(f"train_{variant}.json")
    model = golden_model(224, variant, zero_up=True).to(device)
    freeze_unreached(model)
    criterion = SegmentationLoss(9, dice_weight=0.8)
    optimizer = make_optimizer(model, "adamw", expected["base_lr"])
    for step, reference in enumerate(expected["steps"]):
        rng = np.random.default_rng([0, 100 + step])
        image = rng.random((expected["batch"], 1, 224, 224), dtype=np.float32)
        label = rng.integers(0, 9, (expected["batch"], 7, 7)).repeat(8, 1).repeat(8, 2)
        batch = {
            "image": torch.from_numpy(image).repeat(1, 3, 1, 1).to(device),
            "low_res_label": torch.from_numpy(label).to(device),
        }
        lr = learning_rate(
            step,
            base_lr=expected["base_lr"],
            warmup=expected["warmup_period"],
            max_iterations=expected["max_iterations"],
            exponent=0.9,
        )
        options = StepOptions(clip_grad=math.inf)  # measures the norm and changes nothing
        terms, _ = training_step(model, batch, criterion, optimizer, lr, options)
        yield {"lr_used": lr} | {name: value.item() for name, value in terms.items()}, reference
