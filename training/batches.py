"""Training batches: their order, each rank's share of them, loading and augmentation."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import InputError
from datasets.augmentation import Augmentation, draw_augmentation, keyed_rng, prepare_batch
from datasets.dataset_synapse import Synapse_dataset
from distributed.ranks import ALONE, Ranks
from distributed.signals import ignore_in_worker


class EpochBatches(Sampler[list[int]]):
    """This rank's part of every global batch of one epoch.

    The order is keyed by (seed, epoch): nothing else can change it, so that an epoch can be
    entered anywhere and shared out over any number of ranks without losing or doubling a sample.

    Args:
        length: samples.
        global_batch: samples of a step on all ranks together; an epoch's last may be smaller.
    """

    def __init__(self, length: int, global_batch: int, seed: int, ranks: Ranks = ALONE) -> None:
        self.length = length
        self.global_batch = global_batch
        self.seed = seed
        self.ranks = ranks
        self.epoch = 0
        self.done = 0

    def enter(self, epoch: int, done: int) -> None:
        """Go on with `epoch` after its first `done` steps."""
        self.epoch, self.done = epoch, done

    def step(self, epoch: int, number: int) -> list[int]:
        """The samples of one global batch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        start = number * self.global_batch
        return order[start : start + self.global_batch].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length).tolist()
        for start in range(self.done * self.global_batch, self.length, self.global_batch):
            batch = order[start : start + self.global_batch]
            yield batch[self.ranks.share(len(batch))]

    def __len__(self) -> int:
        return -(-self.length // self.global_batch)


class Slices(Dataset):
    """Samples by the batch; what is wrong with one is a value, which a worker can hand over."""

    def __init__(self, dataset: Synapse_dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]] | InputError:
        try:
            return [self.dataset[index] for index in indices]
        except InputError as error:
            return error


def collate_slices(samples: Sequence[dict[str, Any]] | InputError) -> dict[str, Any] | InputError:
    """Stack slices of one size into tensors (B, H, W); leave mixed sizes, or none, as lists."""
    if isinstance(samples, InputError):
        return samples
    batch: dict[str, Any] = {
        key: [sample[key] for sample in samples] for key in ("image", "label", "index")
    }
    for key in ("image", "label"):
        arrays = [torch.from_numpy(array) for array in batch[key]]
        batch[key] = torch.stack(arrays) if len({a.shape for a in arrays}) == 1 else arrays
    return batch


def make_loader(
    dataset: Synapse_dataset, args: argparse.Namespace, device: torch.device, ranks: Ranks = ALONE
) -> DataLoader:
    """Batches of raw slices; `loader.batch_sampler.enter` says from where."""
    workers = args.num_workers
    if workers is None:  # on a CPU a slice is read faster than a worker hands it over
        workers = 4 if device.type == "cuda" else 0
    return DataLoader(
        Slices(dataset),
        batch_sampler=EpochBatches(len(dataset), global_batch(args), args.seed, ranks),
        collate_fn=collate_slices,
        num_workers=workers,
        worker_init_fn=ignore_in_worker,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # its own: PyTorch's must not depend on how often it starts
    )


def read_batches(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The batches of one epoch; raises an `InputError` if a slice cannot be read any more."""
    for slices in loader:
        if isinstance(slices, InputError):
            raise slices
        yield slices


@contextlib.contextmanager
def watched_workers(loader: DataLoader) -> Iterator[None]:
    """Say in a sentence that a worker was killed, which PyTorch raises wherever the program is."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            "a loader process was killed, most often for want of memory; go on by --resume with a "
            f"smaller --num_workers (now {loader.num_workers})"
        ) from None


def global_batch(args: argparse.Namespace) -> int:
    """Slices of one update on all GPUs together."""
    return args.global_batch or args.batch_size * args.n_gpu


def augmented_batch(
    slices: dict[str, Any],
    epoch: int,
    args: argparse.Namespace,
    low_res: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Bring raw slices to the device and there to what the network and its loss take."""

    def to_device(arrays: torch.Tensor | list[torch.Tensor]) -> Any:
        if isinstance(arrays, torch.Tensor):
            return arrays.to(device, non_blocking=True)
        return [array.to(device, non_blocking=True) for array in arrays]

    choices = [
        Augmentation() if args.no_augment else draw_augmentation(keyed_rng(args.seed, epoch, index))
        for index in slices["index"]
    ]
    if not choices:  # fewer slices in this step than ranks
        return {
            "image": torch.empty(0, 3, args.img_size, args.img_size, device=device),
            "low_res_label": torch.empty(0, low_res, low_res, device=device, dtype=torch.long),
        }
    return prepare_batch(
        to_device(slices["image"]),
        to_device(slices["label"]),
        choices,
        output_size=(args.img_size, args.img_size),
        low_res=(low_res, low_res),
    )
