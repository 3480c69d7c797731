"""Training batches: their order, each rank's share of them, loading and augmentation."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import InputError
from config.recipe_flags import slices_of_update
from config.settings import dataset_spec
from datasets.augmentation import AUGMENTATIONS, keyed_rng, prepare_batch
from datasets.dataset_synapse import Synapse_dataset
from datasets.neighbours import BETWEEN_NEIGHBOURS, refuse_pictures
from datasets.sides import mirror_of
from distributed.ranks import ALONE, Ranks, ranks_here
from distributed.signals import ignore_in_worker
from training.prompts import DrawnPrompts

# A core reads some 130 slices of 512² a second from compressed files, and 340 from others. A fast
# GPU trains on up to 500.
MOST_WORKERS = 8


class EpochBatches(Sampler[list[int]]):
    """This rank's part of every global batch of an epoch.

    The order of the samples depends on (seed, epoch) alone. So an epoch can be entered at any step
    and shared by any number of ranks, and every sample still occurs once.

    Args:
        length: number of samples.
        global_batch: samples of a step on all ranks together; the last step of an epoch may have
            fewer.
    """

    def __init__(self, length: int, global_batch: int, seed: int, ranks: Ranks = ALONE) -> None:
        self.length = length
        self.global_batch = global_batch
        self.seed = seed
        self.ranks = ranks
        self.epoch = 0
        self.done = 0

    def enter(self, epoch: int, done: int) -> None:
        """Continue `epoch` after its first `done` steps."""
        self.epoch, self.done = epoch, done

    def step(self, epoch: int, number: int) -> list[int]:
        """Return the samples of one global batch, by their indices."""
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


def seen_slices(dataset: Synapse_dataset, args: argparse.Namespace) -> Synapse_dataset:
    """Return the data set whose images hold what the network sees, as `--input_slices` says.

    Raises:
        InputError: the data are pictures, or their names tell no neighbours.
    """
    if args.input_slices != BETWEEN_NEIGHBOURS:
        if getattr(dataset, "around", None) is not None:
            raise InputError(
                "the data set gives slices between their neighbours, but --input_slices is "
                f"{args.input_slices}; pass --input_slices {BETWEEN_NEIGHBOURS}"
            )
        return dataset
    if dataset_spec(args).is_pictures:
        refuse_pictures(dataset.sample_list, args.input_slices)
    return dataset.between_neighbours()


class Slices(Dataset):
    """Samples, read batch by batch. An error is returned, since a worker cannot raise it here."""

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
    """Stack slices of the same size into tensors (B, H, W); keep slices of mixed sizes as lists."""
    if isinstance(samples, InputError):
        return samples
    batch: dict[str, Any] = {
        key: [sample[key] for sample in samples] for key in ("image", "label", "index")
    }
    for key in ("image", "label"):
        arrays = [torch.from_numpy(array) for array in batch[key]]
        batch[key] = torch.stack(arrays) if len({a.shape for a in arrays}) == 1 else arrays
    return batch


def default_workers(device: torch.device) -> int:
    """Return the number of loader processes of a rank without --num_workers.

    On a CPU, reading a slice takes less time than sending it to a process. On a GPU, each rank has
    its share of the cores but one, which is for its own process, and at most `MOST_WORKERS`.
    """
    if device.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) // ranks_here()
    return min(max(1, cores - 1), MOST_WORKERS)


def make_loader(
    dataset: Synapse_dataset, args: argparse.Namespace, device: torch.device, ranks: Ranks = ALONE
) -> DataLoader:
    """Return a loader of raw slices; `loader.batch_sampler.enter` sets its position."""
    workers = default_workers(device) if args.num_workers is None else args.num_workers
    if args.augment == "anatomical":
        spec = dataset_spec(args)
        mirror = mirror_of(spec.orientation, spec.class_names)
        logging.info("--augment anatomical: %s", mirror.told)
    return DataLoader(
        Slices(dataset),
        batch_sampler=EpochBatches(len(dataset), slices_of_update(vars(args)), args.seed, ranks),
        collate_fn=collate_slices,
        num_workers=workers,
        worker_init_fn=ignore_in_worker,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        # The global generator must not depend on how often the loader starts.
        generator=torch.Generator(),
    )


def read_batches(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """Yield the batches of one epoch; raise an `InputError` if a slice cannot be read any more."""
    try:
        for slices in loader:
            if isinstance(slices, InputError):
                raise slices
            yield slices
    except (ConnectionError, EOFError):  # A process was killed while it handed over a batch.
        if not loader.num_workers:
            raise
        raise _killed_worker(loader) from None


def _killed_worker(loader: DataLoader) -> InputError:
    return InputError(
        "a loader process was killed, most often because memory ran out; go on by --resume "
        f"with a smaller --num_workers (now {loader.num_workers})"
    )


@contextlib.contextmanager
def loader_workers(loader: DataLoader) -> Iterator[None]:
    """End the loader's processes on leaving, and explain in a sentence if one was killed.

    The processes ignore signals, and would otherwise live as long as anything refers to the loader.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        if "Bus error" in str(error):  # A container has 64 MB of it unless told otherwise.
            raise InputError(
                "the shared memory /dev/shm, through which loader processes hand over slices, is "
                "full; in a container pass --shm-size 4g to docker run, or go on by --resume with "
                f"a smaller --num_workers (now {loader.num_workers}, 0 needs none)"
            ) from None
        raise _killed_worker(loader) from None
    else:  # After an error, `Interruption` has killed them.
        iterator, loader._iterator = loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()


def augmented_batch(
    slices: dict[str, Any],
    epoch: int,
    args: argparse.Namespace,
    low_res: int,
    device: torch.device,
) -> dict[str, Any]:
    """Copy raw slices to the device, augment and resize them there for the network and the loss.

    Args:
        slices: `image` and `label`, each (B, H, W) or a list of B slices, and `index`. Images in
            colour, and slices between their neighbours, have 3 before H.
        low_res: side s of the labels for the loss: that of the logits.

    Returns:
        `image` (B, 3, S, S) float32 and `low_res_label` (B, s, s) int64. With `--lora_dropout` also
        `seeds`, a list of B numbers for `LoRAModel.seed_dropout`, and with `--prompt_prob` also
        `drawn`, the `DrawnPrompts` of the B slices.
    """

    def to_device(arrays: torch.Tensor | list[torch.Tensor]) -> Any:
        if isinstance(arrays, torch.Tensor):
            return arrays.to(device, non_blocking=True)
        return [array.to(device, non_blocking=True) for array in arrays]

    generators = [keyed_rng(args.seed, epoch, index) for index in slices["index"]]
    draw = AUGMENTATIONS[args.augment]
    choices = [draw(generator, args.spec) for generator in generators]
    if not choices:  # There are fewer slices in this step than ranks.
        return {
            "image": torch.empty(0, 3, args.img_size, args.img_size, device=device),
            "low_res_label": torch.empty(0, low_res, low_res, device=device, dtype=torch.long),
        }
    batch = prepare_batch(
        to_device(slices["image"]),
        to_device(slices["label"]),
        choices,
        output_size=(args.img_size, args.img_size),
        low_res=(low_res, low_res),
    )
    if args.lora_dropout:  # drawn last, so that a slice is augmented as without dropout
        batch["seeds"] = [int(generator.integers(2**63)) for generator in generators]
    if args.prompt_prob:  # likewise
        batch["drawn"] = DrawnPrompts.draw(generators, args.prompt_prob, batch["low_res_label"])
    return batch
