"""The organs of the phantoms as a table: where they lie, what they look like, how they vary."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Organ:
    """A union of ellipsoids, or a bent tube, in mm.

    The axes run to the patient's left (x), backwards (y) and upwards (z). The origin lies in front
    of the spine, in the middle of the scan.
    """

    name: str
    label: int  # raw BTCV value; 0 if the organ has no label
    intensity: float  # HU
    varies: float  # HU, standard deviation of the intensity between cases
    balls: tuple[tuple[float, ...], ...] = ()  # ellipsoids: centre x y z, radii x y z
    tube: tuple[tuple[float, ...], ...] = ()  # points x y z with a radius, joined by a curve
    shift: float = 4.0  # mm, standard deviation of the place between cases
    swell: float = 0.06  # standard deviation of the relative size between cases
    wall: float | None = None  # mm, thickness of the wall; content lies inside; None: no content
    content: float = 0.0  # HU
    gas: float = 0.0  # share of the content that is gas, at the front


def _kidney(name: str, label: int, side: int, height: float) -> tuple[Organ, Organ]:
    """Return a kidney with a darker medulla, and the fat of its sinus, which has no label."""
    x = side * 66.0
    kidney = Organ(
        name=name,
        label=label,
        intensity=188,
        varies=14,
        balls=((x, 42, height, 27, 30, 55),),
        wall=9,
        content=155,
    )
    sinus = Organ(
        name=f"{name}'s sinus",
        label=0,
        intensity=-20,
        varies=15,
        balls=((x - side * 20, 36, height, 13, 11, 22),),
    )
    return kidney, sinus


RIGHT_KIDNEY, RIGHT_SINUS = _kidney("right kidney", label=2, side=-1, height=-28.0)
LEFT_KIDNEY, LEFT_SINUS = _kidney("left kidney", label=3, side=1, height=-14.0)

# The order is the order of painting: a later row covers an earlier row.
ORGANS = (
    Organ(
        name="right colon",
        label=0,
        intensity=70,
        varies=10,
        tube=((-85, -45, -75, 24), (-98, -25, -30, 22)),
        shift=8,
        wall=4,
        content=25,
        gas=0.4,
    ),
    Organ(
        name="left colon",
        label=0,
        intensity=70,
        varies=10,
        tube=((100, 10, -75, 19), (104, 10, -20, 18)),
        shift=6,
        wall=4,
        content=30,
        gas=0.3,
    ),
    Organ(
        name="small bowel",
        label=0,
        intensity=95,
        varies=14,
        tube=(
            (-50, -45, -80, 17),
            (-30, -70, -55, 18),
            (5, -60, -78, 18),
            (35, -75, -52, 18),
            (65, -40, -76, 19),
            (55, -20, -50, 17),
            (80, -55, -40, 16),
        ),
        shift=9,
        wall=5,
        content=40,
    ),
    Organ(
        name="transverse colon",
        label=0,
        intensity=70,
        varies=10,
        tube=((-80, -70, -42, 17), (0, -98, -40, 17), (80, -75, -25, 17)),
        shift=6,
        wall=4,
        content=30,
        gas=0.5,
    ),
    Organ(
        name="duodenum",
        label=0,
        intensity=78,
        varies=12,
        tube=((-40, -30, 0, 13), (-50, -8, -28, 14), (-18, 6, -52, 13)),
    ),
    Organ(
        name="liver",
        label=6,
        intensity=112,
        varies=9,
        balls=((-84, -18, 26, 66, 84, 84), (-40, -52, 38, 70, 48, 46), (18, -66, 48, 50, 30, 34)),
        shift=5,
        swell=0.05,
    ),
    Organ(
        name="stomach",
        label=7,
        intensity=85,
        varies=8,
        tube=((62, 0, 64, 36), (64, -30, 34, 38), (42, -62, 8, 29), (2, -62, -10, 19)),
        shift=5,
        wall=5,
        content=28,
        gas=0.25,
    ),
    Organ(
        name="spleen",
        label=1,
        intensity=122,
        varies=9,
        balls=((101, 24, 32, 30, 46, 52), (94, 40, 18, 24, 30, 44)),
    ),
    RIGHT_KIDNEY,
    RIGHT_SINUS,
    LEFT_KIDNEY,
    LEFT_SINUS,
    Organ(
        name="right adrenal",
        label=12,
        intensity=75,
        varies=8,
        tube=((-34, 24, 46, 5), (-30, 32, 32, 5)),
        shift=2,
    ),
    Organ(
        name="left adrenal",
        label=13,
        intensity=75,
        varies=8,
        tube=((36, 20, 46, 5), (32, 30, 32, 5)),
        shift=2,
    ),
    Organ(
        name="cava",
        label=9,
        intensity=135,
        varies=14,
        tube=((-26, 0, -95, 12), (-28, -2, 0, 12), (-32, -8, 95, 13)),
    ),
    Organ(
        name="pancreas",
        label=11,
        intensity=98,
        varies=9,
        tube=(
            (-28, -26, -30, 16),
            (-18, -34, -8, 17),
            (10, -38, 4, 14),
            (38, -22, 12, 14),
            (74, 2, 22, 15),
        ),
        shift=3,
    ),
    Organ(
        name="portal vein",
        label=10,
        intensity=150,
        varies=12,
        tube=((0, -18, 2, 7), (-28, -28, 22, 8), (-58, -32, 42, 6)),
    ),
    Organ(
        name="oesophagus",
        label=5,
        intensity=60,
        varies=8,
        tube=((8, -20, 95, 10), (12, -22, 68, 10), (34, -16, 48, 10)),
        shift=2,
    ),
    Organ(
        name="gallbladder",
        label=4,
        intensity=12,
        varies=6,
        balls=((-58, -60, -14, 20, 23, 30),),
    ),
    Organ(
        name="aorta",
        label=8,
        intensity=165,
        varies=18,
        tube=((6, 6, -95, 12), (4, 4, 0, 13), (8, 6, 95, 14)),
        shift=2,
    ),
)
