"""One page of facts about the data and the run, before it starts: `python train.py --check`."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import InputError, first_few
from config.settings import class_names
from datasets.dataset_synapse import Synapse_dataset
from datasets.digests import leak_warnings
from datasets.groups import groups_of
from datasets.names import case_of
from datasets.prepared_files import SampleFacts
from lora.model import LoRAModel
from training.memory import (
    FITS_AGAIN,
    free_memory,
    memory_of_step,
    remedies,
    slices_of_process,
)

SHOWN_SHAPES = 6
# Intensities of a [0, 1] image after a cubic zoom.
EXPECTED_RANGE = (-0.3, 1.3)


@dataclass(frozen=True)
class Page:
    """What was found in the data: lines to print, warnings, and the same as plain values."""

    lines: list[str]
    warnings: list[str]
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        warnings = [f"warning: {text}" for text in self.warnings] or ["nothing odd was found"]
        return "\n".join([*self.lines, "", *warnings])


def check_page(
    train: Sequence[SampleFacts],
    test: Sequence[SampleFacts],
    class_names: Sequence[str],
    memory: dict[str, float],
    folder: Path | None = None,
) -> Page:
    """Sum up the facts about all samples.

    Args:
        train, test: facts about the training slices and the test volumes; test may be empty.
        class_names: names of the classes 1….
        memory: GiB that training needs, for each purpose; empty: unknown.
        folder: holds the data, and the record of their groups; None: only the names tell.
    """
    groups = groups_of([sample.name for sample in train], folder, slices=True)
    cases = set(groups.groups.values())
    lines = [f"training: {len(train)} slices of {len(cases)} cases", *_sizes(train)]
    if test:
        lines += [f"test: {len(test)} volumes", *_sizes(test)]
    else:
        lines.append("test: no volumes beside the training data")
    lines += ["", *_class_table(train, test, class_names), ""]
    parts = ", ".join(f"{name} {value:.2f}" for name, value in memory.items())
    told = f"{sum(memory.values()):.2f} GiB ({parts})" if memory else "unknown for this network"
    lines.append(f"memory of one process, estimated: {told}")
    warnings = [
        *_leaks(train, test, folder),
        *(f"{doubt}; --val_every holds out whole scans" for doubt in groups.doubts),
        *_doubles(train, "training slices"),
        *_doubles(test, "test volumes"),
        *_classes(train, class_names),
        *_intensities([*train, *test]),
    ]
    facts = {
        "training_slices": len(train),
        "training_cases": sorted(cases),
        "test_cases": [sample.name for sample in test],
        "voxels": {"train": _voxels(train), "test": _voxels(test)},
        "memory_gib": memory,
        "warnings": warnings,
    }
    return Page(lines, warnings, facts)


def _sizes(samples: Sequence[SampleFacts]) -> list[str]:
    shapes = Counter("×".join(map(str, sample.shape)) for sample in samples)
    names = [f"{shape} ({count})" for shape, count in shapes.most_common()]
    low, high = min(sample.low for sample in samples), max(sample.high for sample in samples)
    return [
        f"  shapes: {first_few(names, SHOWN_SHAPES)}",
        f"  intensities: {low:.3f} … {high:.3f}",
    ]


def _class_table(
    train: Sequence[SampleFacts], test: Sequence[SampleFacts], names: Sequence[str]
) -> list[str]:
    sums, test_sums = _voxels(train), _voxels(test)
    slices = [sum(sample.voxels[index] > 0 for sample in train) for index in range(len(names) + 1)]
    width = max(len(name) for name in ["background", *names])
    lines = [f"{'class':>5} {'':{width}} {'pixels':>12} {'share':>8} {'slices':>7} {'test':>12}"]
    for index, name in enumerate(["background", *names]):
        share = f"{100 * sums[index] / sum(sums):.3f}%"
        tested = f"{test_sums[index]:,}" if test else "-"
        lines.append(
            f"{index:>5} {name:{width}} {sums[index]:>12,} {share:>8} {slices[index]:>7} "
            f"{tested:>12}"
        )
    return lines


def _voxels(samples: Sequence[SampleFacts]) -> list[int]:
    return [sum(column) for column in zip(*(sample.voxels for sample in samples), strict=True)]


def _leaks(
    train: Sequence[SampleFacts], test: Sequence[SampleFacts], folder: Path | None
) -> list[str]:
    """Return warnings about cases, patients and slices that are both trained on and tested."""
    trained, tested = ({case_of(sample.name) for sample in part} for part in (train, test))
    both = sorted(trained & tested)
    found = [f"{len(both)} case(s) are trained on and tested: {first_few(both)}"] if both else []
    groups = groups_of(sorted(trained | tested), folder, slices=False).groups
    shared = {groups[case] for case in trained} & {groups[case] for case in tested - trained}
    if shared:
        found.append(
            f"{len(shared)} scans or patients are trained on and tested with other slices or "
            f"scans: {first_few(sorted(shared))}"
        )
    parts = ([(case_of(s.name), s.slice_digests) for s in part] for part in (train, test))
    return found + leak_warnings(*parts)


def _doubles(samples: Sequence[SampleFacts], what: str) -> list[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for sample in samples:
        if (
            sample.low < sample.high
        ):  # constant slices, above and below the body, are equal by nature
            groups[sample.digest].append(sample.name)
    doubled = [" = ".join(names) for names in groups.values() if len(names) > 1]
    return [f"{len(doubled)} equal {what}: {first_few(doubled)}"] if doubled else []


def _classes(train: Sequence[SampleFacts], names: Sequence[str]) -> list[str]:
    sums = _voxels(train)
    absent = [name for index, name in enumerate(names, start=1) if not sums[index]]
    found = [f"no training slice has {first_few(absent)}: never learned"] if absent else []
    if not sum(sums[1:]):
        found = ["the labels are empty: there is nothing to learn"]
    return found


def _intensities(samples: Sequence[SampleFacts]) -> list[str]:
    low, high = EXPECTED_RANGE
    odd = [sample.name for sample in samples if sample.low < low or sample.high > high]
    constant = [sample.name for sample in samples if sample.low == sample.high]
    found = []
    if odd:
        found.append(f"{len(odd)} images lie far outside [0, 1]: {first_few(odd)}")
    if constant:
        found.append(f"{len(constant)} images are constant: {first_few(constant)}")
    return found


def count_parameters(model: LoRAModel) -> dict[str, int]:
    """Return how many parameters the network has, and how many of them get a gradient."""
    parameters = list(model.parameters())
    return {
        "all": sum(parameter.numel() for parameter in parameters),
        "train": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    }


def describe(
    args: argparse.Namespace,
    facts: list[SampleFacts],
    model: LoRAModel,
    processes: int,
    memory: dict[str, float],
) -> Page:
    """Return the page about the training data, the test volumes beside them, and the memory.

    Args:
        processes: number of those that will train, each with `args.at_once` slices at once.
        memory: what `choose_at_once` returned.
    """
    tested: list[SampleFacts] = []
    faults: list[str] = []
    root = Path(args.root_path)
    if (root / "test_vol_h5").is_dir() or (root / "test.list").is_file():
        try:
            test = Synapse_dataset(
                args.root_path, args.list_dir, "test_vol", num_classes=args.num_classes
            )
            # Volumes are large, so few are read at once.
            tested = test.check(workers=2)
        except InputError as error:
            if args.check:
                raise
            # Training does not need the test data.
            faults.append(f"the test data cannot be used: {error}")
    share, device = slices_of_process(args, processes), next(model.parameters()).device
    memory = memory or memory_of_step(args, model, share, args.at_once)
    free = free_memory(device) if device.type == "cuda" else None
    page = check_page(facts, tested, class_names(args), memory, folder=Path(args.root_path))
    page.facts["parameters"] = count_parameters(model)
    page.lines.append(
        f"each of {processes} process(es) computes {share} slices of an update, {args.at_once} at "
        f"once, on {'a CPU' if free is None else f'a GPU with {free:.1f} GiB free'}"
    )
    if free is not None and (needed := sum(memory.values())) > FITS_AGAIN * free:
        page.warnings.append(
            f"the GPU has {free:.1f} GiB free, {needed:.1f} are estimated to be needed; "
            f"{remedies(args)}"
        )
    page.warnings.extend(faults)
    return page
