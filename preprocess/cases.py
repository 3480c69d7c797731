"""The cases of a raw data set: their files, their roles and the names of what they become."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.registry import DatasetSpec, case_name, slice_name
from safe_io import InputError, MissingFileError, first_few, require_folder
from volumes import Geometry, read_header

FORMAT = 1  # raise it when the outputs change, so that finished cases are converted again
TRAIN, TEST = "train", "test"
SLICES, VOLUMES, LISTS, RECORDS = "train_npz", "test_vol_h5", "lists", ".done"
LAYOUT = "Training/img/img0001.nii.gz … and Training/label/label0001.nii.gz …"


@dataclass(frozen=True)
class Job:
    """One case and all that decides its outputs."""

    number: int
    image_path: Path
    label_path: Path
    roles: tuple[str, ...]  # TRAIN, TEST or both
    spec: DatasetSpec
    label_values: str  # "raw" or "classes"
    size: int | None  # of training slices; None keeps the scan's
    output: Path

    @property
    def name(self) -> str:
        return case_name(self.number)

    @property
    def record_path(self) -> Path:
        return self.output / RECORDS / f"{self.name}.json"

    @property
    def volume_path(self) -> Path:
        return self.output / VOLUMES / f"{self.name}.npy.h5"

    def slice_path(self, index: int) -> Path:
        return self.output / SLICES / f"{slice_name(self.number, index)}.npz"

    def key(self) -> dict[str, Any]:
        """What a record must hold for its case to be up to date, in plain JSON."""
        return {
            "format": FORMAT,
            "dataset": self.spec.name,
            "classes": list(self.spec.class_names),
            "window": list(self.spec.window),
            "label_values": self.label_values,
            "raw_labels": {str(raw): cls for raw, cls in self.spec.raw_labels.items()},
            "size": self.size if TRAIN in self.roles else None,
            "roles": list(self.roles),
            "sources": [
                [path.name, path.stat().st_size, path.stat().st_mtime_ns]
                for path in (self.image_path, self.label_path)
            ],
        }


def outputs(job: Job, slices: int) -> Iterator[Path]:
    """Every file that a case of so many slices leaves, but for its record."""
    if TRAIN in job.roles:
        yield from (job.slice_path(index) for index in range(slices))
    if TEST in job.roles:
        yield job.volume_path


def find_cases(folder: Path) -> dict[int, tuple[Path, Path]]:
    """Image and label file of every case, ascending by number.

    Raises:
        MissingFileError: the folder, or `img` and `label` in it, or the partner of a file.
        InputError: two files of one number, or none at all.
    """
    remedy = f"expected the folder that holds {LAYOUT}"
    folder = require_folder(folder, what="--input", remedy=remedy)
    base = folder / "Training" if (folder / "Training").is_dir() else folder
    for kind in ("img", "label"):
        require_folder(base / kind, what="folder", remedy=remedy)
    images, labels = numbered_files(base / "img"), numbered_files(base / "label")
    if not images and not labels:
        raise MissingFileError(f"{base / 'img'} holds no img0001.nii.gz …; {remedy}")
    lonely = [path.name for number, path in images.items() if number not in labels]
    lonely += [path.name for number, path in labels.items() if number not in images]
    if lonely:
        raise MissingFileError(
            f"{len(lonely)} files in {base} have no partner: {first_few(lonely)}; every "
            "img/img0001.nii.gz needs its label/label0001.nii.gz, and the reverse"
        )
    return {number: (images[number], labels[number]) for number in sorted(images)}


def numbered_files(folder: Path) -> dict[int, Path]:
    """The NIfTI files of a folder by their number; other visible files are warned of."""
    found: dict[int, Path] = {}
    others = []
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        match = re.fullmatch(rf"{folder.name}(\d+)\.nii(\.gz)?", path.name)
        if match is None:
            others.append(path.name)
        elif int(match[1]) in found:
            raise InputError(
                f"{folder} holds {found[int(match[1])].name} and {path.name}, two files of one "
                "case; keep one"
            )
        else:
            found[int(match[1])] = path
    if others:
        warn(f"ignored in {folder}, not named {folder.name}0001.nii.gz: {first_few(others)}")
    return found


def choose_roles(
    numbers: list[int], spec: DatasetSpec, train: list[int] | None, test: list[int] | None
) -> dict[int, tuple[str, ...]]:
    """Roles of every case: as named, else the published test cases test and all others train.

    Only a case that the user names twice gets both roles.
    """
    absent = sorted({*(train or []), *(test or [])} - set(numbers))
    if absent:
        raise MissingFileError(
            f"--train_cases or --test_cases names {first_few(absent)}, for which there is no scan; "
            f"present are {first_few(numbers, 40)}"
        )
    if test is None:
        test = [number for number in spec.test_cases if number not in (train or [])]
    if train is None:
        train = [number for number in numbers if number not in test]
    chosen = {TRAIN: set(train), TEST: set(test)}
    return {n: tuple(role for role in chosen if n in chosen[role]) for n in numbers}


def check_headers(jobs: list[Job]) -> tuple[list[tuple[int, ...]], list[str]]:
    """Compare the headers of every image and label: the shapes (D, H, W), and what is wrong."""
    shapes, problems = [], []
    for job in jobs:
        try:
            shape, geometry = read_header(job.image_path)
            check_pair(job, shape, geometry, *read_header(job.label_path))
            shapes.append(shape)
        except InputError as error:
            problems.append(str(error))
    return shapes, problems


def check_pair(
    job: Job,
    shape: tuple[int, ...],
    geometry: Geometry,
    label_shape: tuple[int, ...],
    label_geometry: Geometry,
) -> None:
    """Raise an `InputError` unless image and label cover the same voxels."""
    differences = geometry.differences(label_geometry)
    if shape != label_shape:
        differences.insert(0, f"shape (D, H, W) {shape} and {label_shape}")
    if differences:
        raise InputError(
            f"{job.image_path} and {job.label_path} differ in {'; '.join(differences)}; export "
            "the label on the image's grid"
        )


def warn(message: str) -> None:
    """Print one line of warning on stderr."""
    print(f"warning: {message}", file=sys.stderr)
