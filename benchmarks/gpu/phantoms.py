"""A network trained on phantoms: its accuracy in fp32 and bf16, and the seconds of a volume."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from benchmarks import scenes
from benchmarks.plain import plain_copy, plain_prediction
from benchmarks.timing import timed, wait
from config.settings import complete
from datasets.registry import SYNAPSE
from distributed.workers import in_processes
from evaluation.metrics import class_dsc, confusion
from evaluation.predict_volume import predict_volume
from lora import LoRAModel
from preprocess.phantom_volume import make_phantom
from trainer import StepOptions, freeze_unreached, learning_rate, make_optimizer, training_step
from training.batches import augmented_batch
from training.losses import SegmentationLoss
from training.optimizers import parameters_of
from training.recording import RecordedGradients

from .rows import Row, Setting, at_least, at_most
from .training import CLASSES, Case, Way

MOST_POINTS = 0.1  # of DSC %, between fp32 and bf16
LEAST_DSC = 70  # %, so that the comparison is about a network that finds organs
LEAST_EQUAL = 99.9  # % of the voxels, ours and the original's loop
PEAK_LR = 6e-4


@dataclass(frozen=True)
class Sizes:
    """How many phantoms of what size, and how long the training is."""

    train: int = 8  # phantoms
    test: int = 4
    size: int = 160  # rows and columns
    slices: int = 32
    image_size: int = 224
    batch: int = 24
    steps: int = 600
    timed_size: int = 512  # rows and columns of the volume that is timed
    timed_slices: int = 30  # whose last batch is not full


SMALL = Sizes(1, 1, 32, 4, 64, 2, 2, 32, 2)
Volumes = Sequence[tuple[np.ndarray, np.ndarray]]  # images and labels, (D, H, W)


def phantoms(setting: Setting) -> Iterator[Row]:
    """Train vit_tiny on phantoms, compare fp32 and bf16, and time a volume."""
    sizes = SMALL if setting.small else Sizes()
    volumes = made(sizes)
    seen, unseen = volumes[: sizes.train], volumes[sizes.train :]
    models = {}
    for precision in ("fp32", "bf16"):
        way = Way(precision)
        way.choose()
        began = time.perf_counter()
        models[precision] = trained(seen, sizes, way, setting.device)
        seconds = time.perf_counter() - began
        yield Row(f"training vit_tiny on {sizes.train} phantoms, {precision}", seconds, "s")
    yield from dsc_rows(models, unseen, sizes, setting)
    yield loop_row(models["fp32"], unseen[0][0], sizes, setting)
    yield from time_rows(sizes, setting)


def made(sizes: Sizes) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return phantoms as preprocess prepares them, each made by a process of its own."""
    make = partial(make_phantom, size=sizes.size, slices=sizes.slices)
    seeds = [(1, case) for case in range(sizes.train + sizes.test)]
    workers = min(os.cpu_count() or 1, len(seeds))
    with contextlib.closing(in_processes(make, seeds, workers)) as finished:
        found = dict(finished)
    return [scenes.prepared(found[index]) for index in range(len(seeds))]


def trained(volumes: Volumes, sizes: Sizes, way: Way, device: torch.device) -> LoRAModel:
    """Train every weight of vit_tiny on the slices of volumes, without augmentation."""
    model = scenes.network("vit_tiny", sizes.image_size).train().to(device)
    model.train_all_weights()
    freeze_unreached(model)
    images, labels = (
        torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*volumes, strict=True)
    )
    args = complete(
        argparse.Namespace(root_path="phantoms", img_size=sizes.image_size, augment="none")
    )
    criterion = SegmentationLoss(CLASSES, 0.8)
    optimizer = make_optimizer(model, "adamw", PEAK_LR)
    # So small a network would wait for the program that launches its kernels.
    recorded = RecordedGradients(parameters_of(optimizer)) if device.type == "cuda" else None
    options = StepOptions(clip_grad=0.5, amp_dtype=way.amp_dtype, recorded=recorded)
    generator = torch.Generator().manual_seed(2)
    order = torch.randint(len(images), (sizes.steps, sizes.batch), generator=generator).to(device)
    for step, chosen in enumerate(order):
        raw = {"image": images[chosen], "label": labels[chosen], "index": range(sizes.batch)}
        batch = augmented_batch(raw, 0, args, sizes.image_size // 4, device)
        lr = learning_rate(
            step,
            base_lr=PEAK_LR,
            warmup=sizes.steps // 6,
            max_iterations=sizes.steps,
            exponent=0.9,
        )
        training_step(model, batch, criterion, optimizer, lr, options)
    wait(device)
    return model.eval()


def predicted(model: LoRAModel, image: np.ndarray, way: Way, sizes: Sizes) -> np.ndarray:
    """Segment a volume as `test.py` does, in the precision of the way."""
    way.choose()
    device = next(model.parameters()).device
    with torch.autocast(device.type, way.amp_dtype, enabled=way.amp_dtype is not None):
        return predict_volume(
            model,
            image,
            input_size=(sizes.size, sizes.size),
            image_size=(sizes.image_size, sizes.image_size),
        )


def dsc(model: LoRAModel, volumes: Volumes, way: Way, sizes: Sizes) -> np.ndarray:  # (N,) %
    """Return the DSC of each organ in all voxels of the volumes; NaN for an organ in neither."""
    counts = sum(
        confusion(predicted(model, image, way, sizes), label, scenes.NUM_CLASSES)
        for image, label in volumes
    )
    return 100 * np.array(class_dsc(counts), dtype=float)


def dsc_rows(
    models: dict[str, LoRAModel], volumes: Volumes, sizes: Sizes, setting: Setting
) -> Iterator[Row]:
    """Compare the DSC of the same weights in fp32 and bf16, and of weights trained in bf16."""
    full, half = (dsc(models["fp32"], volumes, Way(p), sizes) for p in ("fp32", "bf16"))
    mean = float(np.nanmean(full))
    yield bounded(at_least("mean DSC on other phantoms, fp32", mean, LEAST_DSC, "%"), setting)
    for name, exact, rounded in zip(SYNAPSE.class_names, full, half, strict=True):
        note = f"{exact:.2f} and {rounded:.2f} %"
        what = f"DSC of {name}: fp32 and bf16 of the same weights differ by"
        row = at_most(what, abs(exact - rounded), MOST_POINTS, "points", note)
        yield bounded(row, setting)
    other = float(np.nanmean(dsc(models["bf16"], volumes, Way("bf16"), sizes)))
    note = f"{other - mean:+.2f} points; another run of the same recipe differs too"
    yield Row("mean DSC, trained and tested in bf16", other, "%", note=note)


def bounded(row: Row, setting: Setting) -> Row:
    """Return the row, at small size as a figure: there the network has hardly been trained."""
    return replace(row, bound="", passed=None) if setting.small else row


def loop_row(model: LoRAModel, image: np.ndarray, sizes: Sizes, setting: Setting) -> Row:
    """Compare the labels of a volume with those of the original's loop."""
    ours = predicted(model, image, Way("fp32"), sizes)
    loop = plain_prediction(
        image, plain_copy(model), input_size=sizes.size, image_size=sizes.image_size
    )
    equal = 100 * float((ours == loop).mean())
    return at_least("voxels labelled as by the original's loop", equal, LEAST_EQUAL, "%")


def time_rows(sizes: Sizes, setting: Setting) -> Iterator[Row]:
    """Time a volume of random content with the large network against the original's loop."""
    case, device = Case.of(setting), setting.device
    shape = (sizes.timed_slices, sizes.timed_size, sizes.timed_size)
    volume = np.random.default_rng(0).random(shape, dtype=np.float32)
    model = case.network(device).eval()
    slow = plain_copy(model)
    model.merge()
    sizes = replace(sizes, size=224, image_size=case.image_size)
    what = f"a volume of {'×'.join(map(str, shape))}, {case.vit_name}, {case.image_size} px"
    seconds = {}
    for precision in ("fp32", "bf16"):
        run = partial(predicted, model, volume, Way(precision), sizes)
        run()  # to warm up
        seconds[precision] = min(timed(run, device) for _ in range(1 if setting.small else 3))
    Way("fp32").choose()
    loop = partial(plain_prediction, net=slow, input_size=224, image_size=case.image_size)
    loop(volume[:1])  # to warm up
    original = timed(lambda: loop(volume), device)
    left_out = "resizing and network alone: reading, scoring and writing are left out"
    yield Row(f"{what}: the original's loop, fp32", original, "s", note=left_out)
    for precision, found in seconds.items():
        note = f"{original / found:.3g} times as fast as the loop; {left_out}"
        yield Row(f"{what}: ours, {precision}", found, "s", note=note)
