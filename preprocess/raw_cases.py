"""Pairs of image and label files: numbered like BTCV's, or with the same names."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import InputError, MissingFileError, first_few, warn
from common.files import require_folder
from datasets.names import NUMBERED, are_slices
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
    group: str  # the scan of a picture, else the case itself; a group is never split

    @property
    def is_slice(self) -> bool:
        """Whether the case is a picture that is one slice of a scan."""
        return self.group != self.name


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
    images: Path, labels: Path, channel: int | None, group: str = "auto"
) -> dict[str, RawCase]:
    """Match each label with the image of the same name, or of this name and a channel (`_0000`).

    Args:
        channel: number of the channel; None: there must be only one.
        group: "auto": pictures named SCAN_NUMBER become slices of their scans; "none": they do not.

    Raises:
        MissingFileError: a label has no image. (Images without label only give a warning.)
        InputError: the user must choose a channel, or the chosen channel does not exist.
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
                f"{images} has several channels of {label.name} (_0000, _0001, …) but the network "
                "reads only one; pass --channel N"
            )
        image = replace(image, channel=channel)
        _refuse_absent_channel(image)
        cases[label.name] = RawCase(name=label.name, image=image, label=label, group=label.name)
    if lonely:
        raise MissingFileError(
            f"{len(lonely)} labels in {labels} have no image of the same name in {images}: "
            f"{first_few(lonely)}; add the images, or remove the labels"
        )
    used = {re.sub(r"_\d{4}$", "", c.image.name) for c in cases.values()} | cases.keys()
    unused = [n for n in by_name if n not in used and re.sub(r"_\d{4}$", "", n) not in used]
    if unused:
        warn(
            f"{len(unused)} images in {images} have no label and are left out: {first_few(unused)}"
        )
    if group != "none" and all(case.image.is_picture for case in cases.values()):
        cases = _grouped_by_scan(cases)
    return dict(sorted(cases.items()))


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


def _grouped_by_scan(cases: dict[str, RawCase]) -> dict[str, RawCase]:
    """Turn pictures named SCAN_NUMBER into slices of their scans, if `are_slices` recognises them.

    Raises:
        InputError: two pictures would get the same name.
    """
    matches = {name: NUMBERED.fullmatch(name) for name in cases}
    scans = {match[1] for match in matches.values() if match}
    slices: dict[str, tuple[str, str]] = {}  # picture -> (scan, number)
    for name, match in matches.items():
        if match:
            slices[name] = (match[1], match[2])
        elif name in scans:  # a picture with the name of a scan is one of its slices
            slices[name] = (name, "")
    if not are_slices([scan for scan, _ in slices.values()]):
        return cases
    print(
        f"{len(slices)} pictures of {len(scans)} scans were found by their names (SCAN_NUMBER); "
        "the slices of a scan stay together (--group none: every picture is a case)"
    )
    alone = [name for name in cases if name not in slices]
    if alone:
        warn(
            f"{len(alone)} pictures have no number at the end of their name, so each is a case: "
            f"{first_few(alone)}"
        )
    renamed: dict[str, RawCase] = {}
    for name, case in cases.items():
        new_name, scan = name, name
        if name in slices:
            scan, number = slices[name]
            new_name = f"{scan}_slice{number}"
        if new_name in renamed:
            both = f"{renamed[new_name].image.path.name} and {case.image.path.name}"
            raise InputError(
                f"{both} would both become {new_name}; rename one of them, or pass --group none"
            )
        renamed[new_name] = replace(case, name=new_name, group=scan)
    return renamed
