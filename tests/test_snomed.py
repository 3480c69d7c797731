"""The SNOMED codes of organs in DICOM segmentations."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("highdicom", reason="pip install -r requirements-dicom.txt")

from pydicom.sr.codedict import codes

from datasets.registry import SYNAPSE
from prediction.snomed import CHANGES, ORGANS, PAIRED, codes_of, meaning_of


def test_codes_are_those_of_the_standard():
    for keyword in (*ORGANS, *CHANGES, "AnatomicalStructure", "MorphologicallyAbnormalStructure"):
        assert getattr(codes.SCT, keyword).scheme_designator == "SCT"
    assert ORGANS.keys() >= PAIRED
    found = {
        name: tuple(None if code is None else code.value for code in codes_of(name)[1:])
        for name in ("liver", "right kidney", "LKid", "gall bladder", "postcava", "left ventricle",
                     "liver tumour", "left kidney tumor", "lesion", "arota", "oesophagus")
    }  # fmt: skip
    assert found == {
        "liver": ("10200004", None, None),
        "right kidney": ("64033007", None, "24028007"),
        "LKid": ("64033007", None, "7771000"),
        "gall bladder": ("28231008", None, None),
        "postcava": ("64131007", None, None),
        "left ventricle": ("87878005", None, None),
        "liver tumour": ("108369006", "10200004", None),
        "left kidney tumor": ("108369006", "64033007", "7771000"),
        "lesion": ("52988006", None, None),
        "arota": ("15825003", None, None),
        "oesophagus": ("32849002", None, None),
    }


@pytest.mark.parametrize(
    "name",
    ["left liver", "portal and splenic vein", "peripheral zone", "prostate/uterus", "class 1",
     "left and right kidney", "vessel", "kidney tumour lesion"],
)  # fmt: skip
def test_what_has_no_code_gets_one_of_our_own(name: str, caplog: pytest.LogCaptureFixture):
    """Never the code of a part or of a similar organ."""
    assert meaning_of(name) is None
    with caplog.at_level(logging.INFO):
        _, kind, region, side = codes_of(name)
    assert (kind.scheme_designator, kind.meaning, region, side) == ("99SAMED", name, None, None)
    assert f"{name} has no SNOMED code" in caplog.text
    assert codes_of(f"{name} x")[1].value != kind.value and len(kind.value) == 16


def test_organs_of_synapse_have_codes():
    assert all(meaning_of(name) for name in SYNAPSE.class_names)
