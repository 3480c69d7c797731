"""What a data set is: classes, label values, intensity rule, orientation, published split.

Synapse is a row of `DATASETS`. `preprocess.prepare` makes the row of any other data set from its
`dataset.json` or its files, and it travels as plain JSON: in the prepared folder (`SPEC_FILE`), in
the run's configuration and inside the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from common.errors import InputError, first_few

from .intensity import CT, PERCENTILES, RANGE, WINDOW, Intensity
from .names import case_names

SPEC_FILE = "dataset_spec.json"  # beside train_npz/ and test_vol_h5/
SUMMARY_FILE = "preprocess.json"  # there too: what preparation did, case by case
AXIS_PAIRS = ("RL", "AP", "IS")  # what the letters of an orientation are chosen from
LONGEST_NAME = 80  # bytes of a class name, which becomes part of file names


@dataclass(frozen=True)
class DatasetSpec:
    """One data set: how its scans become images in [0, 1] and classes 0…num_classes."""

    name: str
    class_names: tuple[str, ...]  # of the classes 1…num_classes, in order
    raw_labels: dict[int, int]  # raw label value -> class; others but 0 are an error
    ignored_labels: tuple[int, ...]  # raw values that become 0
    predicted_values: tuple[int, ...]  # of the classes in the files that predict.py writes
    intensity: Intensity
    orientation: str | None = None  # letters that the axes x, y, z run towards; None: as stored
    channels: int = 1  # of an image: 1 grey, 3 colour
    channel: int | None = None  # which one of several was taken, as MR sequences; None: the only
    size: int | None = None  # side of the training slices; None: the scan's own
    train_cases: tuple[str, ...] = ()  # in the order of the published list
    test_cases: tuple[str, ...] = ()
    pictures: bool | None = None  # whether the images are 2-D files; None: as the rule says

    @property
    def num_classes(self) -> int:
        """Foreground classes; the network adds background as class 0."""
        return len(self.class_names)

    @property
    def is_pictures(self) -> bool:
        """Whether its images are 2-D files."""
        return self.intensity.rule == RANGE if self.pictures is None else self.pictures

    def of_plain_classes(self, count: int) -> DatasetSpec:
        """The same with other classes, of which only the number is known: `class 1` …"""
        values = range(1, count + 1)
        return replace(
            self,
            class_names=tuple(f"class {value}" for value in values),
            raw_labels={value: value for value in values},
            ignored_labels=(),
            predicted_values=tuple(values),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values that `spec_from_json` reads back.

        What a spec of before does not have is left out where it says nothing, so that its runs can
        go on.
        """
        values = asdict(self)
        if self.pictures is None:
            del values["pictures"]
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


def get_dataset(name: str) -> DatasetSpec:
    """Look a data set up by the name of `--dataset`."""
    if name not in DATASETS:
        raise InputError(
            f"unknown data set {name!r}, expected one of {', '.join(DATASETS)}; data prepared by "
            "preprocess.prepare need no --dataset"
        )
    return DATASETS[name]


def stored_spec(folder: str | Path) -> DatasetSpec | None:
    """What prepared data say of themselves: the spec beside or above a folder of them, if any."""
    folder = Path(folder)
    for path in (folder / SPEC_FILE, folder.parent / SPEC_FILE):
        if path.is_file():
            return spec_from_json(read_json(path, remedy="prepare the data again"), path)
    return None


def read_json(path: Path, *, remedy: str) -> Any:
    """What a JSON file holds that a user may have edited; a byte order mark is no fault.

    Raises:
        InputError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({str(error)[:160]}); {remedy}") from None


def check_class_names(names: Sequence[str], source: object) -> None:
    """Raise an `InputError` unless tables, colour files and file names can hold all of them."""
    for name in names:
        fits = name.isprintable() and 0 < len(name.encode()) <= LONGEST_NAME
        if not fits or name != name.strip() or '"' in name:
            raise InputError(
                f"{source} has the class name {name!r:.60}, expected 1…{LONGEST_NAME} printable "
                "characters, without quotes and without blanks at its ends; rename it"
            )
    twice = [repr(name) for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise InputError(f"{source} has the class name {first_few(twice)} twice; rename one")


def spec_from_json(values: Any, source: object) -> DatasetSpec:
    """Read back what `DatasetSpec.to_json` made.

    Raises:
        InputError: anything else; `source` is named.
    """
    try:
        known = {
            field.name: values[field.name]
            for field in fields(DatasetSpec)
            if field.name in values or field.default is MISSING
        }
        known["raw_labels"] = {int(raw): int(v) for raw, v in known["raw_labels"].items()}
        known["intensity"] = Intensity(**known["intensity"])
        spec = DatasetSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})
        texts = (spec.name, *spec.class_names, *spec.train_cases, *spec.test_cases)
        numbers = (*spec.ignored_labels, *spec.predicted_values)
        rule = spec.intensity
        sound = (
            all(isinstance(text, str) for text in texts)
            and all(isinstance(number, int) and 0 <= number < 65536 for number in numbers)
            and set(spec.raw_labels.values()) == set(range(1, spec.num_classes + 1))
            and len(spec.predicted_values) == spec.num_classes > 0
            and rule.rule in (WINDOW, PERCENTILES, RANGE)
            and float(rule.low) < float(rule.high)
            and isinstance(rule.sure, bool)
            and (spec.pictures is None or isinstance(spec.pictures, bool))
            and spec.channels in (1, 3)
            and (spec.channel is None or 0 <= spec.channel < 65536)
            and (spec.size is None or 0 < spec.size < 65536)
            and (spec.orientation is None or is_orientation(spec.orientation))
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        sound = False
    if not sound:
        raise InputError(
            f"{source} does not describe a data set as this program writes it; prepare the data "
            "again"
        )
    check_class_names(spec.class_names, source)
    return spec


def is_orientation(letters: str) -> bool:
    """Whether the letters name three axes, as LPS."""
    pairs = sorted("".join(pair) for pair in AXIS_PAIRS for one in letters if one in pair)
    return len(letters) == 3 and pairs == sorted(AXIS_PAIRS)
