"""Masks are resized by one kernel, in deterministic mode too; its memory and numbers stay small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model, tiny_sam
from torch.utils._python_dispatch import TorchDispatchMode

from evaluation.predict_volume import predict_volume
from segment_anything.modeling.common import resize_bilinear

SIZES = [(16, 16), (40, 24), (7, 5), (1, 3), (9, 11)]
# Operators that launch nothing on a GPU.
VIEWS = ("view", "slice", "device", "alias")


class Kernels(TorchDispatchMode):
    """Collects the operators that launch a kernel, and adds up the bytes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.written = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
            self.written += found.numel() * found.element_size()
        return found


@pytest.fixture
def strict() -> Iterator[None]:
    """PyTorch's strict deterministic mode."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode(mode)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_equals_interpolate_bit_for_bit(size: tuple[int, int], dtype: torch.dtype):
    images = torch.randn(2, 3, 9, 11).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        images = images.contiguous(memory_format=layout)
        expected = F.interpolate(images, size, mode="bilinear", align_corners=False)
        found = resize_bilinear(images, size)
        assert torch.equal(found, expected) and found.dtype == dtype
        assert found.stride() == expected.stride()
    images.requires_grad_()
    assert torch.equal(resize_bilinear(images, size), expected)


@pytest.mark.parametrize("size", SIZES)
def test_it_interpolates_between_the_centres_of_pixels(size: tuple[int, int]):
    images = np.random.default_rng(0).random((1, 2, 9, 11))
    matrices = []
    for source, target in zip(images.shape[2:], size, strict=True):
        centres = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
        places = np.arange(source)
        matrices.append(np.maximum(0, 1 - np.abs(centres[:, None] - places)))
    expected = matrices[0] @ images @ matrices[1].T
    found = resize_bilinear(torch.from_numpy(images), size).numpy()
    assert np.abs(found - expected).max() < 1e-12


def test_it_has_the_gradient_of_interpolate(strict: None):
    images = torch.randn(2, 3, 9, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resize_bilinear(x, (5, 17)), images)


def test_one_kernel_resizes_masks_on_a_gpu_in_strict_mode(strict: None):
    """PyTorch treats the device `meta` as it treats a GPU here."""
    sam = tiny_sam(image_size=512)
    logits = torch.empty(12, 9, 128, 128, device="meta")
    with Kernels() as plain:
        F.interpolate(logits, (512, 512), mode="bilinear", align_corners=False)
    with Kernels() as square:
        masks = sam.postprocess_masks(logits, (512, 512), (512, 512))
    assert (masks.device.type, masks.shape) == ("meta", (12, 9, 512, 512))
    assert square.names == ["upsample_bilinear2d"]
    assert square.written == 12 * 9 * 512 * 512 * 4
    # What PyTorch does otherwise, which this test would see.
    assert len(plain.names) > 30 and plain.written > 10 * square.written

    with Kernels() as cut:
        masks = sam.postprocess_masks(logits, (512, 384), (300, 200))
    assert masks.shape == (12, 9, 300, 200)
    assert cut.names == ["upsample_bilinear2d"] * 2


def test_a_gradient_in_strict_mode_is_repeatable(strict: None):
    """Where a gradient is needed, the operators are those whose gradients never refuse.

    PyTorch treats the device `meta` as it treats a GPU here.
    """
    logits = torch.empty(1, 3, 8, 8, device="meta", requires_grad=True)
    with Kernels() as needed:
        assert resize_bilinear(logits, (16, 16)).requires_grad
    assert "upsample_bilinear2d" not in needed.names
    with torch.no_grad(), Kernels() as not_needed:
        resize_bilinear(logits, (16, 16))
    assert not_needed.names == ["upsample_bilinear2d"]


def test_prediction_resizes_by_one_kernel(strict: None, monkeypatch: pytest.MonkeyPatch):
    """Masks and probabilities; the numbers are those of `F.interpolate`."""
    model, volume = tiny_model().eval(), np.random.default_rng(0).random((3, 40, 30), np.float32)
    found: list[torch.Tensor] = []
    sizes = {"input_size": (32, 32), "image_size": (64, 64)}

    def predict() -> np.ndarray:
        return predict_volume(
            model, volume, **sizes, on_probabilities=lambda start, part: found.append(part)
        )

    # What the prediction did before; on a CPU the mode makes no difference.
    for module in ("segment_anything.modeling.sam", "evaluation.predict_volume"):
        monkeypatch.setattr(
            f"{module}.resize_bilinear",
            lambda x, size: F.interpolate(x, size, mode="bilinear", align_corners=False),
        )
    expected = predict()
    monkeypatch.undo()
    monkeypatch.setattr(F, "interpolate", None)
    assert np.array_equal(predict(), expected)
    before, after = found[: len(found) // 2], found[len(found) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
