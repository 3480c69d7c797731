"""The description of the data: by the flags, the prepared folder, the adapter, or measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.errors import InputError, first_few, warn
from datasets.dataset_synapse import Synapse_dataset
from datasets.groups import cases_of
from datasets.intensity import NOT_RECORDED, choose_intensity
from datasets.names import case_of
from datasets.prepared_files import SampleFacts
from datasets.registry import SYNAPSE, DatasetSpec, get_dataset, stored_spec, undescribed
from datasets.trained_on import TrainedOn


def choose_spec(
    args: argparse.Namespace, trained_on: list[DatasetSpec], training: bool
) -> DatasetSpec:
    """Return the data set that is named, else the one of the data or of the adapter.

    Args:
        trained_on: the data sets that the run's configuration and the adapter record.

    Raises:
        InputError: the test data have other classes than the adapter, or were prepared in another
            way than the training data.
    """
    folder = getattr(args, "volume_path", None)
    if args.dataset is not None:
        return get_dataset(args.dataset)
    if training:
        return described_training_data(args, trained_on)
    data = stored_spec(folder) if folder else None
    if not trained_on:
        return _spec_of_silent_adapter(args, data)
    chosen = trained_on[0]
    if data is not None and data.class_names != chosen.class_names:
        raise InputError(
            f"{folder} holds the classes {', '.join(data.class_names)}, but {args.lora_ckpt} was "
            f"trained on {', '.join(chosen.class_names)}; pass data and an adapter of the same "
            "classes"
        )
    if data and None not in (data.modality, chosen.modality) and data.modality != chosen.modality:
        warn(f"{folder} is {data.modality}, but the adapter was trained on {chosen.modality}")
    differences = _preparation_differences(data, chosen) if data else []
    if differences:
        raise InputError(
            f"{folder} and the training data of {args.lora_ckpt} differ in "
            f"{', '.join(differences)}; prepare the test data as the training data were prepared, "
            "or pass an adapter that fits"
        )
    return chosen


def described_training_data(args: argparse.Namespace, others: Sequence[DatasetSpec]) -> DatasetSpec:
    """Return the description of the training data, else the first other one, else what is known."""
    known = (stored_spec(args.root_path) if args.root_path else None, *others)
    return next((spec for spec in known if spec is not None), None) or _undescribed_data(args)


def _spec_of_silent_adapter(args: argparse.Namespace, data: DatasetSpec | None) -> DatasetSpec:
    """Return the data set of an adapter that records none, as the original's adapters.

    Their training slices have the published size, unless the test data say another.
    """
    if data is not None and args.num_classes == data.num_classes:
        chosen = data  # The adapter has no class names, but the number of classes fits.
    elif _has_published_classes(args):
        chosen = SYNAPSE
    else:
        chosen = undescribed("unknown data", ["unknown"])
    if data is not None and data.class_names != chosen.class_names:
        raise InputError(
            f"{args.lora_ckpt} records no classes, so those of Synapse are expected, but the data "
            f"hold {', '.join(data.class_names)}; pass --num_classes {data.num_classes} if it was "
            "trained on these, or data and an adapter of the same classes"
        )
    chosen = replace(chosen, size=chosen.size or SYNAPSE.size)
    if chosen != SYNAPSE and getattr(args, "input_size", 0) is None:
        warn(
            f"{args.lora_ckpt} does not record the size of its training slices; {chosen.size} "
            "pixels are taken, as in the original: pass --input_size for another"
        )
    return chosen


def _undescribed_data(args: argparse.Namespace) -> DatasetSpec:
    """Return what is known of training slices without a description: the names of their cases.

    Slices of another number of classes are not the published ones, whatever their names are.
    """
    try:
        dataset = Synapse_dataset(args.root_path, args.list_dir, "train", num_classes=255)
    except (InputError, TypeError):  # Reading the data will explain it.
        return SYNAPSE
    folder = dataset.data_dir.resolve()
    name = folder.name if dataset.data_dir == Path(args.root_path) else folder.parent.name
    cases = map(case_of, dataset.sample_list) if _has_published_classes(args) else [name]
    return undescribed(name, cases)


def _has_published_classes(args: argparse.Namespace) -> bool:
    """Return whether the number of classes is Synapse's, or left open."""
    return args.num_classes in (None, SYNAPSE.num_classes)


def _preparation_differences(data: DatasetSpec, trained: DatasetSpec) -> list[str]:
    """List how the preparation of two data sets differs; a property that is None is unknown."""
    pairs = {
        "intensities": (str(data.intensity), str(trained.intensity)),
        "orientation": (data.orientation, trained.orientation),
        "colour channels": (data.channels, trained.channels),
        "channel": (data.channel, trained.channel),
    }
    return [
        f"{what} {here} and {there}"
        for what, (here, there) in pairs.items()
        if None not in (here, there) and here != there and str(NOT_RECORDED) not in (here, there)
    ]


def with_chosen_intensity(args: argparse.Namespace, spec: DatasetSpec) -> DatasetSpec:
    """Return the data set with the intensities of `--intensity` and `--window` of predict.py."""
    rule, window = getattr(args, "intensity", None), getattr(args, "window", None)
    if rule is None and window is None:
        return spec
    if window is not None and len(window) != 2:
        raise InputError(f"--window has {len(window)} values, expected 2: LOW HIGH")
    chosen = choose_intensity(spec.intensity, rule, window)
    if spec.intensity != NOT_RECORDED and str(chosen) != str(spec.intensity):
        warn(f"the network was trained on {spec.intensity}, but the flags ask for {chosen}")
    return replace(spec, intensity=chosen)


def record_training_data(
    args: argparse.Namespace, facts: Sequence[SampleFacts], dataset: Synapse_dataset
) -> None:
    """Record in `args` what the training slices show of themselves.

    test.py resizes its slices to the size of the training slices. Data that preprocess described
    say it. Of others, it is the size that all slices have.

    Args:
        facts: about all slices, also those that are held out.
        dataset: the slices that are trained on. The cases of an adapter to start from count too.
    """
    names = set(dataset.sample_list)
    trained = TrainedOn.measured(
        [fact for fact in facts if fact.name in names],
        cases_of(dataset.sample_list, dataset.data_dir),
    )
    before = TrainedOn.from_json(args.trained_on)
    args.trained_on = trained.with_cases(before.cases if before else ()).to_json()
    spec = args.spec
    is_described = stored_spec(args.root_path) is not None
    if is_described and (spec["size"] is None or spec["size"] == trained.size):
        return
    if is_described:
        warn(
            f"{args.root_path} is described as slices of {spec['size']} pixels, but holds "
            f"{first_few([f'{rows}×{columns}' for rows, columns in trained.sizes])}; the size of "
            "the slices counts"
        )
    args.spec = spec | {"size": trained.size}
    if not is_described:
        args.spec["channels"] = 3 if trained.colour else 1
