"""Seeding, logging, devices, building the network, and names that older scripts import."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import random
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.console import printable
from common.errors import InputError
from common.precision import allow_tf32, amp_dtype
from config.network_settings import lora_choices
from config.settings import base_checkpoint, class_names, warn_of_changed_code
from config.shared_flags import SCRATCH
from datasets.neighbours import network_slices, refuse_pictures
from datasets.registry import SYNAPSE
from datasets.scans.errors import require_scan_packages
from datasets.scans.geometry import Geometry
from evaluation.metrics import calculate_metric_percase
from evaluation.predict_volume import predict_volume
from lora import LoRAModel
from lora.adapter_file import class_count, holds_every_weight, read_adapter, trained_classes
from lora.form import UpdateForm
from lora.older_module import as_lora_model
from lora.prompts import recorded_prompt_prob
from lora.trainable import PUBLISHED_TRAIN, train_only
from lora.variants import load_variant
from segment_anything import DecoderSpec, sam_model_registry
from training.losses import DiceLoss, Focal_loss

__all__ = [
    "DiceLoss",
    "Focal_loss",
    "allow_tf32",
    "amp_dtype",
    "build_model",
    "calculate_metric_percase",
    "choose_device",
    "environment",
    "seed_everything",
    "start_logging",
    "test_single_volume",
    "unwrap",
]

# How much memory cuBLAS works in; products are repeatable with two values only.
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE_WORKSPACES = (":4096:8", ":16:8")


def start_logging(path: Path | None) -> None:
    """Send log lines to the terminal, warnings to stderr, and all with the time to a file.

    Args:
        path: the log file; None: only warnings go to the terminal, as on all ranks but the first.
    """
    if path is None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
        return
    # The program reports a full disk once; logging would report it for every line.
    logging.raiseExceptions = False
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(_PrintableLines("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    to_stdout, to_stderr = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    to_stdout.addFilter(lambda record: record.levelno < logging.WARNING)
    to_stderr.setLevel(logging.WARNING)
    for handler in (to_stdout, to_stderr):
        handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[to_file, to_stdout, to_stderr], force=True)


class _PrintableLines(logging.Formatter):
    """Log lines whose characters steer no terminal that later shows the file."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


def seed_everything(seed: int, *, deterministic: bool, compiles: bool = False) -> None:
    """Seed every random generator.

    Args:
        deterministic: use only repeatable GPU kernels, which costs some speed. An operator that has
            none raises a RuntimeError then. Attention is repeatable in this strict mode only: where
            PyTorch just warns, it keeps the faster backward passes, which add in any order.
        compiles: torch.compile will be used, and has to choose repeatable kernels as well.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    # On H100 and later PyTorch asks cuDNN for attention first in half precision. Its backward pass
    # takes half the time of flash attention's, but is not repeatable.
    torch.backends.cuda.enable_cudnn_sdp(not deterministic)
    # CUDA reads this variable when it starts. Products refuse other values in strict mode.
    if deterministic and os.environ.get(CUBLAS_WORKSPACE) not in REPEATABLE_WORKSPACES:
        os.environ[CUBLAS_WORKSPACE] = REPEATABLE_WORKSPACES[0]
    # Deterministic mode would write NaN to every new tensor, to show reads of what nobody wrote: on
    # a GPU, one more kernel for each of some 900 tensors in a training step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    if compiles:
        torch.use_deterministic_algorithms(deterministic)
    else:  # The same setting, without the seconds it takes to import the compiler.
        torch.set_deterministic_debug_mode("error" if deterministic else "default")


def choose_device(name: str) -> torch.device:
    """Return the device that `--device` names; `auto` is the first GPU, or the CPU without one.

    Raises:
        InputError: the name is unknown, or PyTorch does not find that GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", name, re.ASCII):
        raise InputError(f"--device is {name!a:.40}, expected auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device is {name} but PyTorch finds no CUDA GPU; pass --device cpu")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"--device is {name} but there are {count} GPUs, counted from 0")
    return device


def build_model(
    args: argparse.Namespace, device: torch.device, *, move_heads: bool = False
) -> tuple[LoRAModel, int]:
    """Build the network that the flags describe, with base weights and adapter loaded.

    Args:
        move_heads: if the adapter was trained on other classes, take over the heads of the classes
            that have the same name.

    Returns:
        The network on `device`, and the side of its logits, S/4 or S/2.

    Raises:
        InputError: a checkpoint is missing or does not fit.
    """
    state, settings = read_adapter(args.lora_ckpt) if args.lora_ckpt else ({}, {})
    needs_base = args.ckpt != SCRATCH and not holds_every_weight(state)
    # A script written against the original does not have these flags.
    decoder = DecoderSpec(getattr(args, "decoder_depth", 2), getattr(args, "logits", 1))
    sam, image_embedding_size = sam_model_registry[args.vit_name](
        image_size=args.img_size,
        num_classes=args.num_classes,
        checkpoint=base_checkpoint(args) if needs_base else None,
        pixel_mean=[0, 0, 0],
        pixel_std=[1, 1, 1],
        keep_mask_heads=False if getattr(args, "fresh_heads", False) else None,
        decoder=decoder,
    )
    choices = lora_choices(args)
    variant = load_variant(args.module, choices)
    model = as_lora_model(variant(sam, args.rank, **choices), args.rank)
    decoder.require_in(model.sam, args.module)
    model.set_form(UpdateForm.from_flags(args))
    if args.ckpt == SCRATCH or holds_every_weight(state):
        model.train_all_weights()
    model.require_trained_is_saved()
    if args.lora_ckpt:
        classes = None
        if move_heads:
            trained = _trained_classes(args.lora_ckpt, state, settings, args.num_classes)
            wanted = class_names(args)
            classes = (trained, wanted) if trained and trained != wanted else None
        model.load_lora_parameters(args.lora_ckpt, classes)
        warn_of_changed_code(args, settings)
    train_only(model, getattr(args, "train", PUBLISHED_TRAIN))
    model.input_slices = getattr(args, "input_slices", 1)
    # Training sets the flag, other programs have none.
    recorded = recorded_prompt_prob(settings, args.lora_ckpt)
    model.prompt_prob = getattr(args, "prompt_prob", recorded)
    return model.to(device), 4 * decoder.logits * image_embedding_size


def _trained_classes(
    adapter: str, state: dict[str, torch.Tensor], settings: dict[str, Any], wanted: int
) -> list[str] | None:
    """Return the class names of an adapter; None if it has no names and the number fits as it is.

    Raises:
        InputError: it has no names, and neither Synapse's nor the wanted number of classes.
    """
    count = class_count(state, settings)
    names = trained_classes(state, settings)
    if names is None and count == SYNAPSE.num_classes:  # a published adapter
        return list(SYNAPSE.class_names)
    if names is None and count != wanted:
        raise InputError(
            f"{adapter} has {count} classes without names but the data have {wanted} classes, so "
            "they cannot be matched; pass an adapter that was trained here, or data of its classes"
        )
    return names


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside `torch.compile` or a parallel wrapper."""
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return unwrap(inner)
    return model


def environment(device: torch.device | None = None) -> dict[str, str | None]:
    """Describe where a program runs: versions, commit, hardware, command line.

    Args:
        device: the device in use; None: the current GPU if there is one.
    """
    on_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("numpy", "scipy", "h5py", "SimpleITK", "nibabel")},
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "commit": _commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def _commit() -> str | None:
    """Return the commit of the source code; None: no repository tracks it.

    Installed by pip, it may lie below the repository of another project.
    """
    git = partial(
        subprocess.check_output, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True
    )
    try:
        git(["git", "ls-files", "--error-unmatch", "utils.py"])
        return git(["git", "describe", "--always", "--dirty"]).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    """Return the version of a package; None: it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def test_single_volume(
    image: torch.Tensor | np.ndarray,
    label: torch.Tensor | np.ndarray,
    net: nn.Module,
    classes: int,
    multimask_output: bool = True,
    patch_size: tuple[int, int] = (256, 256),
    input_size: tuple[int, int] = (224, 224),
    test_save_path: str | Path | None = None,
    case: str | None = None,
    z_spacing: float = 1,
) -> list[tuple[float, float]]:
    """Segment and score one volume with the original's interface; `test.py` does more.

    Args:
        image, label: (1, D, H, W) or (D, H, W), or one slice as (1, H, W) or (H, W); an image in
            colour has 3 before H. As in the original, a first axis of 1 is a batch of one.
        classes: foreground classes.
        multimask_output: kept for callers; all classes are always predicted.
        patch_size: (rows, columns) of the network's input.
        input_size: (rows, columns) of the training slices. Slices of a volume are resized to it
            first. One slice is resized to `patch_size` at once, as in the original.
        test_save_path: folder for `<case>_{pred,img,gt}.nii.gz`.
        z_spacing: mm between slices in those files; in the plane it is 1.

    Returns:
        (DSC, HD95 in voxels) of the classes 1…classes, by the original's rule for empty masks. The
        distances of one slice are those in its plane; in a volume of one slice every voxel of an
        organ is surface.
    """
    del multimask_output
    if test_save_path is not None:
        require_scan_packages()
    image, label = (np.asarray(torch.as_tensor(x).cpu()) for x in (image, label))
    image, label = (x[0] if len(x) == 1 else x for x in (image, label))
    is_slice = label.ndim == 2
    input_slices = getattr(unwrap(net), "input_slices", 1)  # as `build_model` noted it
    refuse_pictures([case or "a slice"] if is_slice else [], input_slices)
    net.eval()
    prediction = predict_volume(
        net,
        network_slices(image[None] if is_slice else image, input_slices, case or "the volume"),
        input_size=tuple(patch_size if is_slice else input_size),
        image_size=tuple(patch_size),
    )
    prediction = prediction[0] if is_slice else prediction
    if test_save_path is not None:
        from datasets.scans.volumes import write_volume

        geometry = replace(Geometry.unknown(), spacing=(1.0, 1.0, float(z_spacing)))
        for suffix, array in (
            ("pred", prediction),
            ("img", image.astype(np.float32)),
            ("gt", label.astype(np.uint8)),
        ):
            volume = array[None] if is_slice else array
            write_volume(Path(test_save_path) / f"{case}_{suffix}.nii.gz", volume, geometry)
    return [
        calculate_metric_percase(prediction == index, label == index)
        for index in range(1, classes + 1)
    ]
