"""Label files: their values, and how these become classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import InputError, first_few
from datasets.registry import DatasetSpec, check_class_names
from datasets.scans.files import ScanFile, read_scan
from datasets.scans.pictures import read_index_picture
from datasets.scans.volumes import Geometry


def read_label(label: ScanFile) -> tuple[np.ndarray, Geometry | None]:  # (D, H, W)
    """Read label values and their geometry; of a picture, the indices and None."""
    return (read_index_picture(label.path), None) if label.is_picture else read_scan(label)


def distinct_values(values: np.ndarray) -> list[float]:
    """Return the different values of an array, ascending; fast for label values."""
    if values.min() >= 0 and values.max() < 65536:
        whole = values.astype(np.uint16, copy=False)
        if values.dtype.kind in "iub" or (whole == values).all():
            seen = np.zeros(65536, dtype=bool)
            seen[whole.ravel()] = True
            return np.flatnonzero(seen).tolist()
    return np.unique(values).tolist()


def class_values_in(labels: Sequence[ScanFile], names: Sequence[str] | None) -> dict[str, int]:
    """Read all labels of a data set without description, and return class names and values.

    Args:
        names: of the values in ascending order, without background; None: `class 1` for value 1.

    Raises:
        InputError: a label is faulty, there is only background, or the number of names is wrong.
    """
    check_class_names(names or [], "--class_names")
    found: set[float] = set()
    for label in tqdm(labels, desc="reading labels", unit="case", leave=False, disable=None):
        found.update(distinct_values(read_label(label)[0]))
    values = sorted(found - {0})
    wrong = [f"{v:g}" for v in values if not (0 < v < 65536 and v == int(v))]
    if wrong or not values:
        what = f"the values {first_few(wrong)}" if wrong else "only 0"
        raise InputError(
            f"the labels in {labels[0].path.parent} hold {what}, expected whole numbers 1…65535 "
            "for the classes"
        )
    names = names or [f"class {value:g}" for value in values]
    if len(names) != len(values):
        raise InputError(
            f"--class_names has {len(names)} name(s) but the labels hold the values "
            f"{first_few([f'{v:g}' for v in values], 20)}; name each value, in this order"
        )
    return {name: int(value) for name, value in zip(names, values, strict=True)}


def map_labels(
    values: np.ndarray, spec: DatasetSpec, label_values: str, path: Path
) -> np.ndarray:  # (D, H, W) -> (D, H, W) uint8 of 0…num_classes
    """Map the values of a label file to classes.

    Args:
        values: whole numbers; they are not changed.
        label_values: "raw": map as `spec` describes; "classes": the values are classes already.
        path: of the label, for messages.

    Raises:
        InputError: a value is not a whole number, or is unknown.
    """
    classes = {index: index for index in range(1, spec.num_classes + 1)}
    if label_values == "raw":
        classes = spec.raw_labels | dict.fromkeys(spec.ignored_labels, 0)
    known = sorted({0} | classes.keys())
    wrong = [f"{v:g}" for v in distinct_values(values) if v not in known]
    if wrong:
        contiguous = known == list(range(len(known)))
        expected = f"0…{known[-1]}" if contiguous else first_few(known, 20)
        raise InputError(
            f"{path} holds label values {first_few(wrong)}, expected whole numbers {expected} for "
            f"--label_values {label_values} of {spec.name}; correct the file or the description of "
            "the data set, or pass the right --label_values"
        )
    table = np.zeros(known[-1] + 1, dtype=np.uint8)
    table[list(classes)] = list(classes.values())
    return table[values.astype(np.uint16)]
