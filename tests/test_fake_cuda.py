"""The network on a CUDA device that has shapes, dtypes and devices, but no content and no GPU.

PyTorch's fake tensors refuse an operator that mixes devices or dtypes as the operator itself does.
The backward pass cannot run so, because its engine asks the driver for the device.
"""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from benchmarks.scenes import network
from config.settings import complete
from lora import LoRAModel
from trainer import freeze_unreached
from training.batches import augmented_batch
from training.losses import SegmentationLoss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is a CPU build"),
]
DEVICE = torch.device("cuda", 0)


class SeenAttention(TorchFunctionMode):
    """Notes what reaches the fused attention, and calls one of its kernels, without a choice."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, ...]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args
        assert kwargs.keys() <= {"scale"}  # flash kernels take no mask
        self.seen.append(args)
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (part.to(torch.get_autocast_dtype("cuda")) for part in args)
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, None, False, **kwargs)[0]


@pytest.fixture(autouse=True)
def as_if_there_were_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let autocast start, and let fake tensors have a device that is not there."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    torch._C._ensureCUDADeviceGuardSet()


def without_content(model: LoRAModel) -> LoRAModel:
    """Move a network to the fake device, within a `FakeTensorMode`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, device=DEVICE)
                module._parameters[name] = torch.nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)
    return model


def on_device(*tensors: torch.Tensor) -> bool:
    return all(isinstance(one, FakeTensor) and one.device == DEVICE for one in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vit_name, size", [("vit_tiny", 224), ("vit_b", 224), ("vit_b", 512)])
def test_a_training_step_forward_and_inference(vit_name: str, size: int, dtype: torch.dtype):
    model = network(vit_name, size)
    blocks = len(model.sam.image_encoder.blocks)
    batch, low = 6, size // 4
    autocast = torch.autocast("cuda", dtype, enabled=dtype != torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_content(model).train()
        freeze_unreached(model)
        images = torch.empty(batch, 1, size, size, device=DEVICE).expand(-1, 3, -1, -1)
        labels = torch.empty(batch, low, low, dtype=torch.long, device=DEVICE)
        with SeenAttention() as training, autocast:
            logits = model(images, full_size_masks=False)["low_res_logits"]
        terms = SegmentationLoss(9, 0.8)(logits, labels)
        model.eval()
        with SeenAttention() as inference, autocast, torch.no_grad():
            masks = model(images, True, size)["masks"]

    assert on_device(logits, masks, *terms.values())
    assert logits.shape == (batch, 9, low, low) and masks.shape == (batch, 9, size, size)
    assert masks.dtype == torch.float32
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert len(training.seen) == len(inference.seen) >= blocks
    for q, k, v in (*training.seen, *inference.seen):
        assert on_device(q, k, v)
        assert q.dtype == k.dtype == v.dtype
        # What fused kernels want: flash, in half precision, one width for all three.
        assert q.shape[-1] == k.shape[-1] and q.shape[-1] % 8 == v.shape[-1] % 8 == 0
        assert v.shape[-1] == q.shape[-1] or v.dtype == torch.float32


def test_augmentation_stays_on_the_device():
    args = complete(argparse.Namespace(root_path="x", num_classes=2, img_size=64))
    with FakeTensorMode(allow_non_fake_inputs=True):
        slices = {
            "image": torch.rand(6, 40, 40),
            "label": torch.randint(0, 3, (6, 40, 40), dtype=torch.uint8),
            "index": list(range(6)),
        }
        batch = augmented_batch(slices, 0, args, 16, DEVICE)
        found = {name: (value.shape, value.dtype) for name, value in batch.items()}
        assert on_device(*batch.values())
    assert found["image"] == ((6, 3, 64, 64), torch.float32)
    assert found["low_res_label"] == ((6, 16, 16), torch.int64)


def test_a_tensor_on_the_host_is_noticed():
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = without_content(tiny_model())
        model.sam.pixel_mean = torch.zeros(3, 1, 1)
        with SeenAttention(), pytest.raises(RuntimeError, match="device"):
            model(torch.empty(2, 3, 64, 64, device=DEVICE), full_size_masks=False)
