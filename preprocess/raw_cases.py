"""Pairs of image and label files: numbered like BTCV's, or with the same names."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import InputError, MissingFileError, first_few, warn
from common.files import require_folder
from datasets.scans.files import ScanFile, find_scans, read_scan_header

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
    group: str  # its scan or patient, else the case itself; a random split keeps it together
    is_slice: bool = False  # whether it is a picture that is named as a slice of its group


def find_btcv(folder: Path) -> dict[str, RawCase]:
    """Find numbered files in the folders img and label, as BTCV names them.

    Raises:
        MissingFileError: there are no numbered files, or an image or label has no partner.
    """
    remedy = f"expected {LAYOUTS}"
    found: dict[str, dict[int, ScanFile]] = {}
    for kind in ("img", "label"):
        require_folder(folder / kind, what="folder", remedy=remedy)
        found[kind] = _numbered_files(folder / kind)
    images, labels = found["img"], found["label"]
    if not images and not labels:
        raise MissingFileError(f"{folder / 'img'} holds no img0001.nii.gz …, {remedy}")
    lonely = [images[number].path.name for number in images if number not in labels]
    lonely += [labels[number].path.name for number in labels if number not in images]
    if lonely:
        raise MissingFileError(
            f"{len(lonely)} files in {folder} have no partner: {first_few(lonely)}; every "
            "img/img0001.nii.gz needs its label/label0001.nii.gz, and every label its image"
        )
    cases = {}
    for number in sorted(images):
        name = f"case{number:04d}"
        cases[name] = RawCase(name=name, image=images[number], label=labels[number], group=name)
    return cases


def _numbered_files(folder: Path) -> dict[int, ScanFile]:
    """Return the NIfTI files of a folder by number; warn about other visible files."""
    found: dict[int, ScanFile] = {}
    others = []
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        match = re.fullmatch(rf"{folder.name}(\d+)(\.nii(?:\.gz)?)", path.name)
        if match is None:
            others.append(path.name)
            continue
        number = int(match[1])
        if number in found:
            raise InputError(
                f"{folder} holds {found[number].path.name} and {path.name}, which are two files of "
                "one case; remove one of them"
            )
        found[number] = ScanFile(name=path.name[: match.start(2)], path=path, suffix=match[2])
    if others:
        warn(
            f"ignored files in {folder} that are not named like {folder.name}0001.nii.gz: "
            f"{first_few(others)}"
        )
    return found


def match_files(
    images: Path, labels: Path, channel: int | None, *, of_equal_names: bool = False
) -> dict[str, RawCase]:
    """Match each label with the image of the same name, or of this name and a channel (`_0000`).

    Args:
        channel: number of the channel; None: there must be only one.
        of_equal_names: an end like `_0000` is a part of the name, and tells of no channel.

    Raises:
        MissingFileError: a label has no image. (Images without label only give a warning.)
        InputError: the user must choose a channel, or the chosen channel does not exist.
    """
    by_name = {scan.name: scan for scan in find_scans(images)}
    cases: dict[str, RawCase] = {}
    lonely = []
    for label in find_scans(labels, labels=True):
        of_channel = None if of_equal_names else by_name.get(f"{label.name}_{channel or 0:04d}")
        image = of_channel or by_name.get(label.name)
        if image is None:
            lonely.append(label)
            continue
        if channel is None and not of_equal_names and f"{label.name}_0001" in by_name:
            raise InputError(
                f"{images} has several channels of {label.name} (_0000, _0001, …) but the network "
                "reads only one; pass --channel N"
            )
        image = replace(image, channel=channel)
        _refuse_absent_channel(image)
        cases[label.name] = RawCase(name=label.name, image=image, label=label, group=label.name)
    if lonely:
        _refuse_loose_slices(images, list(by_name.values()))
        _refuse_loose_slices(labels, lonely)
        names = first_few([label.path.name for label in lonely])
        raise MissingFileError(
            f"{len(lonely)} labels in {labels} have no image of the same name in {images}: "
            f"{names}; add the images, or remove the labels"
        )
    used = {re.sub(r"_\d{4}$", "", c.image.name) for c in cases.values()} | cases.keys()
    unused = [n for n in by_name if n not in used and re.sub(r"_\d{4}$", "", n) not in used]
    if unused:
        warn(
            f"{len(unused)} images in {images} have no label and are left out: {first_few(unused)}"
        )
    return dict(sorted(cases.items()))


def _refuse_loose_slices(folder: Path, scans: list[ScanFile]) -> None:
    """Raise an `InputError` for a folder of cases that was read as one DICOM series."""
    if len(scans) == 1 and scans[0].path.resolve() == folder.resolve():
        raise InputError(
            f"{folder} holds DICOM files without folders of their own, so it is unclear which case "
            "each belongs to; put the files of each case into a folder of the case's name, in "
            f"{folder}: a series, or a single picture"
        )


def _refuse_absent_channel(image: ScanFile) -> None:
    """Raise an `InputError` for a channel that neither the file nor its name has."""
    if not image.channel or image.name.endswith(f"_{image.channel:04d}"):
        return
    try:
        read_scan_header(replace(image, channel=None))
    except InputError:
        return  # the file is 4-D or damaged; reading it later checks both
    raise InputError(
        f"--channel is {image.channel} but {image.path} holds only channel 0; leave it out"
    )
