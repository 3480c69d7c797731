"""Where a raw data set keeps its files, and what it says of itself.

Three layouts are known: `dataset.json` with imagesTr and labelsTr (nnU-Net, and the Medical
Segmentation Decathlon, whose `labels` run the other way), BTCV's numbered img and label, and two
plain folders of equally named files.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import InputError, MissingFileError, first_few, warn
from common.files import require_folder
from datasets.names import NUMBERED, are_slices
from datasets.registry import DatasetSpec, get_dataset
from datasets.scans.files import ScanFile, find_scans, read_scan_header

from .descriptor import DESCRIPTOR, choose_intensity, make_spec, read_descriptor, values_in_use

PLAIN = (("images", "labels"), ("images", "masks"), ("imagesTr", "labelsTr"))
LAYOUTS = (
    "dataset.json with imagesTr/ and labelsTr/ (nnU-Net, Medical Segmentation Decathlon), "
    "Training/img/img0001.nii.gz and Training/label/label0001.nii.gz (BTCV), or images/ and "
    "labels/ with files of equal names"
)


@dataclass(frozen=True)
class RawCase:
    """A scan or picture with its label."""

    name: str
    image: ScanFile
    label: ScanFile
    group: str  # pictures of one scan are never split


@dataclass(frozen=True)
class RawData:
    """A data set as it was found."""

    spec: DatasetSpec
    cases: dict[str, RawCase]  # ascending by name
    test: tuple[str, ...] | None = None  # what its own folders set apart for testing


def read_layout(args: argparse.Namespace) -> RawData:
    """Find out what lies in `args.input`; the flags overrule what it says of itself.

    Raises:
        MissingFileError, InputError: no known layout, or a faulty one.
    """
    folder = require_folder(args.input, what="--input", remedy=f"expected {LAYOUTS}")
    described = (folder / DESCRIPTOR).is_file()
    btcv = folder / "Training" if (folder / "Training").is_dir() else folder
    if described:
        return _described(folder, args)
    if args.dataset is not None or (btcv / "img").is_dir():
        spec, cases = get_dataset(args.dataset or "Synapse"), find_btcv(folder, btcv)
        why = f"name, classes and channel of {spec.name} are known"
        _refuse_flags(args, ("class_names", "channel", "name"), why)
        return RawData(replace(spec, intensity=choose_intensity(args, spec.intensity)), cases)
    for images, labels in PLAIN:
        if (folder / images).is_dir() and (folder / labels).is_dir():
            cases = pair(folder / images, folder / labels, args.channel, args.group)
            values = values_in_use([case.label for case in cases.values()], args.class_names)
            scans = [case.image for case in cases.values()]
            return RawData(make_spec(folder.resolve().name, values, scans, args), cases)
    raise MissingFileError(f"--input {folder} holds no data set that is known; expected {LAYOUTS}")


def _refuse_flags(args: argparse.Namespace, flags: Sequence[str], why: str) -> None:
    """Raise an `InputError` for a flag that would be ignored."""
    for flag in flags:
        if getattr(args, flag) is not None:
            raise InputError(f"--{flag} is of no use here: {why}; leave it out")


def find_btcv(folder: Path, base: Path) -> dict[str, RawCase]:
    """BTCV's numbered files, or those of a data set that is named like them."""
    remedy = f"expected {LAYOUTS}"
    found: dict[str, dict[int, ScanFile]] = {}
    for kind in ("img", "label"):
        require_folder(base / kind, what="folder", remedy=remedy)
        found[kind] = _numbered(base / kind)
    if not any(found.values()):
        raise MissingFileError(f"{base / 'img'} holds no img0001.nii.gz …; {remedy}")
    lonely = [
        scan.path.name
        for kind, other in (("img", "label"), ("label", "img"))
        for number, scan in found[kind].items()
        if number not in found[other]
    ]
    if lonely:
        raise MissingFileError(
            f"{len(lonely)} files in {base} have no partner: {first_few(lonely)}; every "
            "img/img0001.nii.gz needs its label/label0001.nii.gz, and the reverse"
        )
    return {
        name: RawCase(name, found["img"][number], found["label"][number], name)
        for number in sorted(found["img"])
        for name in [f"case{number:04d}"]
    }


def _numbered(folder: Path) -> dict[int, ScanFile]:
    """The NIfTI files of a folder by their number; other visible files are warned of."""
    found: dict[int, ScanFile] = {}
    others = []
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        match = re.fullmatch(rf"{folder.name}(\d+)(\.nii(?:\.gz)?)", path.name)
        if match is None:
            others.append(path.name)
        elif int(match[1]) in found:
            raise InputError(
                f"{folder} holds {found[int(match[1])].path.name} and {path.name}, two files of "
                "one case; keep one"
            )
        else:
            found[int(match[1])] = ScanFile(path.name[: match.start(2)], path, match[2])
    if others:
        warn(f"ignored in {folder}, not named {folder.name}0001.nii.gz: {first_few(others)}")
    return found


def pair(
    images: Path, labels: Path, channel: int | None, group: str = "auto"
) -> dict[str, RawCase]:
    """Match labels with the images of their name, or of their name and a channel (`_0000`).

    Raises:
        MissingFileError: a label without its image. Images without a label are warned of.
        InputError: a channel has to be named, or there is none of that number.
    """
    by_name = {scan.name: scan for scan in find_scans(images)}
    cases: dict[str, RawCase] = {}
    lonely = []
    for label in find_scans(labels):
        image = by_name.get(f"{label.name}_{channel or 0:04d}") or by_name.get(label.name)
        if image is None:
            lonely.append(label.path.name)
            continue
        if channel is None and f"{label.name}_0001" in by_name:
            raise InputError(
                f"{images} has several channels of {label.name} (_0000, _0001, …), of which the "
                "network takes one; pass --channel N"
            )
        image = replace(image, channel=channel)
        _refuse_lost_channel(image)
        cases[label.name] = RawCase(label.name, image, label, label.name)
    if lonely:
        raise MissingFileError(
            f"{len(lonely)} labels in {labels} have no image of their name in {images}: "
            f"{first_few(lonely)}; add the images, or remove the labels"
        )
    used = {re.sub(r"_\d{4}$", "", c.image.name) for c in cases.values()} | cases.keys()
    unused = [n for n in by_name if n not in used and re.sub(r"_\d{4}$", "", n) not in used]
    if unused:
        warn(
            f"{len(unused)} images in {images} have no label and are left out: {first_few(unused)}"
        )
    grouped = all(case.image.is_picture for case in cases.values()) and group != "none"
    return dict(sorted((_grouped(cases) if grouped else cases).items()))


def _refuse_lost_channel(image: ScanFile) -> None:
    """Raise an `InputError` if a channel is asked for that neither a name nor the file has."""
    if not image.channel or image.name.endswith(f"_{image.channel:04d}"):
        return
    try:
        read_scan_header(replace(image, channel=None))
    except InputError:
        return  # 4-D, or damaged: both show when it is read
    raise InputError(f"--channel is {image.channel}, {image.path} holds one channel, 0")


def _grouped(cases: dict[str, RawCase]) -> dict[str, RawCase]:
    """Pictures named SCAN_NUMBER as slices of their scans, if there are several scans so.

    Raises:
        InputError: two of them would have one name.
    """
    parts = {name: NUMBERED.fullmatch(name) for name in cases}
    scans = {match[1] for match in parts.values() if match}
    # a picture that is named as a scan is one of its slices
    slices = {name: match.groups() if match else (name, "") for name, match in parts.items()
              if match or name in scans}  # fmt: skip
    if not are_slices([scan for scan, _ in slices.values()]):
        return cases
    print(
        f"{len(slices)} pictures of {len(scans)} scans, by what stands before the last _ of their "
        "names; a scan is never split (--group none: every picture by itself)"
    )
    alone = [name for name in cases if name not in slices]
    if alone:
        warn(f"{len(alone)} pictures end by no number and stay by themselves: {first_few(alone)}")
    renamed: dict[str, RawCase] = {}
    for name, case in cases.items():
        scan, number = slices.get(name, (name, None))
        own = name if number is None else f"{scan}_slice{number}"
        if own in renamed:
            both = f"{renamed[own].image.path.name} and {case.image.path.name}"
            raise InputError(f"{both} would both become {own}; rename one, or pass --group none")
        renamed[own] = replace(case, name=own, group=scan)
    return renamed


def _described(folder: Path, args: argparse.Namespace) -> RawData:
    why = f"{folder / DESCRIPTOR} says what the classes are"
    _refuse_flags(args, ("dataset", "class_names"), why)
    told = read_descriptor(folder / DESCRIPTOR, args.channel)
    for kind in ("imagesTr", "labelsTr"):
        require_folder(folder / kind, what="folder", remedy=f"{DESCRIPTOR} beside it needs it")
    cases = pair(folder / "imagesTr", folder / "labelsTr", told.channel, args.group)
    if told.training is not None and told.training != len(cases):
        warn(f"{DESCRIPTOR} says numTraining {told.training}, labelsTr holds {len(cases)} labels")
    test = None
    if (folder / "imagesTs").is_dir() and (folder / "labelsTs").is_dir():
        own = pair(folder / "imagesTs", folder / "labelsTs", told.channel, args.group)
        both = sorted(own.keys() & cases.keys())
        if both:
            raise InputError(f"{folder} has {first_few(both)} in imagesTr and imagesTs; rename one")
        test, cases = tuple(own), dict(sorted((cases | own).items()))
    name = told.name or folder.resolve().name
    scans = [case.image for case in cases.values()]
    return RawData(make_spec(name, told.values, scans, args, told.modality), cases, test)
