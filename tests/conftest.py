"""Small networks and small data that many tests use."""

from __future__ import annotations

import multiprocessing.spawn
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import shortened  # noqa: F401
import torch

from lora import LoRAModel, variants
from sam_lora_image_encoder import LoRA_Sam
from segment_anything import Sam, sam_model_registry

# The programs that tests start compile the project's files once, not every time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(autouse=True, scope="module")
def seeded_module() -> None:
    """Start the fixtures of every module from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files are LoRA variants, as if they lay in the project's top folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.setattr("lora.variants.FOLDERS", (*variants.FOLDERS, folder))
    yield folder
    for name, module in [*sys.modules.items()]:
        if getattr(module, "__file__", None) == str(folder / f"{name}.py"):
            del sys.modules[name]


@pytest.fixture(scope="session")
def quick_interpreter() -> Iterator[str]:
    """The path of `quick_python.py`, whose server runs."""
    import processes  # it imports much, and few tests need it

    # A path in `tmp_path_factory` may be too long for a socket.
    with tempfile.TemporaryDirectory(prefix="samed-") as folder:
        path, server = processes.quick_python(Path(folder))
        yield path
        server.kill()
        server.join()


@pytest.fixture(scope="module")
def quick_python(quick_interpreter: str) -> Iterator[None]:
    """Command lines with `sys.executable` start at once, as forks; see `quick_python.py`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "executable", quick_interpreter)
        before = multiprocessing.spawn.get_executable()
        multiprocessing.set_executable(quick_interpreter)
        yield
        multiprocessing.set_executable(before)


def tiny_sam(image_size: int = 64, num_classes: int = 2) -> Sam:
    """Return a random vit_tiny that takes images in [0, 1]."""
    sam, _ = sam_model_registry["vit_tiny"](
        image_size=image_size,
        num_classes=num_classes,
        checkpoint=None,
        pixel_mean=[0, 0, 0],
        pixel_std=[1, 1, 1],
    )
    return sam


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base weights for the tiny encoder, with eight classes."""
    path = tmp_path_factory.mktemp("base") / "base.pth"
    torch.manual_seed(0)
    torch.save(tiny_sam(num_classes=8).state_dict(), path)
    return path


def tiny_model(rank: int = 2, **kwargs: int) -> LoRAModel:
    """Return a SAMed network on `tiny_sam` whose low-rank updates are not zero."""
    model = LoRA_Sam(tiny_sam(**kwargs), rank)
    randomise_updates(model)
    return model


def randomise_updates(model: LoRAModel) -> None:
    """Set every low-rank update to random values other than zero."""
    for name, parameter in model.named_parameters():
        if ".up.weight" in name:
            torch.nn.init.normal_(parameter, std=0.2)


def write_slices(
    folder: Path, count: int = 5, size: int = 40, num_classes: int = 8, cases: int = 1
) -> Path:
    """Write training slices made of square blocks of the classes, and their list.

    Returns:
        `folder`.
    """
    rng = np.random.default_rng(0)
    names = [
        f"case{5 + case:04d}_slice{index:03d}" for case in range(cases) for index in range(count)
    ]
    (folder / "train_npz").mkdir(parents=True)
    (folder / "lists").mkdir(exist_ok=True)
    for name in names:
        label = np.kron(rng.integers(0, num_classes + 1, (5, 5)), np.ones((size // 5, size // 5)))
        image = (label / num_classes * 0.8 + 0.1 * rng.random(label.shape)).astype(np.float32)
        np.savez(folder / "train_npz" / f"{name}.npz", image=image, label=label.astype(np.float32))
    (folder / "lists" / "train.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


TINY_FLAGS = "--vit_name vit_tiny --ckpt none --img_size 64 --n_gpu 1 --rank 2 --device cpu".split()
