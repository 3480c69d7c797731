"""Whether reading slices from files keeps up with a training step."""

from __future__ import annotations

import argparse
import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks import scenes
from benchmarks.timing import timed
from config.settings import complete
from datasets.dataset_synapse import Synapse_dataset
from training.batches import (
    augmented_batch,
    default_workers,
    loader_workers,
    make_loader,
    read_batches,
)

from . import files
from .rows import Row, Setting, at_least
from .training import Case, Way

SIZE = 224  # of a training slice
FILES = 96
WORKERS = (4, 8, 16)


def loader(setting: Setting) -> Iterator[Row]:
    """Compare the loader with 4, 8 and 16 processes, and as many as is usual, with training."""
    case, device = Case.of(setting), setting.device
    folder = scenes.scratch_folder()
    written = Synapse_dataset(files.write_slices(folder / "data", FILES, SIZE), None, "train")
    count = case.batch * (3 if setting.small else 30)
    dataset = written.subset([index % FILES for index in range(count)])
    usual = WORKERS[0] if setting.small else default_workers(device)
    args = recipe(folder, case, usual)
    train = training(case, args, device)
    with reading(dataset, args, device) as slices:
        train(read_batches(slices))  # to warm up: every rotation is prepared once
        kept = next(read_batches(slices))
    in_memory = train([kept] * len(slices))
    need = len(dataset) / in_memory
    yield Row("training from memory, bf16, with augmentation", need, "images/s")
    for workers in (usual,) if setting.small else sorted({usual, *WORKERS}):
        with reading(dataset, recipe(folder, case, workers), device) as slices:
            for _ in read_batches(slices):  # starts the processes
                pass
            found = len(dataset) / timed(lambda slices=slices: deque(read_batches(slices), 0))
            from_files = train(read_batches(slices))
        what = f"loader alone, {workers} processes"
        if workers == usual and not setting.small:
            yield at_least(what, found, need, "images/s", "the default; training needs the bound")
        else:
            yield Row(what, found, "images/s")
        idle = 100 * max(0.0, 1 - in_memory / from_files)
        yield Row(f"time that training waits for {workers} processes", idle, "%")


def recipe(folder: Path, case: Case, workers: int) -> argparse.Namespace:
    """Return the flags of a training on one GPU."""
    return complete(
        argparse.Namespace(
            root_path=str(folder),
            img_size=case.image_size,
            batch_size=case.batch,
            n_gpu=1,
            num_workers=workers,
        )
    )


@contextlib.contextmanager
def reading(
    dataset: Synapse_dataset, args: argparse.Namespace, device: torch.device
) -> Iterator[DataLoader]:
    """Return the loader of training, and end its processes on leaving."""
    slices = make_loader(dataset, args, device)
    with loader_workers(slices):
        yield slices


def training(
    case: Case, args: argparse.Namespace, device: torch.device
) -> Callable[[Iterable[dict[str, Any]]], float]:
    """Return a function that trains on batches of raw slices and returns the seconds."""
    network = case.network(device)
    way = Way("bf16")
    way.choose()
    update = way.updates(network, case.batch)

    def train(batches: Iterable[dict[str, Any]]) -> float:
        def steps() -> None:
            for raw in batches:
                batch = augmented_batch(raw, 0, args, case.image_size // 4, device)
                update(batch)

        return timed(steps, device)

    return train
