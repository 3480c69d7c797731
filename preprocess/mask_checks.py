"""Whether the values of label files can be classes: grey edges, mixed encodings, counted objects.

A class has an interior: now and then, a block of 3 × 3 pixels holds only its value.
Smooth drawing, scaling and lossy compression make values that have none: they occur where a lower
value meets a higher one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from common.errors import InputError, first_few, warn

# So many values without interior are accepted in a picture that is too small or too rough to have
# an interior anywhere.
MOST_OF_ROUGH = 8
MOST_COUNTED = 20  # classes of which each file may hold the first few; more are counted objects
FEW_COUNTED, COUNTS = 5, 3  # from so many on, in so many different numbers, they may be objects
WIDE = 64  # from this largest value on, values are a grey scale and no numbers of classes
CLOSE = 8  # a value this close to a class in a grey scale is a trace of compression
NAME_THEM = "or, if every value is a class, name each of them by --class_names"


@dataclass
class LabelFile:
    """What the values of one label file look like."""

    name: str
    counts: dict[int, int] = field(default_factory=dict)  # pixels of each value
    # Those of them that have both lower and higher values around.
    between: dict[int, int] = field(default_factory=dict)
    interior: dict[int, int] = field(default_factory=dict)  # in 3 × 3 pixels of their value
    palette: list[str] | None = None  # colours by index
    largest: float = 0.0  # value before a threshold was applied

    @property
    def values(self) -> set[int]:
        """The values of the file, without background."""
        return self.counts.keys() - {0}

    def add(self, plane: np.ndarray) -> None:
        """Look at one slice (H, W) of whole numbers 0…65535."""
        seen = _add(self.counts, plane.ravel())
        lowest, highest = _around(plane, np.minimum), _around(plane, np.maximum)
        inside = plane[1:-1, 1:-1][(lowest == highest)[1:-1, 1:-1]]
        _add(self.interior, inside)
        if len(seen) > 2:
            _add(self.between, plane[(lowest < plane) & (plane < highest)])

    def grey(self, solid: set[int]) -> list[int]:
        """Return the values that are edges and no classes, if they are too many to be classes.

        Args:
            solid: values that have an interior in any file of the data set.
        """
        wide = max(self.values, default=0) >= WIDE

        def is_grey(value: int) -> bool:
            if value in solid:
                return False
            close = wide and any(abs(value - kept) <= CLOSE for kept in solid)
            return close or 2 * self.between.get(value, 0) >= self.counts[value]

        found = [value for value in sorted(self.values) if is_grey(value)]
        rare = 4 * sum(self.counts[v] for v in found) < sum(self.counts[v] for v in self.values)
        usual = max(len(self.values & solid), 1) - (wide and rare)
        if not self.interior:
            usual = MOST_OF_ROUGH
        return found if len(found) > usual else []


def _add(totals: dict[int, int], values: np.ndarray) -> list[int]:
    """Add the counts of values (N,) to `totals`, and return the different values."""
    counts = np.bincount(values)
    seen = np.flatnonzero(counts).tolist()
    for value in seen:
        totals[value] = totals.get(value, 0) + int(counts[value])
    return seen


def _solid_values(files: Sequence[LabelFile]) -> set[int]:
    """Return the values with an interior: a pixel in a hundred has only its value around it."""
    counts, interior = Counter(), Counter()
    for file in files:
        counts.update(file.counts)
        interior.update(file.interior)
    return {value for value, inside in interior.items() if 100 * inside >= counts[value]}


def _around(plane: np.ndarray, choose: np.ufunc) -> np.ndarray:  # (H, W) -> (H, W)
    """Return the smallest or largest value among each pixel and the eight around it."""
    padded = np.pad(plane, 1, mode="edge")
    rows = choose(choose(padded[:-2], padded[1:-1]), padded[2:])
    return choose(choose(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def check_values(files: Sequence[LabelFile]) -> None:
    """Refuse values that cannot all be classes, and warn of values that may be none.

    Raises:
        InputError: a file holds grey edges or a heat map, the files encode their classes in
            different ways, or objects are numbered one by one.
    """
    solid = _solid_values(files)
    _refuse_grey(files, solid)
    _refuse_mixed_encodings(files)
    _warn_of_thin(files, solid)
    highest = [max(file.values, default=0) for file in files]
    counted = all(len(file.values) == top for file, top in zip(files, highest, strict=True))
    if counted and len(set(highest)) > 1 and max(highest) > MOST_COUNTED:
        raise InputError(
            f"every label holds the values from 1 to another number, up to {max(highest)} in "
            f"{files[int(np.argmax(highest))].name}, as if objects (instances) were counted; "
            f"pass --label_threshold 1 to make one class of all objects, {NAME_THEM}"
        )
    if counted and len(set(highest)) >= COUNTS and max(highest) >= FEW_COUNTED:
        warn(
            f"every label holds the values from 1 to another number, up to {max(highest)}; if they "
            "count objects (instances), pass --label_threshold 1 to make one class of all objects"
        )


def _warn_of_thin(files: Sequence[LabelFile], solid: set[int]) -> None:
    """Warn of values that have no interior in any file, beside others that have one."""
    thin = {value: file.name for file in reversed(files) for value in file.values - solid}
    if thin and solid - {0}:
        shown = [f"{value} in {thin[value]}" for value in sorted(thin)]
        warn(
            "some label values occur only at edges or in thin lines "
            f"({first_few(shown)}), as in labels that were smoothed, compressed or scaled with "
            "interpolation, or with a drawn border; if they are no classes, export the labels "
            f"without these, by nearest neighbour, {NAME_THEM}"
        )


def _refuse_grey(files: Sequence[LabelFile], solid: set[int]) -> None:
    grey = {file.name: values for file in files if (values := file.grey(solid))}
    if not grey:
        return
    name, values = next(iter(grey.items()))
    top = max(max(file.values) for file in files if file.name in grey)
    others = f" (and {len(grey) - 1} other files)" if len(grey) > 1 else ""
    middle = (top + 1) // 2
    one_class = all(not top / 8 < value < top * 7 / 8 for value in solid)
    remedy = (
        f"if it shows one class, pass --label_threshold {middle} to make it of the values from "
        f"{middle}, or export the masks again without smoothing"
        if one_class
        else "export the masks again without smoothing, and scale them by nearest neighbour"
    )
    count = f"{len(values)} grey value{'s' if len(values) > 1 else ''}"
    raise InputError(
        f"{name}{others} holds {count} between 0 and {top} that occur only at edges "
        f"({first_few(values)}), so not every value is a class: the mask was drawn smoothly, "
        f"scaled or compressed as JPEG; {remedy}, {NAME_THEM}"
    )


def _refuse_mixed_encodings(files: Sequence[LabelFile]) -> None:
    """Refuse values that never meet in one file, unless they are numbered 1, 2, 3 …

    So 0/1 and 0/255 are one class in two encodings, while 0/1 and 0/2 are two classes.
    """
    groups: list[tuple[set[int], list[str]]] = []  # values that meet, and their files
    for file in files:
        if not file.values:
            continue
        values, names = set(file.values), [file.name]
        for group in [group for group in groups if group[0] & values]:
            groups.remove(group)
            values, names = values | group[0], group[1] + names
        groups.append((values, names))
    every = set().union(*(values for values, _ in groups))
    if len(groups) < 2 or every == set(range(1, len(every) + 1)):
        return
    shown = "; ".join(
        f"{first_few(names, 3)} only {first_few(sorted(values), 8)}" for values, names in groups[:4]
    )
    one = f"pass --label_threshold {min(every)} if all of them are one class, "
    raise InputError(
        f"the labels hold values that never meet in one file ({shown}), as if the same class was "
        f"encoded in several ways; {one if all(len(v) == 1 for v, _ in groups) else ''}encode "
        f"them alike in all files, {NAME_THEM}"
    )


def check_palettes(files: Sequence[LabelFile]) -> None:
    """Refuse palettes in which one index has several colours; warn if black is not index 0.

    Raises:
        InputError: the palettes differ in an index that is in use.
    """
    known: dict[int, tuple[str, str]] = {}  # index -> colour, first file
    for file in files:
        for index in sorted(file.counts):
            if file.palette is None or index >= len(file.palette):
                continue
            colour, first = known.setdefault(index, (file.palette[index], file.name))
            if colour != file.palette[index]:
                raise InputError(
                    f"index {index} is {colour} in the palette of {first} and "
                    f"{file.palette[index]} in that of {file.name}, so an index is not the same "
                    "class in all files; save the labels with the same palette, or as grey PNGs "
                    "of class indices"
                )
    black = [index for index, (colour, _) in known.items() if colour == "#000000"]
    if black and 0 not in black and 0 in known:
        warn(
            f"index 0 of the label pictures is {known[0][0]} and index {black[0]} is black; index "
            "0 is background here, so check that the masks are not inverted"
        )
