"""What a network was trained on, measured in the training slices themselves.

A run records it in `config.json` and in its adapters. Test data are compared with it, because data
that were prepared in another way give wrong scores without any error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from common.errors import InputError, first_few
from datasets.prepared_files import SampleFacts

MOST_SIZES = 20  # recorded
# Ratio of the longer side of a slice to the shorter one, compared with the training slices:
ODD_SHAPE = 1.25  # a scan of this kind is unusual
WRONG_SHAPE = 2.0  # no scan of the same kind has such slices
NARROW_RANGE = 0.25  # of the training data's range of intensities
EMPTY_RANGE = 0.4  # at one end of that range, if no volume has such intensities


@dataclass(frozen=True)
class TrainedOn:
    """Facts about all training slices together."""

    cases: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]  # (rows, columns), the most frequent first
    low: float  # smallest and largest intensity
    high: float
    voxels: tuple[int, ...]  # of each class, background first
    colour: bool = False

    @classmethod
    def measured(cls, slices: Sequence[SampleFacts], cases: Iterable[str]) -> TrainedOn:
        """Sum up the facts about the training slices, and name the cases that are trained on."""
        sizes = Counter(tuple(fact.shape) for fact in slices)
        voxels = zip(*(fact.voxels for fact in slices), strict=True)
        return cls(
            cases=tuple(sorted(cases)),
            sizes=tuple(size for size, _ in sizes.most_common(MOST_SIZES)),
            low=min(fact.low for fact in slices),
            high=max(fact.high for fact in slices),
            voxels=tuple(map(sum, voxels)),
            colour=any(fact.colour for fact in slices),
        )

    @classmethod
    def from_json(cls, values: Any) -> TrainedOn | None:
        """Read what `to_json` made; None if a file holds nothing of this form."""
        try:
            found = cls(
                cases=tuple(values["cases"]),
                sizes=tuple((rows, columns) for rows, columns in values["sizes"]),
                low=values["low"],
                high=values["high"],
                voxels=tuple(values["voxels"]),
                colour=values["colour"],
            )
        except (KeyError, TypeError, ValueError):
            return None
        counts = (*(side for size in found.sizes for side in size), *found.voxels)
        valid = (
            all(type(case) is str for case in found.cases)
            and all(type(count) is int and count >= 0 for count in counts)
            and 0 < len(found.sizes) <= MOST_SIZES
            and min(map(min, found.sizes)) > 0
            and all(type(limit) in (int, float) for limit in (found.low, found.high))
            and -math.inf < found.low <= found.high < math.inf
            and type(found.colour) is bool
        )
        return found if valid else None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        return values | {"sizes": [list(size) for size in self.sizes]}

    def with_cases(self, cases: Iterable[str]) -> TrainedOn:
        """Return the same facts with more cases."""
        return replace(self, cases=tuple(sorted({*self.cases, *cases})))

    @property
    def size(self) -> int | None:
        """The side of the slices if all of them are squares of one size, else None."""
        rows, columns = self.sizes[0]
        return rows if len(self.sizes) == 1 and rows == columns else None

    @property
    def elongation(self) -> float:
        """The ratio of the longer to the shorter side, of the longest slice."""
        return max(max(size) / min(size) for size in self.sizes)


def check_test_data(
    volumes: Sequence[SampleFacts], trained: TrainedOn | None, class_names: Sequence[str]
) -> list[str]:
    """Compare test volumes with the training data; return warnings.

    Args:
        trained: None: the adapter does not record it, and was trained on square slices, as the
            published ones.

    Raises:
        InputError: the slices of a volume cannot be of the same kind as the training slices.
    """
    longest = trained.elongation if trained else 1.0
    odd = []
    for volume in volumes:
        depth, rows, columns = volume.shape
        ratio = max(rows, columns) / min(rows, columns)
        if ratio > WRONG_SHAPE * longest and depth > 1:
            raise InputError(_wrong_shape(volume.name, volume.shape, trained))
        sizes = trained.sizes if trained else ()
        turned = (depth, rows) in sizes and (rows, columns) not in sizes
        if ratio > ODD_SHAPE * longest or turned:
            odd.append(f"{volume.name} {rows}×{columns}")
    warnings = []
    if odd:
        seen = (
            "square slices" if longest == 1 else f"slices up to {longest:.2g} times as long as wide"
        )
        warnings.append(
            f"{len(odd)} test volumes have slices of another shape than the training data "
            f"({seen}): {first_few(odd)}; check the order of their axes, (slice, row, column)"
        )
    if trained is None:
        return warnings
    warnings += _other_range(volumes, trained)
    tested = [sum(column) for column in zip(*(v.voxels for v in volumes), strict=True)]
    pairs = zip(class_names, tested[1:], trained.voxels[1:], strict=False)
    unseen = [name for name, test, train in pairs if test and not train]
    if unseen:
        warnings.append(f"no training slice had {first_few(unseen)}, which the test labels have")
    return warnings


def _other_range(volumes: Sequence[SampleFacts], trained: TrainedOn) -> list[str]:
    """Return a warning if the intensities of volumes differ from those of the training slices."""
    spread = trained.high - trained.low
    narrow = [
        f"{volume.name} {volume.low:.3g}…{volume.high:.3g}"
        for volume in volumes
        if volume.high - volume.low < NARROW_RANGE * spread
        or volume.high > trained.high + spread / 2
        or volume.low < trained.low - spread / 2
    ]
    if narrow:
        return [
            f"the intensities of {len(narrow)} test volumes differ from those of the training "
            f"slices, {trained.low:.3g}…{trained.high:.3g}: {first_few(narrow)}; prepare both in "
            "the same way"
        ]
    lowest, highest = min(v.low for v in volumes), max(v.high for v in volumes)
    room = EMPTY_RANGE * spread
    if lowest > trained.low + room or highest < trained.high - room:
        return [
            f"the intensities of all test volumes, {lowest:.3g}…{highest:.3g}, leave out one end "
            f"of those of the training slices, {trained.low:.3g}…{trained.high:.3g}; prepare both "
            "in the same way"
        ]
    return []


def _wrong_shape(name: str, shape: tuple[int, ...], trained: TrainedOn | None) -> str:
    depth, rows, columns = shape
    size = "×".join(map(str, trained.sizes[0])) if trained else "square slices"
    if columns < min(depth, rows):
        remedy = f"transpose it to ({columns}, {depth}, {rows})"
    elif rows < min(depth, columns):
        remedy = f"transpose it to ({rows}, {depth}, {columns})"
    else:
        remedy = "slice it in the plane of the training data"
    return (
        f"{name} has the shape {shape}, so slices of {rows}×{columns}, but the network was trained "
        f"on {size}; expected the axes (slice, row, column): {remedy}"
    )
