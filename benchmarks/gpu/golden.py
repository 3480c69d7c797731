"""The golden logits and training steps (tests/golden/README.md) on the device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch

from utils import allow_tf32, seed_everything

from .rows import Row, Setting, at_most
from .running import ROOT

LOSS_ERROR, NORM_ERROR = 5e-5, 1e-3  # relative
OUTPUTS = ("low_res_logits", "iou_predictions")


def golden(setting: Setting) -> Iterator[Row]:
    """Compare outputs and eight training steps with those of the reference implementation."""
    seed_everything(0, deterministic=True)
    allow_tf32(False)
    rule = golden_rule()
    cases = [(224, "encoder"), (224, "encoder_decoder"), (512, "encoder")]
    for size, variant in cases:
        yield from golden_outputs(rule, setting.device, size, variant)
    for variant in list(rule.MODULES)[: 1 if setting.small else None]:
        yield from golden_training(rule, setting.device, variant)


def golden_rule() -> ModuleType:
    """Return the module of the tests that makes golden weights and inputs."""
    sys.path.append(str(ROOT / "tests"))
    import golden_rule

    return golden_rule


@torch.no_grad()
def golden_outputs(
    rule: ModuleType, device: torch.device, size: int, variant: str
) -> Iterator[Row]:
    """Compare the outputs with LoRA apart and merged into the weights."""
    expected = rule.read_npz(f"model_vit_b_{size}_{variant}.npz")
    model = rule.golden_model(size, variant).eval().to(device)
    images = rule.golden_images(size).to(device)
    for merged in (False, True):
        if merged:
            model.merge()
        outputs = model(images, True, size)
        for name in OUTPUTS:
            error = abs(outputs[name].cpu().numpy() - expected[name]).max()
            what = f"{name}, {size} px, {variant}" + (", merged" if merged else "")
            yield at_most(f"largest error of {what}", error, rule.golden_bound(expected[name]))


def golden_training(rule: ModuleType, device: torch.device, variant: str) -> Iterator[Row]:
    """Compare losses and gradient norms of eight steps."""
    errors: dict[str, list[float]] = {"loss": [], "norm": []}
    for found, reference in rule.golden_steps(variant, device):
        for name in set(found) - {"lr_used"}:
            kind = "norm" if name == "grad_norm" else "loss"
            errors[kind].append(abs(found[name] / reference[name] - 1))
    for kind, what, bound in (
        ("loss", "loss terms", LOSS_ERROR),
        ("norm", "gradient norm", NORM_ERROR),
    ):
        what = f"largest relative error of the {what} in eight steps, {variant}"
        yield at_most(what, np.max(errors[kind]), bound)  # of NaN and others, NaN
