"""What a data set says of itself in `dataset.json`, or shows in its files, as a `DatasetSpec`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import InputError, first_few, warn
from datasets.intensity import CT, MR, PERCENTILES, PICTURE, RANGE, WINDOW, Intensity
from datasets.registry import DatasetSpec, check_class_names, read_json
from datasets.scans.files import ScanFile, read_scan
from datasets.scans.orientation import CANONICAL
from datasets.scans.pictures import read_index_picture, read_picture
from datasets.scans.volumes import Geometry

DESCRIPTOR = "dataset.json"
AIR = -200  # a scan with values below it is taken as CT where nothing says what it is
SMALL_PART = 0.25  # of the range of 16 bits, below which pictures are dark
RULES = {"ct": CT, "mr": MR, "picture": PICTURE}


@dataclass(frozen=True)
class Descriptor:
    """What `dataset.json` told."""

    name: str | None
    values: dict[str, int]  # of the classes, by name; ascending
    channel: int | None  # which one of several is used
    modality: str  # its name; empty if none is given
    training: int | None  # numTraining


def read_descriptor(path: Path, channel: int | None) -> Descriptor:
    """Read nnU-Net's or the Decathlon's `dataset.json`.

    Args:
        channel: the one asked for; None: there may be only one, or red, green and blue.

    Raises:
        InputError: no JSON object, labels or channels that make no sense, or a choice to make.
    """
    content = read_json(path, remedy="correct it")
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    names = content.get("channel_names", content.get("modality", {}))
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise InputError(f'{path} has "channel_names" {names!r:.60}, expected {{"0": "CT"}}')
    try:
        names = [name for _, name in sorted((int(key), name) for key, name in names.items())]
    except ValueError:
        raise InputError(f'{path} has channels {list(names)}, expected "0", "1", …') from None
    colour = [name.upper()[:1] for name in names] == ["R", "G", "B"]
    if channel is None and len(names) > 1 and not colour:
        listed = ", ".join(f"{index} {name}" for index, name in enumerate(names))
        raise InputError(
            f"{path} has {len(names)} channels ({listed}), of which the network takes one; pass "
            "--channel N"
        )
    if channel is not None and names and channel >= len(names):
        raise InputError(f"--channel is {channel}, {path} has {len(names)}, counted from 0")
    told, name = content.get("numTraining"), content.get("name")
    return Descriptor(
        name if isinstance(name, str) else None,
        label_values(content.get("labels"), path),
        channel,
        names[channel or 0] if names and not colour else "",
        told if isinstance(told, int) else None,
    )


def label_values(labels: Any, path: Path) -> dict[str, int]:
    """Class names and their values, background left out, ascending by value.

    Args:
        labels: `{"liver": 1}` as nnU-Net has it, or `{"1": "liver"}` as the Decathlon has.

    Raises:
        InputError: neither, values that are doubled or lists (regions), an ignore label, nothing
            but background, or a name that no table can hold.
    """
    expected = f'{path} needs "labels" as {{"background": 0, "liver": 1}} or {{"1": "liver"}}'
    if not isinstance(labels, dict) or not labels:
        raise InputError(f"{expected}; it has {labels!r:.80}")
    turned = all(isinstance(value, str) for value in labels.values())
    pairs = [(str(v), k) if turned else (str(k), v) for k, v in labels.items()]
    found: dict[str, int] = {}
    for name, value in pairs:
        if isinstance(value, list):
            raise InputError(
                f"{path} has the region {name!r} of several labels {value}; give every voxel one "
                "class, regions are not supported"
            )
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{expected}; the value of {name!r} is {value!r:.40}") from None
        if isinstance(value, (float, bool)) or not 0 <= number < 65536:
            raise InputError(f"{expected}; the value of {name!r} is {value!r}, expected 0…65535")
        if number in found.values() or name in found:
            raise InputError(f"{path} has the label {name!r} or its value {number} twice")
        if name == "ignore":
            raise InputError(
                f'{path} has the label "ignore", of voxels that nobody labelled; training takes '
                "every voxel: label these or set them to background, and remove it"
            )
        found[name] = number
    classes = {n: v for n, v in sorted(found.items(), key=lambda item: item[1]) if v}
    if not classes:
        raise InputError(f"{expected}; it has no class but background")
    check_class_names(list(classes), path)
    return classes


def values_in_use(labels: Sequence[ScanFile], names: Sequence[str] | None) -> dict[str, int]:
    """Class names and values of labels that nothing describes, by reading them all.

    Args:
        names: of the values ascending, background left out; None: `class 1` by its value.

    Raises:
        InputError: a faulty label, nothing but background, or names of another number.
    """
    check_class_names(names or [], "--class_names")
    found: set[float] = set()
    for label in tqdm(labels, desc="reading labels", unit="case", leave=False, disable=None):
        found.update(distinct(read_label(label)[0]))
    values = sorted(found - {0})
    wrong = [f"{v:g}" for v in values if not (0 < v < 65536 and v == int(v))]
    if wrong or not values:
        what = first_few(wrong) if wrong else "nothing but 0"
        raise InputError(
            f"the labels in {labels[0].path.parent} hold {what}, expected whole numbers 1…65535 "
            "for the classes"
        )
    names = names or [f"class {value:g}" for value in values]
    if len(names) != len(values):
        raise InputError(
            f"--class_names has {len(names)} names, the labels hold the values "
            f"{first_few([f'{v:g}' for v in values], 20)}; name each of these, in this order"
        )
    return {name: int(value) for name, value in zip(names, values, strict=True)}


def read_label(label: ScanFile) -> tuple[np.ndarray, Geometry | None]:  # (D, H, W)
    """The values of a label file, of a picture its indices; and where they lie."""
    return (read_index_picture(label.path), None) if label.is_picture else read_scan(label)


def distinct(values: np.ndarray) -> list[float]:
    """The values that an array holds, ascending; without sorting where they are labels."""
    if values.min() >= 0 and values.max() < 65536:
        whole = values.astype(np.uint16, copy=False)
        if values.dtype.kind in "iub" or (whole == values).all():
            seen = np.zeros(65536, dtype=bool)
            seen[whole.ravel()] = True
            return np.flatnonzero(seen).tolist()
    return np.unique(values).tolist()


def make_spec(
    name: str,
    values: dict[str, int],
    images: Sequence[ScanFile],
    args: argparse.Namespace,
    modality: str = "",
) -> DatasetSpec:
    """The spec of a data set: what the flags do not say is taken from the files.

    Raises:
        InputError: too many classes, no image, or pictures among volumes.
    """
    if len(values) > 255:
        raise InputError(f"{name} has {len(values)} classes, expected at most 255 (8-bit labels)")
    if not images:
        raise InputError(f"{name} holds no case; expected at least one image with its label")
    pictures = images[0].is_picture
    mixed = [image.path.name for image in images if image.is_picture != pictures]
    if mixed:
        raise InputError(f"{name} mixes pictures and volumes: {first_few(mixed)}; separate them")
    channels = 1
    if pictures:
        channels, rule = _picture_kind(images, args)
    elif modality:
        rule = CT if re.search(r"(?<![a-z])ct(?![a-z])", modality.lower()) else MR
    else:
        smallest = float(read_scan(images[0])[0].min())
        rule = CT if smallest < AIR else MR
    return DatasetSpec(
        name=re.sub(r"[^\w.-]+", "_", args.name or name).strip(".") or "dataset",
        class_names=tuple(values),
        raw_labels={value: index for index, value in enumerate(values.values(), start=1)},
        ignored_labels=(),
        predicted_values=tuple(values.values()),
        intensity=choose_intensity(args, rule),
        orientation=None if pictures else CANONICAL,
        channels=channels,
        channel=args.channel,
        pictures=pictures,
    )


def choose_intensity(args: argparse.Namespace, otherwise: Intensity) -> Intensity:
    """The rule that the flags name; `otherwise` if they name none, or one of its kind.

    Raises:
        InputError: limits in the wrong order.
    """
    rule = RULES.get(args.intensity, otherwise)
    if rule.rule == otherwise.rule:
        rule = otherwise  # pictures of 16 bits have other limits than those of 8
    low, high = args.window or (rule.low, rule.high)
    if not low < high or (rule.rule == PERCENTILES and not 0 <= low < high <= 100):
        raise InputError(f"--window is {low:g} {high:g}, expected the lower limit first")
    said = args.intensity is not None or args.window is not None
    return Intensity(rule.rule, low, high, sure=said and rule.rule == WINDOW)


def _picture_kind(images: Sequence[ScanFile], args: argparse.Namespace) -> tuple[int, Intensity]:
    """Channels and range of a set of pictures: colour if one of them is in colour.

    Raises:
        InputError: pictures of 8 and of 16 bits, or of fractions, which would become black.
    """
    channels, largest = 1, 0
    of_bits: dict[int, list[str]] = {8: [], 16: [], 0: []}
    for image in tqdm(images, desc="reading pictures", unit="case", leave=False, disable=None):
        array = read_picture(image.path)
        channels = max(channels, array.shape[1] if array.ndim == 4 else 1)
        kind = 8 * array.dtype.itemsize if array.dtype in (np.uint8, np.uint16) else 0
        of_bits[kind].append(image.path.name)
        largest = max(largest, int(array.max()))
    folder = images[0].path.parent
    if RULES.get(args.intensity, PICTURE) != PICTURE:  # a rule that does not look at the type
        return channels, PICTURE
    if of_bits[0]:
        raise InputError(
            f"{folder} holds pictures of neither 8 nor 16 bits ({first_few(of_bits[0])}); export "
            "them with 8 or 16 bits, or pass --intensity mr to scale each by its own values"
        )
    if of_bits[8] and of_bits[16]:
        raise InputError(
            f"{folder} holds pictures of 8 bits ({first_few(of_bits[8])}) and of 16 "
            f"({first_few(of_bits[16])}); convert them to one kind"
        )
    if of_bits[16] and args.window is None and largest < SMALL_PART * 65535:
        fitting = max(1, 2 ** largest.bit_length() - 1)
        warn(
            f"the largest value in {folder} is {largest} of 65535, so that the network sees dark "
            f"pictures; --window 0 {fitting} would fit"
        )
    return channels, Intensity(RANGE, 0.0, 65535.0) if of_bits[16] else PICTURE
