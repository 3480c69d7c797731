"""The organs of the phantoms as a table: where they lie, what they look like, how they vary."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Organ:
    """A union of ellipsoids or a bent tube, in mm: x to the patient's left, y backwards, z upwards.

    The origin lies in front of the spine in the middle of the scan.
    """

    name: str
    label: int  # raw BTCV value; 0 for what is not labelled
    intensity: float  # HU
    varies: float  # HU, standard deviation between cases
    balls: tuple[tuple[float, ...], ...] = ()  # centre x y z, radii x y z
    tube: tuple[tuple[float, ...], ...] = ()  # points x y z and radius, joined by a curve
    shift: float = 4.0  # mm, standard deviation of its place between cases
    swell: float = 0.06  # standard deviation of its size between cases
    wall: float | None = None  # mm; what lies deeper is content
    content: float = 0.0  # HU
    gas: float = 0.0  # share of the content, at its front, that is gas


def _kidney(name: str, label: int, side: int, height: float) -> tuple[Organ, Organ]:
    """A kidney with a darker medulla, and the fat of its sinus, which is not labelled."""
    x = side * 66.0
    kidney = Organ(name, label, 188, 14, balls=((x, 42, height, 27, 30, 55),), wall=9, content=155)
    sinus = Organ(f"{name}'s sinus", 0, -20, 15, balls=((x - side * 20, 36, height, 13, 11, 22),))
    return kidney, sinus


# In the order of painting: a later row covers an earlier one.
ORGANS = (
    Organ(
        "right colon",
        *(0, 70, 10),
        tube=((-85, -45, -75, 24), (-98, -25, -30, 22)),
        **{"shift": 8, "wall": 4, "content": 25, "gas": 0.4},
    ),
    Organ(
        "left colon",
        *(0, 70, 10),
        tube=((100, 10, -75, 19), (104, 10, -20, 18)),
        **{"shift": 6, "wall": 4, "content": 30, "gas": 0.3},
    ),
    Organ(
        "small bowel",
        *(0, 95, 14),
        tube=(
            *((-50, -45, -80, 17), (-30, -70, -55, 18), (5, -60, -78, 18), (35, -75, -52, 18)),
            *((65, -40, -76, 19), (55, -20, -50, 17), (80, -55, -40, 16)),
        ),
        **{"shift": 9, "wall": 5, "content": 40},
    ),
    Organ(
        "transverse colon",
        *(0, 70, 10),
        tube=((-80, -70, -42, 17), (0, -98, -40, 17), (80, -75, -25, 17)),
        **{"shift": 6, "wall": 4, "content": 30, "gas": 0.5},
    ),
    Organ("duodenum", 0, 78, 12, tube=((-40, -30, 0, 13), (-50, -8, -28, 14), (-18, 6, -52, 13))),
    Organ(
        "liver",
        *(6, 112, 9),
        balls=((-84, -18, 26, 66, 84, 84), (-40, -52, 38, 70, 48, 46), (18, -66, 48, 50, 30, 34)),
        **{"shift": 5, "swell": 0.05},
    ),
    Organ(
        "stomach",
        *(7, 85, 8),
        tube=((62, 0, 64, 36), (64, -30, 34, 38), (42, -62, 8, 29), (2, -62, -10, 19)),
        **{"shift": 5, "wall": 5, "content": 28, "gas": 0.25},
    ),
    Organ("spleen", 1, 122, 9, balls=((101, 24, 32, 30, 46, 52), (94, 40, 18, 24, 30, 44))),
    *_kidney("right kidney", 2, -1, -28.0),
    *_kidney("left kidney", 3, 1, -14.0),
    Organ("right adrenal", 12, 75, 8, tube=((-34, 24, 46, 5), (-30, 32, 32, 5)), shift=2),
    Organ("left adrenal", 13, 75, 8, tube=((36, 20, 46, 5), (32, 30, 32, 5)), shift=2),
    Organ("cava", 9, 135, 14, tube=((-26, 0, -95, 12), (-28, -2, 0, 12), (-32, -8, 95, 13))),
    Organ(
        "pancreas",
        *(11, 98, 9),
        tube=(
            *((-28, -26, -30, 16), (-18, -34, -8, 17), (10, -38, 4, 14)),
            *((38, -22, 12, 14), (74, 2, 22, 15)),
        ),
        **{"shift": 3},
    ),
    Organ("portal vein", 10, 150, 12, tube=((0, -18, 2, 7), (-28, -28, 22, 8), (-58, -32, 42, 6))),
    Organ(
        "oesophagus",
        *(5, 60, 8),
        tube=((8, -20, 95, 10), (12, -22, 68, 10), (34, -16, 48, 10)),
        **{"shift": 2},
    ),
    Organ("gallbladder", 4, 12, 6, balls=((-58, -60, -14, 20, 23, 30),)),
    Organ("aorta", 8, 165, 18, tube=((6, 6, -95, 12), (4, 4, 0, 13), (8, 6, 95, 14)), shift=2),
)
