"""Colours of classes: different, also with a red-green deficiency, and the same in all data."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from datasets.colours import ARTERIES, ORGANS, VEINS, label_colours
from datasets.registry import SYNAPSE

BTCV = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal vein and splenic vein",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)
AMOS = (
    "spleen",
    "right kidney",
    "left kidney",
    "gall bladder",
    "esophagus",
    "liver",
    "stomach",
    "arota",
    "postcava",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
    "duodenum",
    "bladder",
    "prostate/uterus",
)
UNNAMED = tuple(f"class {index}" for index in range(1, 13))
# Linear sRGB as seen: Machado 2009, severity 1, and Viénot 1999.
VISION = {
    "normal": np.eye(3),
    "deuteranopia, Machado": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia, Machado": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia, Viénot": [
        [0.29275, 0.70725, 0],
        [0.29275, 0.70725, 0],
        [-0.02234, 0.02234, 1],
    ],
    "protanopia, Viénot": [
        [0.11238, 0.88762, 0],
        [0.11238, 0.88762, 0],
        [0.00401, -0.00401, 1],
    ],
}
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def lab(rgb: np.ndarray, vision: str) -> np.ndarray:  # (N, 3) 0…255 -> (N, 3) L*a*b* under D65
    """Return colours as an eye sees them."""
    unit = np.asarray(rgb, float) / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.transpose(VISION[vision])).clip(0, 1)
    xyz = seen @ TO_XYZ.T / TO_XYZ.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def ciede2000(first: np.ndarray, second: np.ndarray) -> float:  # L*a*b* both
    """Return the CIEDE2000 difference (Sharma 2005)."""
    (l1, a1, b1), (l2, a2, b2) = first, second
    mean = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * np.sqrt(mean**7 / (mean**7 + 25**7))
    c1, c2 = np.hypot(a1 * stretch, b1), np.hypot(a2 * stretch, b2)
    h1, h2 = (np.degrees(np.arctan2(b, a * stretch)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0.0
    hue = (h1 + turn / 2) % 360 if c1 * c2 else h1 + h2
    d_hue = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2))
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    t = 1 - 0.17 * np.cos(np.radians(hue - 30)) + 0.24 * np.cos(np.radians(2 * hue))
    t += 0.32 * np.cos(np.radians(3 * hue + 6)) - 0.2 * np.cos(np.radians(4 * hue - 63))
    of_light = (l2 - l1) / (1 + 0.015 * (light - 50) ** 2 / np.sqrt(20 + (light - 50) ** 2))
    of_chroma = (c2 - c1) / (1 + 0.045 * chroma)
    of_hue = d_hue / (1 + 0.015 * chroma * t)
    rotation = np.sin(np.radians(60 * np.exp(-(((hue - 275) / 25) ** 2))))
    rotation *= -2 * np.sqrt(chroma**7 / (chroma**7 + 25**7))
    return float(np.sqrt(of_light**2 + of_chroma**2 + of_hue**2 + rotation * of_chroma * of_hue))


def smallest_difference(colours: np.ndarray, vision: str) -> float:
    """Return the smallest CIEDE2000 difference of two colours."""
    return min(ciede2000(*pair) for pair in combinations(lab(colours, vision), 2))


def test_the_difference_equals_published_values():
    for first, second, expected in (  # Sharma, Wu, Dalal 2005, table 1
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
    ):
        assert ciede2000(np.array(first), np.array(second)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize(
    ("names", "smallest"),
    [(SYNAPSE.class_names, 16), (BTCV, 14), (AMOS, 11.5), (UNNAMED, 11.5)],
    ids=["Synapse", "BTCV", "AMOS", "unnamed"],
)
def test_all_pairs_can_be_told_apart(names: tuple[str, ...], smallest: float, vision: str):
    assert smallest_difference(label_colours(names)[1:], vision) >= smallest


@pytest.mark.parametrize("vision", VISION)
def test_all_colours_of_the_tables_can_be_told_apart(vision: str):
    assert smallest_difference(np.array([*ORGANS, *ARTERIES, *VEINS]), vision) >= 11.5


def test_an_organ_has_the_same_colour_in_each_data_set():
    sets = (
        SYNAPSE.class_names,
        BTCV,
        AMOS,
        ("tumour", "liver"),
        ("class 1", "aorta", "x", "Liver"),
    )
    tables = [dict(zip(names, label_colours(names)[1:].tolist(), strict=True)) for names in sets]
    for name in SYNAPSE.class_names:
        spelt = {"aorta": "arota", "gallbladder": "gall bladder"}.get(name, name)
        assert tables[0][name] == tables[1][name] == tables[2][spelt], name
    assert tables[3]["liver"] == tables[4]["Liver"] == tables[0]["liver"]
    assert tables[4]["aorta"] == tables[0]["aorta"]


SPELLINGS = {
    "left kidney": ("kidney_left", "Left Kidney", "LK", "LKid", "leftKidney", "kidney (L)", "lkid"),
    "right kidney": (
        "kidney_right",
        "R. kidney",
        "rightkidney",
        "RKid",
        "Kidney-RT",
        "1_right_kidney",
    ),
    "gallbladder": ("Gall Bladder", "gall_bladder", "GB"),
    "esophagus": ("oesophagus", "Eso"),
    "left adrenal gland": ("adrenal_gland_left", "LAG", "left suprarenal gland", "adrenal left"),
    "inferior vena cava": ("IVC", "inferior_vena_cava", "postcava", "vena cava inferior"),
    "portal vein and splenic vein": ("portal_vein_and_splenic_vein", "Portal Vein", "PV"),
    "aorta": ("Aorta", "arota", "abdominal aorta", "Ao"),
    "spleen": ("SPLEEN", "Spl", "the spleen"),
    "left ventricle": ("LV", "left ventricle blood cavity", "left_ventricular_cavity"),
    "tumour": ("tumor", "Tumour", "lesion"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_spelling_does_not_matter(name: str):
    expected = label_colours([name])[1].tolist()
    for spelling in SPELLINGS[name]:
        # A class of no known name stands before, and must not take the colour.
        assert label_colours(["something", spelling])[2].tolist() == expected, spelling


def test_arteries_are_red_and_veins_are_blue():
    arteries = ["aorta", "pulmonary artery", "iliac_artery_left", "hepatic arteries", "LCA artery"]
    veins = ["IVC", "portal vein", "pulmonary_vein", "iliac_vena_left", "hepatic veins", "SVC vein"]
    colours = label_colours([*arteries, *veins, "liver", "bladder"])[1:].astype(int)
    for red, green, blue in colours[: len(arteries)]:
        assert red > 2 * max(green, blue) and red >= 90
    for red, green, blue in colours[len(arteries) : -2]:
        assert blue == max(red, green, blue) and blue > 1.4 * red
    assert len(np.unique(colours, axis=0)) == len(colours)


@pytest.mark.parametrize("classes", [1, 2, 12, 40, 255])
def test_every_class_has_a_different_colour(classes: int):
    for names in ([f"class {i}" for i in range(classes)], [f"artery {i}" for i in range(classes)]):
        colours = label_colours(names)
        assert colours.shape == (classes + 1, 3) and colours.dtype == np.uint8
        assert len(np.unique(colours, axis=0)) == classes + 1


def test_two_spellings_of_an_organ_in_one_set_differ():
    colours = label_colours(["liver", "Liver 2", "left lung", "left kidney"])
    assert len(np.unique(colours, axis=0)) == 5
