"""The description of a data set (`DatasetSpec`), from the flags and from the files."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from common.errors import InputError, first_few, warn
from datasets.intensity import CT, MR, PICTURE, RANGE, RULES, Intensity, choose_intensity
from datasets.registry import DatasetSpec, plain_name
from datasets.scans.files import ScanFile, read_scan
from datasets.scans.orientation import CANONICAL
from datasets.scans.pictures import is_turned, read_picture

AIR = -200  # HU; without a description, a scan with lower values is read as CT
SMALL_PART = 0.25  # of the range of 16 bits; pictures with lower values only are dark


def make_spec(
    name: str,
    values: dict[str, int],
    images: Sequence[ScanFile],
    args: argparse.Namespace,
    modality: str = "",
) -> DatasetSpec:
    """Describe a data set; what the flags leave open comes from the files.

    Args:
        name: of the data set, if `args.name` is None.
        values: class name -> label value, ascending by value.
        images: of all cases.
        modality: name of the channel in `dataset.json`; empty: not known.

    Raises:
        InputError: there are too many classes or no images, or pictures and volumes are mixed.
    """
    if len(values) > 255:
        raise InputError(
            f"{name} has {len(values)} classes, expected at most 255; if objects are numbered one "
            "by one (instances), --label_threshold 1 makes one class of them"
        )
    threshold = args.label_threshold
    if threshold is not None and len(values) != 1:
        raise InputError(
            f"--label_threshold makes one class, but {name} has the {len(values)} classes "
            f"{first_few([*values])}; leave it out"
        )
    if not images:
        raise InputError(f"{name} holds no case, expected at least one image with its label")
    refuse_mixed(name, images)
    pictures = images[0].is_picture
    channels = 1
    if pictures:
        channels, rule = _picture_kind(images, args)
    elif modality:
        rule = CT if re.search(r"(?<![a-z])(nc|ld|ce|cb)?cta?(?![a-z])", modality.lower()) else MR
    else:
        smallest = float(read_scan(images[0])[0].min())
        rule = CT if smallest < AIR else MR
    return DatasetSpec(
        name=plain_name(args.name or name),
        class_names=tuple(values),
        raw_labels={1: 1}  # the labels are read as 0 and 1
        if threshold is not None
        else {value: index for index, value in enumerate(values.values(), start=1)},
        ignored_labels=(),
        predicted_values=tuple(values.values()),
        intensity=choose_intensity(rule, args.intensity, args.window),
        orientation=None if pictures else CANONICAL,
        channels=channels,
        channel=args.channel,
        pictures=pictures,
        label_threshold=threshold,
    )


def refuse_mixed(name: str, images: Sequence[ScanFile]) -> None:
    """Raise an `InputError` if some images of a data set are pictures and others volumes."""
    mixed = [image.path.name for image in images if image.is_picture != images[0].is_picture]
    if mixed:
        raise InputError(f"{name} mixes pictures and volumes: {first_few(mixed)}; separate them")


def _picture_kind(images: Sequence[ScanFile], args: argparse.Namespace) -> tuple[int, Intensity]:
    """Return the number of channels (3 if any picture is in colour) and the rule for the values.

    Raises:
        InputError: the pictures have both 8 and 16 bits, or hold fractions.
    """
    channels, largest, odd = 1, 0, ""
    names: dict[int, list[str]] = {8: [], 16: [], 0: []}  # by bits; 0: neither 8 nor 16
    for image in tqdm(images, desc="reading pictures", unit="case", leave=False, disable=None):
        array = read_picture(image.path)
        channels = max(channels, array.shape[1] if array.ndim == 4 else 1)
        bits = 8 * array.dtype.itemsize if array.dtype in (np.uint8, np.uint16) else 0
        names[bits].append(image.path.name)
        if not bits and not odd:
            what = "fractions" if array.dtype.kind == "f" else "values"
            odd = f"{what} {array.min():g}…{array.max():g} in the first"
        largest = max(largest, int(array.max()))
    folder = images[0].path.parent
    _warn_of_turned(images)
    if RULES.get(args.intensity, PICTURE) != PICTURE:  # the other rules accept every type
        return channels, PICTURE
    if names[0]:
        raise InputError(
            f"{folder} holds pictures of neither 8 nor 16 bits ({first_few(names[0])}: {odd}); "
            "export them with 8 or 16 bits, or pass --intensity mr to scale each picture by its "
            "values (ct if they are Hounsfield units)"
        )
    if names[8] and names[16]:
        raise InputError(
            f"{folder} holds pictures of 8 bits ({first_few(names[8])}) and of 16 bits "
            f"({first_few(names[16])}); convert all of them to 8 bits or to 16 bits"
        )
    if names[16] and args.window is None and largest < SMALL_PART * 65535:
        fitting = max(1, 2 ** largest.bit_length() - 1)
        warn(
            f"the largest value in {folder} is {largest} of 65535, so the network sees dark "
            f"pictures; --window 0 {fitting} would fit"
        )
    if names[16]:
        return channels, Intensity(rule=RANGE, low=0.0, high=65535.0)
    return channels, PICTURE


def _warn_of_turned(images: Sequence[ScanFile]) -> None:
    """Warn of pictures that are stored turned: the masks may have been drawn without turning."""
    turned = [image.path.name for image in images if is_turned(image.path)]
    if turned:
        warn(
            f"{first_few(turned)} {'are' if len(turned) > 1 else 'is'} stored turned or mirrored "
            "(EXIF) and read as displayed; check that the labels were drawn on the displayed "
            "pictures"
        )
