"""The cases of a raw data set: their roles, checks, and the names of what they become."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError, MissingFileError, first_few
from datasets.names import case_names, slice_name
from datasets.registry import DatasetSpec
from datasets.scans.files import read_scan_header, stamp
from datasets.scans.orientation import orientation_of, turned, turned_geometry
from datasets.scans.volumes import Geometry

from .layouts import RawCase, RawData

FORMAT = 3  # raise it when the outputs change, so that finished cases are converted again
TRAIN, TEST = "train", "test"
SLICES, VOLUMES, LISTS, RECORDS = "train_npz", "test_vol_h5", "lists", ".done"


@dataclass(frozen=True)
class Job:
    """One case and all that decides its outputs."""

    case: RawCase
    roles: tuple[str, ...]  # TRAIN, TEST or both
    spec: DatasetSpec
    label_values: str  # "raw" or "classes"
    output: Path

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def record_path(self) -> Path:
        return self.output / RECORDS / f"{self.name}.json"

    @property
    def volume_path(self) -> Path:
        return self.output / VOLUMES / f"{self.name}.npy.h5"

    def slice_names(self, count: int) -> list[str]:
        """Of the training slices; a picture that is a slice of a scan has its number already."""
        if self.case.group != self.name:
            return [self.name]
        return [slice_name(self.name, index) for index in range(count)]

    def slice_path(self, name: str) -> Path:
        return self.output / SLICES / f"{name}.npz"

    def outputs(self, slices: int) -> Iterator[Path]:
        """Every file that the case leaves if it has so many slices, but for its record."""
        if TRAIN in self.roles:
            yield from map(self.slice_path, self.slice_names(slices))
        if TEST in self.roles:
            yield self.volume_path

    def leftovers(self) -> Iterator[Path]:
        """All that earlier runs left of the case, unfinished files of a killed run included."""
        number = r"_slice\d+" if self.case.group == self.name else ""
        for folder, ending in ((SLICES, rf"{number}\.npz"), (VOLUMES, r"\.npy\.h5"),
                               (RECORDS, r"\.json")):  # fmt: skip
            own = re.compile(rf"(\.\d+\.partial\.)?{re.escape(self.name)}{ending}")
            yield from (p for p in (self.output / folder).iterdir() if own.fullmatch(p.name))

    def key(self) -> dict[str, Any]:
        """What a record must hold for its case to be up to date, in plain JSON."""
        spec = self.spec.to_json()
        if TRAIN not in self.roles:
            spec["size"] = None  # of training slices alone
        return {
            "format": FORMAT,
            "spec": {k: v for k, v in spec.items() if k not in ("train_cases", "test_cases")},
            "label_values": self.label_values,
            "roles": list(self.roles),
            "channel": self.case.image.channel,
            "sources": [stamp(scan.path) for scan in (self.case.image, self.case.label)],
        }


@dataclass(frozen=True)
class Split:
    """How the user wants cases shared out; None: not said."""

    train: Sequence[str] | None
    test: Sequence[str] | None
    test_share: float
    folds: int | None
    fold: int
    seed: int


def choose_roles(data: RawData, split: Split) -> dict[str, tuple[str, ...]]:
    """Roles of every case.

    In this order: the cases that are named, the fold, the published test cases, the folder's own
    test cases, a seeded share; all others train. A case that the user names twice has both roles.

    Raises:
        MissingFileError: a case is named for which there is no scan.
        InputError: there is nothing to split.
    """
    test = None if split.test is None else _resolve(data, split.test)
    train = None if split.train is None else _resolve(data, split.train)
    if test is None and split.folds is None:
        published = [name for name in data.spec.test_cases if name in data.cases]
        own = published if data.spec.test_cases else data.test
        test = None if own is None else [name for name in own if name not in (train or [])]
    if test is None:
        candidates = {n: c.group for n, c in data.cases.items() if n not in (train or [])}
        test = _drawn(candidates, split)
    if train is None:
        train = [name for name in data.cases if name not in test]
    chosen = {TRAIN: set(train), TEST: set(test)}
    return {name: tuple(role for role in chosen if name in chosen[role]) for name in data.cases}


def _resolve(data: RawData, wanted: Sequence[str]) -> list[str]:
    """The cases that names, scans of pictures, or BTCV's numbers mean."""
    found: list[str] = []
    absent = []
    for name in wanted:
        names = {name, *(case_names(int(name)) if re.fullmatch(r"\d{1,9}", name) else ())}
        own = [c.name for c in data.cases.values() if names & {c.name, c.group, c.image.name}]
        found += own
        absent += [] if own else [name]
    if absent:
        raise MissingFileError(
            f"--train_cases or --test_cases names {first_few(absent)}, for which there is no scan; "
            f"present are {first_few(_groups(data), 40)}"
        )
    return found


def _drawn(candidates: dict[str, str], split: Split) -> list[str]:
    """A seeded share or fold of the groups, the same for the same names."""
    groups = sorted(set(candidates.values()))
    if len(groups) < 2 or (split.folds or 0) > len(groups):
        raise InputError(
            f"{len(groups)} case(s) cannot be split into {split.folds or 2} parts; name them by "
            "--train_cases and --test_cases (one in both: an overfit check)"
        )
    order = np.random.default_rng(split.seed).permutation(groups).tolist()
    if split.folds is not None:
        chosen = order[split.fold :: split.folds]
    else:
        chosen = order[: min(len(groups) - 1, max(1, round(split.test_share * len(groups))))]
    return [name for name, group in candidates.items() if group in chosen]


def _groups(data: RawData) -> list[str]:
    return list(dict.fromkeys(case.group for case in data.cases.values()))


def check_headers(
    jobs: list[Job],
) -> tuple[list[tuple[tuple[int, ...], Geometry | None]], list[str]]:
    """Compare the headers of every image and label.

    Returns:
        Shapes (D, H, W) and geometries of the images, and what is wrong.
    """
    headers, problems = [], []
    for job in jobs:
        try:
            shape, geometry = read_scan_header(job.case.image)
            label_shape, label_geometry = read_scan_header(job.case.label)
            voxels = np.broadcast_to(np.uint8(0), label_shape)  # they are not read yet
            laid_on_image(job, shape, geometry, voxels, label_geometry)
            headers.append((shape, geometry))
        except InputError as error:
            problems.append(str(error))
    return headers, problems


def laid_on_image(
    job: Job,
    shape: tuple[int, ...],
    geometry: Geometry | None,
    label: np.ndarray,
    label_geometry: Geometry | None,
) -> np.ndarray:  # (D, H, W) of the image
    """The label, its axes turned to the image's if it then covers the same voxels.

    Raises:
        InputError: it does not lie on the image's grid.
    """
    differences = []
    if geometry and label_geometry:
        differences = geometry.differences(label_geometry)
        letters = orientation_of(label_geometry), orientation_of(geometry)
        if letters[0] != letters[1]:
            laid = turned(label, *letters)
            there = turned_geometry(label_geometry, label.shape, letters[1])
            if laid.shape == shape and geometry.matches(there):
                return laid
    if shape != label.shape:
        differences.insert(0, f"shape (D, H, W) {shape} and {label.shape}")
    if differences:
        raise InputError(
            f"{job.case.image.path} and {job.case.label.path} differ in "
            f"{'; '.join(differences)}; export the label on the image's grid"
        )
    return label
