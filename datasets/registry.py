"""What each data set is: classes, raw label values, intensity window, published split.

A new data set is a new row of `DATASETS`; nothing else in the project names one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from safe_io import InputError


@dataclass(frozen=True)
class DatasetSpec:
    """One data set: how its raw scans become classes 0…num_classes and images in [0, 1]."""

    name: str
    class_names: tuple[str, ...]  # of the classes 1…num_classes, in order
    raw_labels: dict[int, int]  # raw label value -> class; values not named here become 0
    largest_raw_label: int  # raw values beyond it are an error, not background
    window: tuple[float, float]  # HU, mapped to 0 and 1
    train_cases: tuple[int, ...] = ()  # in the order of the published list
    test_cases: tuple[int, ...] = ()

    @property
    def num_classes(self) -> int:
        """Foreground classes; the network adds background as class 0."""
        return len(self.class_names)


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
    largest_raw_label=13,
    window=(-125.0, 275.0),
    train_cases=(31, 7, 9, 5, 26, 39, 24, 34, 33, 30, 23, 40, 10, 21, 6, 27, 28, 37),
    test_cases=(8, 22, 38, 36, 32, 2, 29, 3, 1, 4, 25, 35),
)

DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in (SYNAPSE,)}


def get_dataset(name: str) -> DatasetSpec:
    """Look a data set up by the name of `--dataset`."""
    if name not in DATASETS:
        raise InputError(
            f"unknown data set {name!r}, expected one of {', '.join(DATASETS)}; "
            "add a row to datasets/registry.py for another"
        )
    return DATASETS[name]


def case_name(number: int) -> str:
    """`case0001`: the name of a case in the lists and test volumes."""
    return f"case{number:04d}"


def slice_name(number: int, index: int) -> str:
    """`case0001_slice000`: the name of a training slice in the lists and on disk."""
    return f"{case_name(number)}_slice{index:03d}"


# One colour per class, told apart on grey CT; classes beyond the table walk round it again.
_COLOURS = (
    (230, 60, 60),  # spleen
    (250, 190, 40),  # right kidney
    (60, 180, 75),  # left kidney
    (70, 240, 240),  # gallbladder
    (190, 120, 60),  # liver
    (240, 80, 230),  # stomach
    (60, 110, 255),  # aorta
    (190, 240, 70),  # pancreas
)


def label_colours(num_classes: int) -> np.ndarray:
    """The colour of every class, (num_classes + 1, 3) uint8; background is black."""
    rows = [(0, 0, 0), *(_COLOURS[index % len(_COLOURS)] for index in range(num_classes))]
    return np.array(rows, dtype=np.uint8)
