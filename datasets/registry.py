"""Descriptions of data sets: classes, label values, intensity rule, orientation, published split.

Synapse is a row of `DATASETS`. `preprocess.prepare` makes the description of any other data set
from its `dataset.json` or its files. A description is stored as plain JSON in the prepared folder
(`SPEC_FILE`), in the run's configuration and inside the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from common.errors import InputError, first_few
from common.files import read_json
from common.names import safe_label, safe_name
from datasets.intensity import CT, NOT_RECORDED, PERCENTILES, RANGE, UNKNOWN, WINDOW, Intensity
from datasets.names import case_names

SPEC_FILE = "dataset_spec.json"  # beside train_npz/ and test_vol_h5/
SUMMARY_FILE = "preprocess.json"  # beside them too: what preprocessing did with each case
AXIS_PAIRS = ("RL", "AP", "IS")  # an orientation has one letter of each pair
LARGEST_SIDE = 16384  # of a slice, in pixels
LARGEST_VALUE = 1e12  # of an intensity
LONGEST_TEXT = 1000  # characters of the name of a case


@dataclass(frozen=True)
class DatasetSpec:
    """One data set: how its scans become images in [0, 1] and classes 0…num_classes."""

    name: str
    class_names: tuple[str, ...]  # of classes 1…num_classes, in order
    raw_labels: dict[int, int]  # raw label value -> class; unknown values except 0 are errors
    ignored_labels: tuple[int, ...]  # raw values that become 0
    predicted_values: tuple[int, ...]  # the value of each class in the files of predict.py
    intensity: Intensity
    orientation: str | None = None  # directions of the axes x, y, z, e.g. LPS; None: as stored
    channels: int = 1  # of an image: 1 grey, 3 colour
    channel: int | None = None  # channel in use, e.g. an MR sequence; None: no choice
    size: int | None = None  # side of the training slices; None: the size of the scan
    train_cases: tuple[str, ...] = ()  # in the order of the published list
    test_cases: tuple[str, ...] = ()
    pictures: bool | None = None  # whether images are 2-D files; None: the intensity rule decides
    label_threshold: float | None = None  # raw values from it on are the one class; None: see above
    raw_range: tuple[float, float] | None = None  # of values in training; None: not known
    modality: str | None = None  # in training, as DICOM names it: CT, MR; None: not known

    @property
    def num_classes(self) -> int:
        """The number of foreground classes; the network adds background as class 0."""
        return len(self.class_names)

    @property
    def is_pictures(self) -> bool:
        """Whether the images are 2-D files."""
        return self.intensity.rule == RANGE if self.pictures is None else self.pictures

    def of_plain_classes(self, count: int) -> DatasetSpec:
        """Return the same data set with `count` unnamed classes: `class 1`, `class 2` …"""
        values = range(1, count + 1)
        return replace(
            self,
            class_names=tuple(f"class {value}" for value in values),
            raw_labels={value: value for value in values},
            ignored_labels=(),
            predicted_values=tuple(values),
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values that `spec_from_json` reads back.

        Fields that came later than the others are left out while they have their default, so that
        the description equals the one that earlier runs recorded.
        """
        values = asdict(self)
        for name in ("pictures", "label_threshold", "raw_range", "modality"):
            if values[name] is None:
                del values[name]
        if not self.intensity.sure:
            del values["intensity"]["sure"]
        values["raw_labels"] = {str(raw): index for raw, index in self.raw_labels.items()}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


SYNAPSE = DatasetSpec(
    name="Synapse",
    class_names=(
        "spleen",
        "right kidney",
        "left kidney",
        "gallbladder",
        "liver",
        "stomach",
        "aorta",
        "pancreas",
    ),
    raw_labels={1: 1, 2: 2, 3: 3, 4: 4, 6: 5, 7: 6, 8: 7, 11: 8},
    ignored_labels=(5, 9, 10, 12, 13),
    predicted_values=(1, 2, 3, 4, 5, 6, 7, 8),
    intensity=CT,
    size=224,
    train_cases=case_names(31, 7, 9, 5, 26, 39, 24, 34, 33, 30, 23, 40, 10, 21, 6, 27, 28, 37),
    test_cases=case_names(8, 22, 38, 36, 32, 2, 29, 3, 1, 4, 25, 35),
)

DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in (SYNAPSE,)}


def plain_name(text: str) -> str:
    """Return a name for a data set that fits into the names of files and folders."""
    return re.sub(r"[^\w.-]+", "_", text)[:50].strip(".") or "dataset"


def undescribed(name: str, cases: Iterable[str]) -> DatasetSpec:
    """Return the description of training slices that were prepared elsewhere.

    The published cases are Synapse. Of others, nothing is known: neither the names of their
    classes nor how their intensities became [0, 1].
    """
    if set(cases) <= {*SYNAPSE.train_cases, *SYNAPSE.test_cases}:
        return SYNAPSE
    return replace(
        SYNAPSE.of_plain_classes(SYNAPSE.num_classes),
        name=plain_name(name),
        intensity=NOT_RECORDED,
        size=None,
        train_cases=(),
        test_cases=(),
    )


def get_dataset(name: str) -> DatasetSpec:
    """Return the data set that `--dataset` names."""
    if name not in DATASETS:
        raise InputError(
            f"unknown data set {name!r}, expected {' or '.join(DATASETS)}; leave out --dataset for "
            "data that preprocess.prepare wrote"
        )
    return DATASETS[name]


def stored_spec(folder: str | Path) -> DatasetSpec | None:
    """Read the description of prepared data from their folder or the folder above, if it exists."""
    folder = Path(folder)
    for path in (folder / SPEC_FILE, folder.parent / SPEC_FILE):
        if path.is_file():
            return spec_from_json(read_json(path, remedy="prepare the data again"), path)
    return None


def check_class_names(names: Sequence[str], source: object) -> None:
    """Raise an `InputError` for names that do not fit into tables, colour files or file names."""
    for name in names:
        safe_label(name, source=source)
    repeated = [repr(name) for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise InputError(
            f"{source} has the class name {first_few(repeated)} twice; rename one of the classes"
        )


def spec_from_json(values: Any, source: object) -> DatasetSpec:
    """Read the values that `DatasetSpec.to_json` made.

    Raises:
        InputError: the values are not a valid description; the message names `source`.
    """
    try:
        known = {
            field.name: values[field.name]
            for field in fields(DatasetSpec)
            if field.name in values or field.default is MISSING
        }
        known["raw_labels"] = {int(raw): value for raw, value in known["raw_labels"].items()}
        known["intensity"] = Intensity(**known["intensity"])
        spec = DatasetSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})
        valid = _is_valid(spec)
    except (KeyError, TypeError, ValueError, AttributeError):
        valid = False
    if not valid:
        raise InputError(
            f"{source} does not describe a data set in the form that preprocess writes; prepare "
            "the data again"
        )
    safe_name(spec.name, source=source)
    check_class_names(spec.class_names, source)
    return spec


def _is_valid(spec: DatasetSpec) -> bool:
    """Return whether the fields have the right types and fit together; may raise as well."""
    texts = (spec.name, *spec.class_names, *spec.train_cases, *spec.test_cases)
    labels = (*spec.raw_labels, *spec.ignored_labels, *spec.predicted_values)
    lists = (spec.class_names, spec.ignored_labels, spec.predicted_values)
    given = (spec.label_threshold, *(spec.raw_range or (0, 1)))
    numbers = (*(number for number in given if number is not None), spec.channels)
    return (
        all(isinstance(values, tuple) for values in (*lists, spec.train_cases, spec.test_cases))
        and all(type(text) is str and len(text) <= LONGEST_TEXT for text in texts)
        and all(type(value) is int and 0 <= value < 65536 for value in labels)
        and all(type(value) is int for value in spec.raw_labels.values())
        and set(spec.raw_labels.values()) == set(range(1, spec.num_classes + 1))
        and len(spec.predicted_values) == spec.num_classes
        and 0 < spec.num_classes < 256
        and _is_rule(spec.intensity)
        and all(map(_is_number, numbers))
        and (spec.pictures is None or isinstance(spec.pictures, bool))
        and (spec.label_threshold is None or spec.label_threshold > 0)
        and (spec.raw_range is None or _is_range(spec.raw_range))
        and (spec.modality is None or spec.modality.isprintable())
        and spec.channels in (1, 3)
        and (spec.channel is None or (type(spec.channel) is int and 0 <= spec.channel < 65536))
        and (spec.size is None or (type(spec.size) is int and 0 < spec.size <= LARGEST_SIDE))
        and (spec.orientation is None or is_orientation("" + spec.orientation))
    )


def _is_rule(intensity: Intensity) -> bool:
    low, high = intensity.low, intensity.high
    return (
        intensity.rule in (WINDOW, PERCENTILES, RANGE, UNKNOWN)
        and _is_number(low)
        and _is_number(high)
        and low < high
        and (intensity.rule != PERCENTILES or (low >= 0 and high <= 100))
        and isinstance(intensity.sure, bool)
    )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -LARGEST_VALUE <= value <= LARGEST_VALUE


def _is_range(values: tuple[float, ...]) -> bool:
    low, high = values
    return low <= high


def is_orientation(letters: str) -> bool:
    """Return whether the letters are the directions of three axes, e.g. LPS."""
    return len(letters) == 3 and all(
        sum(letter in pair for letter in letters) == 1 for pair in AXIS_PAIRS
    )
