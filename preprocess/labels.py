"""Label files: their values, and how these become classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import InputError, first_few, warn
from datasets.colours import organ_words
from datasets.registry import DatasetSpec, check_class_names
from datasets.scans.files import ScanFile, read_scan, read_scan_header
from datasets.scans.geometry import Geometry
from datasets.scans.pictures import read_index_picture, used_palette
from datasets.scans.segmentations import read_segmentation, segments_of
from preprocess.mask_checks import LabelFile, check_palettes, check_values

ROUNDING = 1e-3  # of whole numbers that were stored as fractions
EXPECTED = "expected whole numbers 1…65535 for the classes"


def read_label(
    label: ScanFile, threshold: float | None = None
) -> tuple[np.ndarray, Geometry | None]:  # (D, H, W)
    """Read label values and their geometry; of a picture, the indices and None.

    Args:
        threshold: values from it on become 1, lower ones 0; None: whole numbers are expected.

    Raises:
        InputError: the file is faulty, or holds fractions.
    """
    values, geometry = _stored_values(label, threshold)
    if threshold is not None:
        return (values >= threshold).astype(np.uint8), geometry
    return whole_values(values, label.path), geometry


def _stored_values(
    label: ScanFile, threshold: float | None
) -> tuple[np.ndarray, Geometry | None]:  # (D, H, W)
    if label.is_picture:
        return read_index_picture(label.path, thresholded=threshold is not None), None
    if segments_of(label.path) is not None:
        return read_segmentation(label.path)
    return read_scan(label)


def read_label_header(label: ScanFile) -> tuple[tuple[int, ...], Geometry | None]:  # (D, H, W)
    """Read shape and geometry of a label without its voxels; raises as `read_label` does."""
    if segments_of(label.path) is None:
        return read_scan_header(label)
    from datasets.scans.volumes import read_header

    return read_header(label.path, layered=True)


def refuse_other_names(label: ScanFile, spec: DatasetSpec, label_values: str) -> list[str]:
    """Refuse a segmentation that gives the name of a class to the value of another class.

    Names are compared as `organ_words` does, so that `Left_Kidney` is `kidney left`.

    Args:
        label_values: "raw" or "classes", see `map_labels`.

    Returns:
        `value 1: pancreas (here liver)` for each name that no class has, unless 3D Slicer made it
        up (`Segment_1`).

    Raises:
        InputError: see above.
    """
    if spec.label_threshold is not None:  # the values are no classes
        return []
    indices = {index: index for index in range(1, spec.num_classes + 1)}
    classes = spec.raw_labels if label_values == "raw" else indices
    by_name: dict[object, list[int]] = {}
    for index, name in enumerate(spec.class_names, start=1):
        by_name.setdefault(_words(name), []).append(index)
    unknown = []
    for segment in segments_of(label.path) or []:
        meant, found = by_name.get(_words(segment.name), []), classes.get(segment.value)
        if len(meant) == 1 and found not in (None, *meant):
            values = [value for value, index in classes.items() if index == meant[0]]
            raise InputError(
                f"{label.path} gives the segment {segment.name} the label value {segment.value}, "
                f"which is {spec.class_names[found - 1]} for --label_values {label_values} of "
                f"{spec.name}, where {spec.class_names[meant[0] - 1]} is {first_few(values)}; "
                "correct the label values in 3D Slicer, or the name of the segment"
            )
        if not meant and found and not re.fullmatch(r"(?i)(segment|class)?[ _]?\d*", segment.name):
            here = spec.class_names[found - 1]
            unknown.append(f"value {segment.value}: {segment.name} (here {here})")
    return unknown


def _words(name: str) -> object:
    """Return what names of one class have in common, numbers included."""
    return organ_words(name), tuple(re.findall(r"\d+", name))


def _refuse_changing_names(labels: Sequence[ScanFile]) -> None:
    """Refuse segmentations that give one value to classes of different names."""
    known: dict[int, tuple[str, Path]] = {}
    for label in labels:
        for segment in segments_of(label.path) or []:
            name, path = known.setdefault(segment.value, (segment.name, label.path))
            if _words(name) != _words(segment.name):
                raise InputError(
                    f"{path} calls the label value {segment.value} {name}, and {label.path} calls "
                    f"it {segment.name}; give each class the same value in all files, and the same "
                    "name"
                )


def whole_values(values: np.ndarray, path: Path) -> np.ndarray:
    """Return label values as whole numbers; rounding of up to 1e-3 is undone.

    Raises:
        InputError: there are fractions.
    """
    if values.dtype.kind != "f":
        return values
    rounded = np.rint(values)
    off = np.abs(values - rounded) > ROUNDING
    if off.any():
        raise InputError(
            f"{path} holds label values {first_few([f'{v:g}' for v in np.unique(values[off])])}, "
            "expected whole numbers: it was probably resampled with linear interpolation; resample "
            "it by nearest neighbour, or, if it shows one class, pass --label_threshold (0.5 for "
            "values 0…1)"
        )
    return rounded.astype(np.int32) if np.abs(rounded).max() < 2**31 else rounded


def distinct_values(values: np.ndarray) -> list[float]:
    """Return the different values of an array, ascending; fast for label values."""
    if values.min() >= 0 and values.max() < 65536:
        whole = values.astype(np.uint16, copy=False)
        if values.dtype.kind in "iub" or (whole == values).all():
            seen = np.zeros(65536, dtype=bool)
            seen[whole.ravel()] = True
            return np.flatnonzero(seen).tolist()
    return np.unique(values).tolist()


def class_values_in(
    labels: Sequence[ScanFile], names: Sequence[str] | None, threshold: float | None = None
) -> dict[str, int]:
    """Read all labels of a data set without description, and return class names and values.

    Args:
        names: of the values in ascending order, without background; None: `class 1` for value 1.
        threshold: see `read_label`.

    Raises:
        InputError: a label is faulty, there is only background, values cannot be classes, or the
            number of names is wrong.
    """
    check_class_names(names or [], "--class_names")
    _refuse_changing_names(labels)
    files = []
    for label in tqdm(labels, desc="reading labels", unit="case", leave=False, disable=None):
        files.append(_looked_at(label) if threshold is None else _thresholded(label, threshold))
    values = sorted(set().union(*(file.values for file in files)))
    if not values and threshold is None:
        raise InputError(f"the labels in {labels[0].path.parent} hold only 0, {EXPECTED}")
    if threshold is not None:
        _check_threshold(files, threshold, labels[0].path.parent)
    if names is None or len(names) != len(values):  # names confirm that each value is a class
        check_values(files)
    check_palettes(files)
    names = names or [f"class {value}" for value in values]
    if len(names) != len(values):
        raise InputError(
            f"--class_names has {len(names)} name(s) but the labels hold the values "
            f"{first_few(values, 20)}; name each value, in this order"
        )
    return dict(zip(names, values, strict=True))


def _looked_at(label: ScanFile) -> LabelFile:
    """Read a label slice by slice, and return what its values look like."""
    values, _ = read_label(label)
    if not 0 <= values.min() <= values.max() < 65536:
        wrong = [f"{v:g}" for v in distinct_values(values) if not 0 <= v < 65536]
        raise InputError(f"{label.path} holds the values {first_few(wrong)}, {EXPECTED}")
    palette = used_palette(label.path) if label.is_picture else None
    file = LabelFile(label.path.name, palette=palette)
    for plane in values:
        file.add(plane.astype(np.uint16, copy=False))
    return file


def _thresholded(label: ScanFile, threshold: float) -> LabelFile:
    """Read a label, and return its counts of 0 and 1 and its largest stored value."""
    values, _ = _stored_values(label, threshold)
    ones = int(np.count_nonzero(values >= threshold))
    counts = {value: n for value, n in ((0, values.size - ones), (1, ones)) if n}
    return LabelFile(label.path.name, counts, largest=float(values.max()))


def _check_threshold(files: Sequence[LabelFile], threshold: float, folder: Path) -> None:
    """Refuse a threshold that leaves only background or only the class; warn of lost files."""
    for value, side in ((0, "below"), (1, "from")):
        if not any(value in file.counts for file in files):
            raise InputError(
                f"the labels in {folder} hold no value {side} --label_threshold {threshold:g}; "
                "their largest value is "
                f"{max(file.largest for file in files):g}, so pass a threshold between background "
                "and class"
            )
    empty = [
        f"{file.name} (up to {file.largest:g})" for file in files if 0 < file.largest < threshold
    ]
    if empty:
        warn(
            f"{first_few(empty)} hold values, but none from --label_threshold {threshold:g} on, "
            "and become background; if they are masks in another encoding, lower the threshold"
        )


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
        one = spec.num_classes == 1 and label_values == "raw"
        expected = f"0…{known[-1]}" if contiguous else first_few(known, 20)
        raise InputError(
            f"{path} holds label values {first_few(wrong)}, expected whole numbers {expected} for "
            f"--label_values {label_values} of {spec.name}; correct the file or the description of "
            "the data set, or pass the right --label_values"
            + (", or --label_threshold N if values from N on are the class" if one else "")
        )
    table = np.zeros(known[-1] + 1, dtype=np.uint8)
    table[list(classes)] = list(classes.values())
    return table[values.astype(np.uint16)]
