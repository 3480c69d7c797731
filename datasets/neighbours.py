"""A slice between its neighbours, as the three channels of the network's input (2.5-D).

Training slices know their neighbours by the numbers in their names, the slices of a volume by its
first axis. preprocess numbers slices along that axis, and predict.py turns scans to the orientation
of the training data. So "before" means the same everywhere. The first and the last slice of a case
repeat themselves in the place of the neighbour that does not exist.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError, first_few, warn
from datasets.names import WRITTEN_SLICE, case_of
from datasets.prepared_files import SampleFacts

BETWEEN_NEIGHBOURS = 3  # value of --input_slices


def slices_around(names: Sequence[str], source: object) -> dict[str, tuple[str, str]]:
    """Return for each training slice the names of the slices before and after it in its case.

    A slice whose neighbour is not among the names stands in for it. At the ends of a case that is
    the rule. Elsewhere slices were left out of the list, and a warning counts them.

    Args:
        names: like `case0005_slice012`.
        source: the list that holds the names, for messages.

    Raises:
        InputError: a name has no number of a slice, or two slices of a case have the same number.
    """
    odd = [name for name in names if case_of(name) == name]
    if odd:
        raise InputError(
            f"{source} names {len(odd)} slices without a number ({first_few(odd)}), expected "
            "<case>_slice<number>, which tells the neighbours of --input_slices 3; rename them, or "
            "train with --input_slices 1"
        )
    cases: dict[str, dict[int, str]] = defaultdict(dict)
    for name in dict.fromkeys(names):
        other = cases[case_of(name)].setdefault(_number(name), name)
        if other != name:
            raise InputError(
                f"{source} names {other} and {name}, which are the same slice of a case; remove one"
            )
    around, alone = {}, 0
    for numbered in cases.values():
        first, last = min(numbered), max(numbered)
        for number, name in numbered.items():
            around[name] = (numbered.get(number - 1, name), numbered.get(number + 1, name))
            alone += bool({max(number - 1, first), min(number + 1, last)} - numbered.keys())
    if alone:
        warn(
            f"{alone} of {len(around)} slices lack a neighbour inside their case, because {source} "
            "does not name it; they take its place themselves"
        )
    return around


def _number(name: str) -> int:
    return int(WRITTEN_SLICE.search(name)[0].removeprefix("_slice").removeprefix("_"))


def require_channels(slices: Sequence[SampleFacts]) -> None:
    """Raise an `InputError` for slices that cannot be the channels of one image."""
    refuse_colour(slices, BETWEEN_NEIGHBOURS)
    firsts: dict[str, SampleFacts] = {}
    for facts in slices:
        first = firsts.setdefault(case_of(facts.name), facts)
        if facts.shape != first.shape:
            raise _of_other_size(first.name, facts.name)


def with_neighbours(
    before: np.ndarray, after: np.ndarray, image: np.ndarray, path: Path
) -> np.ndarray:  # three times (H, W) -> (3, H, W): before, the slice, after
    """Stack a training slice and its neighbours.

    Args:
        path: the file of the slice, for messages.
    """
    if image.ndim != 2:
        raise _in_colour(path)
    if not before.shape == image.shape == after.shape:
        raise _of_other_size(path, "a neighbour")
    return np.stack([before, image, after])


@dataclass(frozen=True)
class BetweenNeighbours:
    """The slices of a volume between their neighbours, stacked a few at a time."""

    volume: Any  # (D, H, W), or an object with this `shape` whose slices are such arrays

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape (D, 3, H, W)."""
        depth, *size = self.volume.shape
        return (depth, 3, *size)

    def __getitem__(self, part: slice) -> np.ndarray:  # (B, 3, H, W): before, the slice, after
        depth = self.volume.shape[0]
        numbers = np.arange(depth)[part]
        wanted = (numbers[:, None] + [-1, 0, 1]).clip(0, depth - 1)
        first = wanted.min()
        return np.asarray(self.volume[first : wanted.max() + 1])[wanted - first]


def network_slices(volume: Any, input_slices: int, name: object) -> Any:
    """Return a volume as `predict_volume` takes it for a network of `--input_slices`.

    Args:
        volume: (D, H, W), or an object with this `shape` whose slices are such arrays.
        name: of the volume, for messages.

    Raises:
        InputError: a volume in colour, for a network that sees neighbours as channels.
    """
    if input_slices != BETWEEN_NEIGHBOURS:
        return volume
    if len(volume.shape) != 3:
        raise _in_colour(name)
    return BetweenNeighbours(volume)


def refuse_colour(samples: Sequence[SampleFacts], input_slices: int) -> None:
    """Raise an `InputError` for images in colour, if the network has neighbours as channels."""
    coloured = [facts.name for facts in samples if facts.colour]
    if coloured and input_slices == BETWEEN_NEIGHBOURS:
        raise _in_colour(coloured[0])


def refuse_pictures(names: Sequence[object], input_slices: int) -> None:
    """Raise an `InputError` for pictures, if the network sees a slice between its neighbours.

    Args:
        names: of the pictures; may be empty.
    """
    if names and input_slices == BETWEEN_NEIGHBOURS:
        raise InputError(
            f"{len(names)} pictures have no slices before and after them ({first_few(names)}), "
            "which --input_slices 3 needs; use scans, or a network of --input_slices 1"
        )


def _in_colour(name: object) -> InputError:
    return InputError(
        f"{name} is in colour, but --input_slices 3 needs the three channels for the slice and its "
        "neighbours; use grey images, or --input_slices 1"
    )


def _of_other_size(name: object, other: object) -> InputError:
    return InputError(
        f"{name} and {other} are slices of one case but differ in size, so they cannot be the "
        "channels of one image (--input_slices 3); prepare the case again with slices of one size"
    )
