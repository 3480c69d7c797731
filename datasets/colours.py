"""Colours of classes, the same in every picture and table.

A known organ has the same colour in each data set, however its name is spelt. Arteries are red and
veins are blue. All colours of the tables can be told apart, also with a red-green deficiency;
`tests/test_colours.py` holds their smallest difference.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np

Colour = tuple[int, int, int]

# The order is that in which classes of unknown names take the colours. The names of a row are
# spellings of one organ, or organs that data sets do not have together.
ORGANS: dict[Colour, tuple[str, ...]] = {
    (215, 136, 177): ("spleen", "left atrium"),
    (159, 91, 142): ("right kidney", "kidney", "right lung", "lung", "peripheral zone"),
    (151, 121, 255): ("left kidney", "left lung", "right ventricle"),
    (121, 196, 149): ("gallbladder", "gall bladder", "gall", "right atrium"),
    (255, 129, 4): ("liver", "left ventricle"),
    (95, 255, 255): ("stomach", "myocardium", "left ventricle myocardium"),
    (255, 255, 19): ("pancreas", "transition zone", "central zone"),
    (17, 151, 118): ("esophagus",),
    (129, 66, 75): ("right adrenal", "adrenal"),
    (242, 255, 200): ("left adrenal",),
    (84, 228, 120): ("tumour", "lesion", "cancer", "nodule", "polyp"),
    (231, 76, 102): ("colon", "heart"),
    (152, 41, 101): ("duodenum",),
    (160, 35, 161): ("bladder", "urinary bladder"),
    (157, 232, 209): ("prostate", "uterus", "prostate uterus"),
    (30, 132, 63): ("small bowel", "small intestine", "bowel"),
}
ARTERIES: dict[Colour, tuple[str, ...]] = {
    (220, 24, 3): ("aorta", "arota"),  # AMOS misspells it
    (145, 10, 16): ("pulmonary artery",),
}
VEINS: dict[Colour, tuple[str, ...]] = {
    (34, 60, 255): ("inferior vena cava", "vena cava", "cava", "postcava"),
    (4, 208, 255): ("portal splenic vein", "portal vein"),
}
OF_ARTERIES, OF_VEINS = {"artery", "aorta"}, {"vein", "vena", "cava", "venous"}  # words of names
SYNONYMS = {  # word of a name -> the words of the tables
    **dict.fromkeys(("l", "lt"), "left"),
    **dict.fromkeys(("r", "rt"), "right"),
    **dict.fromkeys(("kid", "kidneys"), "kidney"),
    **dict.fromkeys(("oesophagus", "eso", "esoph"), "esophagus"),
    **dict.fromkeys(("tumor", "tumors", "tumours", "neoplasm"), "tumour"),
    **dict.fromkeys(("adrenals", "suprarenal"), "adrenal"),
    **dict.fromkeys(("ao", "aor"), "aorta"),
    **dict.fromkeys(("arteries", "arterial"), "artery"),
    "lesions": "lesion",
    "veins": "vein",
    "lungs": "lung",
    "ventricular": "ventricle",
    "myo": "myocardium",
    "spl": "spleen",
    "liv": "liver",
    "gb": "gallbladder",
    "sto": "stomach",
    "pan": "pancreas",
    "panc": "pancreas",
    "duo": "duodenum",
    **dict.fromkeys(("lk", "lkid"), "left kidney"),
    **dict.fromkeys(("rk", "rkid"), "right kidney"),
    "lag": "left adrenal",
    "rag": "right adrenal",
    "ivc": "inferior vena cava",
    "pv": "portal vein",
    "lv": "left ventricle",
    "rv": "right ventricle",
    "la": "left atrium",
    "ra": "right atrium",
    "pz": "peripheral zone",
    "tz": "transition zone",
}
NOT_COMPARED = set("gland glands the of and blood cavity abdominal thoracic".split())
GOLDEN = 0.618034  # steps of the golden ratio keep neighbouring hues far apart


def label_colours(class_names: Sequence[str]) -> np.ndarray:  # (classes + 1, 3) uint8
    """Return a different colour for each class; the first row is black, for the background.

    Args:
        class_names: of the classes 1…N, in order.
    """
    words = [organ_words(name) for name in class_names]
    found: dict[int, Colour] = {}
    for index, name in enumerate(words):
        colour = KNOWN.get(name)
        if colour is not None and colour not in found.values():
            found[index] = colour
    for index, name in enumerate(words):
        if index not in found:
            used = {(0, 0, 0), *found.values()}
            found[index] = next(colour for colour in _colours_for(name) if colour not in used)
    return np.array([(0, 0, 0), *(found[i] for i in range(len(words)))], dtype=np.uint8)


def organ_words(name: str) -> frozenset[str]:
    """Return the words of an organ's name, in English, whatever their order, case and separator."""
    # `LKid` and `leftKidney` have two words, and so has `leftkidney`.
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).lower()
    parted = re.sub(r"left|right", r" \g<0> ", parted)
    words = re.findall(r"[^\W\d_]+", parted)
    plain = " ".join(SYNONYMS.get(word, word) for word in words).split()
    return frozenset(plain) - NOT_COMPARED


KNOWN = {
    organ_words(name): colour
    for table in (ORGANS, ARTERIES, VEINS)
    for colour, names in table.items()
    for name in names
}


def _colours_for(words: frozenset[str]) -> Iterator[Colour]:
    """Yield the colours that fit a class, the best first, without end."""
    if words & (OF_ARTERIES | OF_VEINS):
        # The first colour of a table is that of the large vessel, which more data sets have.
        table, hue = (ARTERIES, 0.0) if words & OF_ARTERIES else (VEINS, 0.62)
        yield from reversed(table)
    else:
        hue = None
        yield from ORGANS
    for index in count():
        turned = index * GOLDEN % 1 if hue is None else hue
        value = (1, 0.8, 0.6)[index % 3] if hue is None else 1 - 0.6 * (index * GOLDEN % 1)
        rgb = colorsys.hsv_to_rgb(turned, (0.9, 0.55)[index % 2], value)
        yield tuple(round(255 * part) for part in rgb)
