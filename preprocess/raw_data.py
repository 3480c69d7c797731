"""Finding and describing a raw data set.

Three layouts are known: `dataset.json` with imagesTr and labelsTr (nnU-Net, and the Medical
Segmentation Decathlon), the numbered files of BTCV in img and label, and two plain folders with
files of the same names. `correction.folder` writes two plain folders with a description.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import InputError, MissingFileError, first_few, warn
from common.files import read_json, require_folder
from datasets.intensity import choose_intensity
from datasets.registry import (
    SPEC_FILE,
    SYNAPSE,
    DatasetSpec,
    get_dataset,
    spec_from_json,
)
from preprocess.dataset_json import DATASET_JSON, read_dataset_json
from preprocess.flags import AUTO_PLANE, DESCRIBED_PLANE
from preprocess.groups import group_cases
from preprocess.labels import class_values_in
from preprocess.raw_cases import LAYOUTS, RawCase, find_btcv, match_files
from preprocess.spec import make_spec, refuse_mixed

PLAIN = (("images", "labels"), ("images", "masks"), ("imagesTr", "labelsTr"))


@dataclass(frozen=True)
class RawData:
    """A data set as it was found."""

    spec: DatasetSpec
    cases: dict[str, RawCase]  # ascending by name
    test: tuple[str, ...] | None = None  # cases in its test folder; None: there is no test folder


def find_raw_data(args: argparse.Namespace) -> RawData:
    """Find the cases in `args.input`, describe the data set, and group the cases.

    Flags override the description.

    Raises:
        MissingFileError: the folder has none of the known layouts, or lacks files.
        InputError: the description or the files are faulty, or `--group` does not fit them.
    """
    data = _find_layout(args)
    cases = group_cases(data.cases, args.group)
    test = None if data.test is None else tuple(cases[name].name for name in data.test)
    return RawData(data.spec, {case.name: case for case in cases.values()}, test)


def _find_layout(args: argparse.Namespace) -> RawData:
    """Find the cases of the first layout that fits, each in a group of its own."""
    folder = require_folder(args.input, what="--input", remedy=f"expected {LAYOUTS}")
    if (folder / DATASET_JSON).is_file():
        return _described_data(folder, args)
    btcv = folder / "Training" if (folder / "Training").is_dir() else folder
    if args.dataset is not None or (btcv / "img").is_dir():
        spec, cases = _btcv_spec(btcv, args.dataset), find_btcv(btcv)
        reason = f"the name, classes and channel of {spec.name} are known"
        _refuse_flags(args, ("class_names", "channel", "name", "label_threshold"), reason)
        intensity = choose_intensity(spec.intensity, args.intensity, args.window)
        return RawData(replace(spec, intensity=intensity), cases)
    for images, labels in PLAIN:
        if (folder / images).is_dir() and (folder / labels).is_dir():
            if (folder / SPEC_FILE).is_file():
                return _corrected_data(folder, folder / images, folder / labels, args)
            cases = match_files(folder / images, folder / labels, args.channel)
            labels = [case.label for case in cases.values()]
            values = class_values_in(labels, args.class_names, args.label_threshold)
            scans = [case.image for case in cases.values()]
            return RawData(make_spec(folder.resolve().name, values, scans, args), cases)
    raise MissingFileError(
        f"--input {folder} holds no data set in a known layout, expected {LAYOUTS}"
    )


def _btcv_spec(folder: Path, name: str | None) -> DatasetSpec:
    """Return the data set that is named, else the one of `preprocess.phantom`, else Synapse."""
    path = folder / SPEC_FILE
    if name is None and path.is_file():
        return spec_from_json(read_json(path, remedy="make the phantoms again"), path)
    return get_dataset(name or SYNAPSE.name)


def _corrected_data(folder: Path, images: Path, labels: Path, args: argparse.Namespace) -> RawData:
    """Find corrected scans; their classes, intensities and slices are those of the network."""
    reason = f"{folder / SPEC_FILE} describes the data"
    _refuse_flags(args, ("class_names", "channel", "name", "label_threshold"), reason)
    described = read_json(folder / SPEC_FILE, remedy="correct a scan again")
    spec = spec_from_json(described, folder / SPEC_FILE)
    cases = match_files(images, labels, None, of_equal_names=True)
    refuse_mixed(str(folder), [case.image for case in cases.values()])
    if args.intensity or args.window:
        intensity = choose_intensity(spec.intensity, args.intensity, args.window)
        spec = replace(spec, intensity=intensity)
    if args.plane == AUTO_PLANE:
        args.plane = DESCRIBED_PLANE
    return RawData(spec, cases)


def _described_data(folder: Path, args: argparse.Namespace) -> RawData:
    """Find the cases beside a `dataset.json`."""
    reason = f"{folder / DATASET_JSON} defines the classes"
    _refuse_flags(args, ("dataset", "class_names"), reason)
    described = read_dataset_json(folder / DATASET_JSON, args.channel)
    for kind in ("imagesTr", "labelsTr"):
        require_folder(folder / kind, what="folder", remedy=f"{DATASET_JSON} beside it needs it")
    cases = match_files(folder / "imagesTr", folder / "labelsTr", described.channel)
    if described.training is not None and described.training != len(cases):
        warn(
            f"{DATASET_JSON} has numTraining {described.training} but labelsTr holds {len(cases)} "
            "labels"
        )
    test = None
    if (folder / "imagesTs").is_dir() and (folder / "labelsTs").is_dir():
        test_cases = match_files(folder / "imagesTs", folder / "labelsTs", described.channel)
        both = sorted(test_cases.keys() & cases.keys())
        if both:
            raise InputError(
                f"{folder} has {first_few(both)} in both imagesTr and imagesTs; rename the files "
                "in one of the folders"
            )
        test, cases = tuple(test_cases), dict(sorted((cases | test_cases).items()))
    name = described.name or folder.resolve().name
    scans = [case.image for case in cases.values()]
    spec = make_spec(name, described.values, scans, args, described.modality)
    return RawData(spec, cases, test)


def _refuse_flags(args: argparse.Namespace, flags: Sequence[str], reason: str) -> None:
    """Raise an `InputError` for a flag that would have no effect."""
    for flag in flags:
        if getattr(args, flag) is not None:
            raise InputError(f"--{flag} has no effect because {reason}; leave it out")
