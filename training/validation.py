"""Validation during training: held-out cases, the best adapter, organs that are not learned.

Whole cases are held out, because neighbouring slices of a scan are nearly the same picture.
"""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from common.errors import InputError
from config.data_spec import record_training_data
from datasets.dataset_synapse import Synapse_dataset
from datasets.groups import groups_of
from distributed.ranks import ALONE, Ranks
from evaluation.metrics import class_dsc, confusion, mean
from evaluation.predict_volume import predict_volume
from training.batches import seen_slices
from training.checkpoint import Progress
from training.run_log import RunLog

# A DSC below this value counts as 0.
ZERO = 1e-3
# Number of validations in a row with a DSC of 0 that leads to a warning.
AT_ZERO = 3


@dataclass(frozen=True)
class Validation:
    """The result of a validation."""

    # For each class, the mean DSC over the cases that define it; None: no case does.
    dsc: tuple[float | None, ...]
    # For each case, the DSC of each class.
    cases: dict[str, tuple[float | None, ...]]

    @property
    def score(self) -> float:
        """The score that decides about `best.pth`: the mean DSC over the classes."""
        return mean(self.dsc) or 0.0


def training_data(
    args: argparse.Namespace, dataset: Synapse_dataset | None
) -> tuple[Synapse_dataset, dict[str, Synapse_dataset]]:
    """Return the slices to train on, and the slices of every case that is held out.

    Args:
        dataset: checked training slices; None: read and check those of `args.root_path`, as a
            script written against the original asks for.
    """
    facts = None
    if dataset is None:
        dataset = Synapse_dataset(
            args.root_path, args.list_dir, "train", num_classes=args.num_classes, lenient=True
        )
        facts = dataset.check()
    dataset = seen_slices(dataset, args)  # A script may pass slices without their neighbours.
    left, held_out = dataset, {}
    if args.val_every:
        left, held_out = hold_out(dataset, args.val_cases, args.seed)
        logging.info("held out for validation: %s", ", ".join(held_out))
    if facts is not None:
        record_training_data(args, facts, left)
    return left, held_out


def hold_out(
    dataset: Synapse_dataset, count: int | None, seed: int
) -> tuple[Synapse_dataset, dict[str, Synapse_dataset]]:
    """Split off cases: return the slices to train on, and those of each held-out case.

    A case is a group of `datasets.groups`: a scan, or all scans of a patient.

    Args:
        count: number of cases to hold out; None: a sixth, at least one.

    Raises:
        InputError: no case would be left to train on.
    """
    names = dataset.sample_list
    groups = groups_of(names, dataset.data_dir, slices=True).groups
    cases: dict[str, list[int]] = defaultdict(list)  # the slices of each case, ascending by name
    for index in sorted(range(len(names)), key=lambda i: names[i]):
        cases[groups[names[index]]].append(index)
    count = count or max(1, round(len(cases) / 6))
    if count >= len(cases):
        raise InputError(
            f"--val_cases is {count} but {dataset.list_path} has slices of {len(cases)} "
            "case(s), named <case>_slice<number>; hold out fewer, or add cases"
        )
    chosen = np.random.default_rng([seed, 2]).permutation(sorted(cases))[:count]
    held_out = {name: dataset.subset(cases[name]) for name in sorted(chosen.tolist())}
    left = [i for i, name in enumerate(names) if groups[name] not in held_out]
    return dataset.subset(left), held_out


def validate(
    model: nn.Module,
    cases: dict[str, Synapse_dataset],
    *,
    num_classes: int,
    img_size: int,
    amp_dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    between_cases: Callable[[], object] = lambda: None,
    ranks: Ranks = ALONE,
) -> Validation:
    """Segment and score the held-out cases at the size of their slices; the ranks share the cases.

    Args:
        batch_size: slices per batch; None: those of `predict_volume`.
        between_cases: called before each case; may raise an error to stop.

    Returns:
        The results of all ranks, the same on every rank.
    """
    names = list(cases)[ranks.rank :: ranks.count]
    model.eval()
    found = {}
    # The sizes of validation's batches are not worth compiling for (`--compile`).
    with torch.compiler.set_stance("force_eager"):
        for name in names:
            between_cases()
            found[name] = dsc_of_case(
                model, cases[name], num_classes, img_size, amp_dtype, batch_size
            )
    model.train()
    every = {name: scores for part in ranks.gather(found) for name, scores in part.items()}
    scores = {name: every[name] for name in cases}
    return Validation(tuple(mean(column) for column in zip(*scores.values(), strict=True)), scores)


def dsc_of_case(
    model: nn.Module,
    slices: Synapse_dataset,
    num_classes: int,
    img_size: int,
    amp_dtype: torch.dtype | None,
    batch_size: int | None,
) -> tuple[float | None, ...]:
    """Return the DSC of each class in one case, by the rule of `evaluation.metrics`."""
    counts = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None)
    for start in range(0, len(slices), 64):  # as many as fit easily, whatever the case's length
        samples = [slices[i] for i in range(start, min(start + 64, len(slices)))]
        for shape in dict.fromkeys(sample["label"].shape for sample in samples):
            group = [sample for sample in samples if sample["label"].shape == shape]
            with autocast:
                prediction = predict_volume(
                    model,
                    np.stack([sample["image"] for sample in group]),
                    input_size=shape,
                    image_size=(img_size, img_size),
                    batch_size=batch_size,
                )
            label = np.stack([sample["label"] for sample in group])
            counts += confusion(prediction, label, num_classes)
    return class_dsc(counts)


def note_validation(
    run: Progress, found: Validation, epoch: int, names: Sequence[str], log: RunLog
) -> bool:
    """Log a validation, warn of organs that are not learned, and return whether it is the best.

    Args:
        run: the position; its best score and its counters are updated.
    """
    known = {n: v for n, v in zip(names, found.dsc, strict=True) if v is not None}
    scalars = {f"val/{name.replace(' ', '_')}": value for name, value in known.items()}
    log.scalars(scalars | {"val/score": found.score}, run.step)
    log.write({"epoch": epoch, "score": found.score, "dsc": found.dsc, "cases": found.cases})
    listed = ", ".join(f"{name} {100 * value:.1f}" for name, value in known.items())
    logging.info("validation: mean DSC %.2f %% (%s)", 100 * found.score, listed)

    run.at_zero = {
        name: run.at_zero.get(name, 0) + 1
        for name, value in zip(names, found.dsc, strict=True)
        if value is not None and value < ZERO
    }
    dead = [name for name, times in run.at_zero.items() if times >= AT_ZERO]
    if dead and log.folder is not None:
        logging.warning(
            "DSC has been 0 in %d validations or more: %s. These organs are missed, or found where "
            "there are none. A small organ rarely recovers from that: lower --base_lr, or train "
            "longer with --clip_grad",
            AT_ZERO,
            ", ".join(dead),
        )
    if run.best_score is not None and found.score <= run.best_score:
        run.not_better += 1
        return False
    run.best_score, run.best_epoch, run.not_better = found.score, epoch, 0
    return True
