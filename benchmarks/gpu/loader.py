"""Whether reading slices from files keeps up with a training step."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks import scenes
from benchmarks.timing import timed
from config.settings import complete
from datasets.dataset_synapse import Synapse_dataset
from training.batches import augmented_batch, loader_workers, make_loader, read_batches

from .rows import Row, Setting, at_least
from .training import CLASSES, Case, Way

SIZE = 224  # of a training slice
FILES = 96
DEFAULT_WORKERS = 4  # of `make_loader` on a GPU
WORKERS = (DEFAULT_WORKERS, 8, 16)


def loader(setting: Setting) -> Iterator[Row]:
    """Compare the loader with 4, 8 and 16 processes with training from memory."""
    case, device = Case.of(setting), setting.device
    folder = scenes.scratch_folder()
    dataset = write_dataset(folder, count=case.batch * (3 if setting.small else 40))
    args = recipe(folder, case, DEFAULT_WORKERS)
    train = training(case, args, device)
    with reading(dataset, args, device) as files:
        train(read_batches(files))  # to warm up: every rotation is prepared once
        kept = next(read_batches(files))
    in_memory = train([kept] * len(files))
    need = len(dataset) / in_memory
    yield Row("training from memory, bf16, with augmentation", need, "images/s")
    for workers in (DEFAULT_WORKERS,) if setting.small else WORKERS:
        with reading(dataset, recipe(folder, case, workers), device) as files:
            for _ in read_batches(files):  # starts the processes
                pass
            found = len(dataset) / timed(lambda files=files: list(read_batches(files)))
            from_files = train(read_batches(files))
        what = f"loader alone, {workers} processes"
        if workers == DEFAULT_WORKERS and not setting.small:
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


def write_dataset(folder: Path, count: int) -> Synapse_dataset:
    """Write some slices of random content, and return a data set that names each many times."""
    rng = np.random.default_rng(0)
    names = [f"case0005_slice{index:03d}" for index in range(FILES)]
    for part in ("train_npz", "lists"):
        (folder / part).mkdir()
    for name in names:
        np.savez(
            folder / "train_npz" / f"{name}.npz",
            image=rng.random((SIZE, SIZE), dtype=np.float32),
            label=rng.integers(0, CLASSES, (SIZE, SIZE)).astype(np.float32),
        )
    (folder / "lists" / "train.txt").write_text("".join(f"{name}\n" for name in names))
    dataset = Synapse_dataset(folder, None, "train")
    return dataset.subset([index % FILES for index in range(count)])


@contextlib.contextmanager
def reading(
    dataset: Synapse_dataset, args: argparse.Namespace, device: torch.device
) -> Iterator[DataLoader]:
    """Return the loader of training, and end its processes on leaving."""
    files = make_loader(dataset, args, device)
    with loader_workers(files):
        yield files


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
            for slices in batches:
                batch = augmented_batch(slices, 0, args, case.image_size // 4, device)
                update(batch)

        return timed(steps, device)

    return train
