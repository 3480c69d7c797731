"""The left and right of slices: which axis they run along, and which classes change places.

A patient seen in a mirror has the left kidney where the right one was. So a flip along the axis
from left to right keeps labels true only if the classes of both sides change places. Classes tell
their side by name. Unpaired organs keep their class and lie on the other side, as in patients with
situs inversus.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from common.errors import first_few

# English, Chinese, German, French, Spanish, Portuguese, Italian, Latin and Russian.
LEFT = {"left", "lt", "l", "左", "links", "linke", "linker", "linkes", "gauche"}
LEFT |= {"izquierdo", "izquierda", "esquerdo", "esquerda", "sinistro", "sinistra", "sx"}
LEFT |= {"sinister", "sinistrum", "sin", "левый", "левая", "левое"}
RIGHT = {"right", "rt", "r", "右", "rechts", "rechte", "rechter", "rechtes", "droit", "droite"}
RIGHT |= {"derecho", "derecha", "direito", "direita", "destro", "destra", "dx"}
RIGHT |= {"dexter", "dextra", "dextrum", "dex", "правый", "правая", "правое"}
# `LeftKidney`, `kidney_L`, `LKidney`, `左肾`
WORD = re.compile(r"[左右]|[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W_A-Za-z左右]+")
# The form, not the side, tells the chambers of the heart and the lobes of the liver.
UNLIKE = {"ventricle", "atrium", "atrial", "ventricular", "heart", "cardiac", "myocardium"}
UNLIKE |= {"liver", "hepatic"}
# What may be a side inside of a word: leftkidney, lkidney, LV.
INSIDE = re.compile(r"left|right|\b[lr]|[lr]\b")
UNNAMED = re.compile(r"class \d+")  # names of `DatasetSpec.of_plain_classes`


@dataclass(frozen=True)
class Mirror:
    """How a slice is mirrored from left to right; `axis` None: it must not be."""

    axis: int | None  # of a slice: 0 rows, 1 columns
    classes: tuple[int, ...]  # the class of 0, 1, 2 … in the mirror
    told: str  # what is done and why, for the log


@lru_cache(maxsize=16)
def mirror_of(orientation: str | None, class_names: tuple[str, ...]) -> Mirror:
    """Return how the slices of a data set are mirrored.

    Args:
        orientation: directions of the axes x, y, z, e.g. LPS; None: not known.
        class_names: names of the classes 1, 2 ….
    """
    classes = tuple(range(len(class_names) + 1))
    left_right = None if orientation is None else re.search("[LR]", orientation).start()
    if left_right is None:
        why = "the data set stores no orientation, so no axis is known to run from left to right"
    elif left_right == 2:
        why = f"its slices are sagittal ({orientation}), so left and right are different slices"
    else:
        why = _unclear(class_names)
    if why is not None:
        return Mirror(None, classes, f"rotations alone, without flips: {why}")
    pairs = _pairs(class_names)
    for one, other in pairs:
        changed = {class_names.index(one) + 1: class_names.index(other) + 1}
        changed |= {to: index for index, to in changed.items()}
        classes = tuple(changed.get(index, to) for index, to in enumerate(classes))
    swapped = "; ".join(f"{one} and {other}" for one, other in pairs)
    axis = 1 - left_right  # letters stand for x, y, z; a slice has the axes y, x
    told = f"rotations, and flips of the {('rows', 'columns')[axis]} ({orientation}), which " + (
        f"swap {swapped}" if pairs else "swap no classes, because no name of a class tells a side"
    )
    return Mirror(axis, classes, told)


def _side(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the side in a name, and the other words; two sides are "both"."""
    words = [word.lower() for word in WORD.findall(name)]
    sides = [word for word in words if word in LEFT | RIGHT]
    rest = tuple(word for word in words if word not in LEFT | RIGHT)
    if len(sides) > 1:
        return "both", rest
    return ("left" if sides[0] in LEFT else "right") if sides else None, rest


def _pairs(class_names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return the names of each organ on the left and on the right, where both are classes."""
    found = {_side(name): name for name in class_names}
    return [
        (name, found["right", rest])
        for (side, rest), name in found.items()
        if side == "left" and ("right", rest) in found
    ]


def _unclear(class_names: tuple[str, ...]) -> str | None:
    """Return why names do not tell what a mirror does to the classes; None: they tell it."""
    if all(UNNAMED.fullmatch(name) for name in class_names):
        return "the classes have no names that tell their sides"
    parts = {name: _side(name) for name in class_names}
    paired = {name for pair in _pairs(class_names) for name in pair}
    alone = [name for name, (side, _) in parts.items() if side and name not in paired]
    if alone:
        return f"no other class is the other side of {first_few(alone)}"
    unlike = [n for n in paired if UNLIKE & {*parts[n][1]} and "lateral" not in parts[n][1]]
    if unlike:
        return (
            f"{first_few(sorted(unlike))} are chambers of the heart or lobes of the liver, which "
            "are no mirror images"
        )
    alike: dict[str, str] = {}  # lkidney and rkidney, LV and RV
    for name in (name for name, (side, _) in parts.items() if side is None):
        pattern = INSIDE.sub("*", " ".join(parts[name][1]))
        other = alike.setdefault(pattern, name)
        if other != name:
            return (
                f"{other} and {name} may be the two sides of an organ; write left and right in "
                "their names, or mirror no patient"
            )
    return None
