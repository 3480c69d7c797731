"""What a class means in SNOMED CT, the codes that DICOM names organs by.

The tables hold keywords of pydicom's dictionary of DICOM's context groups (PS3.16), not numbers, so
that each code and its text are those of the standard. Structures that the dictionary lacks, e.g.
the zones of the prostate, have none here.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

from datasets.colours import organ_words

# Keyword -> spellings that `organ_words` does not bring together itself.
ORGANS = {
    "Spleen": ("spleen",),
    "Kidney": ("kidney",),
    "Gallbladder": ("gallbladder", "gall bladder", "gall"),
    "Liver": ("liver",),
    "Stomach": ("stomach",),
    "Aorta": ("aorta", "arota"),  # AMOS misspells it
    "Pancreas": ("pancreas",),
    "Esophagus": ("esophagus",),
    "InferiorVenaCava": ("inferior vena cava", "postcava"),
    "SuperiorVenaCava": ("superior vena cava",),
    "PortalVein": ("portal vein",),
    "SplenicVein": ("splenic vein",),
    "HepaticVein": ("hepatic vein",),
    "PulmonaryArtery": ("pulmonary artery",),
    "AdrenalGland": ("adrenal",),
    "Duodenum": ("duodenum",),
    "Colon": ("colon",),
    "Rectum": ("rectum",),
    "SmallIntestine": ("small intestine", "small bowel"),
    "LargeIntestine": ("large intestine", "large bowel"),
    "Bladder": ("bladder", "urinary bladder"),
    "Prostate": ("prostate",),
    "Uterus": ("uterus",),
    "Lung": ("lung",),
    "Trachea": ("trachea",),
    "Thyroid": ("thyroid",),
    "Heart": ("heart",),
    "LeftVentricle": ("left ventricle",),
    "RightVentricle": ("right ventricle",),
    "LeftAtrium": ("left atrium",),
    "RightAtrium": ("right atrium",),
    "LeftVentricleMyocardium": ("left ventricle myocardium",),
    "Brain": ("brain",),
    "Hippocampus": ("hippocampus",),
    "SpinalCord": ("spinal cord",),
    "Femur": ("femur",),
    "HeadOfFemur": ("femoral head", "femur head"),
    "ParotidGland": ("parotid",),
    "OpticNerve": ("optic nerve",),
    "Breast": ("breast",),
    "Eye": ("eye",),
}
# Of a left and a right one; the side of any other organ is a part of it, which is something else.
PAIRED = {"Kidney", "AdrenalGland", "Lung", "Hippocampus", "Femur", "HeadOfFemur", "ParotidGland"}
PAIRED |= {"OpticNerve", "Breast", "Eye"}
CHANGES = {
    "Neoplasm": ("tumour", "cancer"),
    "Lesion": ("lesion",),
    "Nodule": ("nodule",),
    "Cyst": ("cyst",),
    "Edema": ("edema", "oedema"),
}
NORMAL, CHANGED = "AnatomicalStructure", "MorphologicallyAbnormalStructure"  # categories
OWN_CODES = "99SAMED"  # scheme of classes without a code; 99 marks a private one
LONGEST_TEXT = 64  # characters of a text in a tag (LO)
SIDES = {"left": "Left", "right": "Right"}


@dataclass(frozen=True)
class Meaning:
    """The codes of a class, as keywords of pydicom's `codes.SCT`."""

    category: str
    kind: str
    region: str | None = None  # the organ of a tumour or another change
    side: str | None = None  # of the organ


def meaning_of(name: str) -> Meaning | None:
    """Return what a class means by its name; None: the tables have no code for it."""
    words = organ_words(name)
    if organ := _ORGANS.get(words):
        return Meaning(NORMAL, organ)
    sides = words & SIDES.keys()
    side = SIDES[next(iter(sides))] if len(sides) == 1 else None
    organ = _ORGANS.get(words - sides)
    if side and organ in PAIRED:
        return Meaning(NORMAL, organ, side=side)
    changes = [word for word in words if frozenset((word,)) in _CHANGES]
    if len(changes) != 1:
        return None
    change, rest = _CHANGES[frozenset(changes)], words - {*changes}
    if not rest:
        return Meaning(CHANGED, change)
    if organ := _ORGANS.get(rest):
        return Meaning(CHANGED, change, region=organ)
    organ = _ORGANS.get(rest - sides)
    return Meaning(CHANGED, change, organ, side) if side and organ in PAIRED else None


def _by_words(table: dict[str, tuple[str, ...]]) -> dict[frozenset[str], str]:
    return {organ_words(name): keyword for keyword, names in table.items() for name in names}


_ORGANS, _CHANGES = _by_words(ORGANS), _by_words(CHANGES)


def codes_of(name: str) -> tuple[Any, Any, Any, Any]:
    """Return category, type, region and side of a class as codes; the last two may be None."""
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    def code(keyword: str | None) -> Any:
        return None if keyword is None else CodedConcept.from_code(getattr(codes.SCT, keyword))

    meaning = meaning_of(name)
    if meaning is None:
        own = hashlib.sha256(name.casefold().encode()).hexdigest()[:16]
        _say_uncoded(name)
        kind = CodedConcept(own, OWN_CODES, name[:LONGEST_TEXT])
        return code("AnatomicalStructure"), kind, None, None
    return code(meaning.category), code(meaning.kind), code(meaning.region), code(meaning.side)


@cache
def _say_uncoded(name: str) -> None:
    logging.info("%s has no SNOMED code here; DICOM segmentations use one of %s", name, OWN_CODES)
