"""TF32 is set in one place, by every program, and matters: it misses the golden tolerance."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from golden_rule import golden_images, golden_model, read_npz
from torch.utils._python_dispatch import TorchDispatchMode

import predict
import test
import train
from common.precision import allow_tf32, full_float32
from datasets import resampling
from datasets.resampling import resize_images
from segment_anything.modeling.relative_attention import Attention

REPOSITORY = Path(__file__).resolve().parent.parent
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """PyTorch's setting before a program starts, before and after each test."""
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = True


def tf32() -> tuple[bool, bool]:
    """Whether TF32 is used for products and for convolutions."""
    return (
        torch.backends.cuda.matmul.fp32_precision == "tf32",
        torch.backends.cudnn.conv.fp32_precision == "tf32",
    )


def test_it_is_set_for_products_and_convolutions_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for allowed in (True, False, True, False):
            allow_tf32(allowed)
            assert tf32() == (allowed, allowed)
            # What `torch.compile` reads; it fails if the two names of the setting disagree.
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
            assert torch.backends.cudnn.allow_tf32 is allowed
            assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("newer_name", [False, True])
def test_it_is_off_for_a_while(products: bool, convolutions: bool, newer_name: bool):
    if newer_name:  # A user's script may set it so.
        names = {False: "ieee", True: "tf32"}
        torch.backends.cuda.matmul.fp32_precision = names[products]
        torch.backends.cudnn.conv.fp32_precision = names[convolutions]
    else:
        torch.backends.cuda.matmul.allow_tf32 = products
        torch.backends.cudnn.allow_tf32 = convolutions
    with pytest.raises(KeyError), full_float32(GPU):
        assert tf32() == (False, False)
        raise KeyError
    assert tf32() == (products, convolutions)


def test_the_golden_model_switches_it_off():
    allow_tf32(True)
    golden_model(224, vit="vit_tiny")
    assert tf32() == (False, False)


class Products(TorchDispatchMode):
    """Notes how exactly products of matrices are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if operator.overloadpacket.__name__ in ("mm", "bmm"):
            self.seen.append(tf32()[0])
        return operator(*args, **(kwargs or {}))


def test_slices_are_resized_exactly_although_tf32_is_allowed(monkeypatch: pytest.MonkeyPatch):
    allow_tf32(True)
    monkeypatch.setattr(resampling, "full_float32", lambda device: full_float32(GPU))
    with Products() as products:
        resize_images(torch.rand(2, 40, 30), (64, 64))
    assert products.seen and not any(products.seen)
    assert tf32() == (True, True)


class ToldError(Exception):
    """Carries what a program sets."""


@pytest.mark.parametrize("flags", [[], ["--tf32"]])
@pytest.mark.parametrize("program", [train, test, predict])
def test_every_program_sets_it(
    program: ModuleType, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def tell(allowed: bool) -> None:
        raise ToldError(allowed)

    monkeypatch.setattr(program, "allow_tf32", tell)
    adapter = str(tmp_path / "adapter.pth")
    tiny_model().save_lora_parameters(adapter)
    data = {
        train: ["--n_gpu", "1", "--root_path"],
        test: ["--lora_ckpt", adapter, "--volume_path"],
        predict: ["--lora_ckpt", adapter, "--output", str(tmp_path / "out"), "--input"],
    }
    with pytest.raises(ToldError) as told:
        program.main(["--device", "cpu", *flags, *data[program], str(tmp_path)])
    assert told.value.args == (bool(flags),)


def test_nothing_else_sets_it():
    """Reading `allow_tf32` fails after the newer name was set, so that one file does both."""
    files = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("[a-z]*/**/*.py")]
    ours = [path for path in files if "tests" not in path.parts]
    names = ("backends.cuda.matmul", "backends.cudnn.allow", "fp32_precision", "matmul_precision")
    using = {
        path.relative_to(REPOSITORY).as_posix()
        for path in ours
        if any(name in path.read_text(encoding="utf-8") for name in names)
    }
    assert using == {"common/precision.py"}


def rounded(factor: torch.Tensor) -> torch.Tensor:
    """Return float32 with 10 of its 23 bits, rounded to the nearest, ties to even, as TF32 does."""
    bits = factor.contiguous().view(torch.int32)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return bits.view(torch.float32)


def test_rounding_as_tf32_does():
    values = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11 - 2**-20])
    expected = torch.tensor([1.0, 1 + 2**-10, 1.0, 1 + 2**-9, -1 - 2**-10])
    assert torch.equal(rounded(values), expected)


@pytest.mark.slow
@torch.no_grad()
def test_tf32_in_convolutions_alone_misses_the_golden_tolerance(monkeypatch: pytest.MonkeyPatch):
    """So GPU tests and benchmarks that compare numbers have to switch it off, as programs do."""
    expected = read_npz("model_vit_b_224_encoder.npz")["low_res_logits"]
    bound = 1e-5 + 1e-4 * np.abs(expected).max()
    model, images = golden_model(224).eval(), golden_images(224)
    for module in model.modules():
        if isinstance(module, Attention):
            module.device_type = "cuda"
    exact = model(images, True, 224)["low_res_logits"].numpy()

    for name in ("conv2d", "conv_transpose2d"):
        original = getattr(F, name)
        monkeypatch.setattr(
            F,
            name,
            lambda x, weight, *rest, original=original: original(
                rounded(x), rounded(weight), *rest
            ),
        )
    inexact = model(images, True, 224)["low_res_logits"].numpy()
    print(f"bound {bound:.2e}, exact {np.abs(exact - expected).max():.2e}, ", end="")
    print(f"with TF32 convolutions {np.abs(inexact - expected).max():.2e}")
    assert np.abs(exact - expected).max() <= bound / 2
    assert np.abs(inexact - expected).max() > 1.5 * bound
