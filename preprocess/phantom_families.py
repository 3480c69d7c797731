"""Families of phantoms: the contrast phase, the scanner, and organs that some cases lack.

A network that was trained on one family meets a shifted one here, as it would meet the scans of
another hospital. The values look plausible for adult CT. They are chosen, not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from preprocess.phantom_anatomy import ORGANS, Organ

ABSENT_SHARE = 0.5  # of the cases that lack an organ of `Family.missing`
# The raw label of each organ that has one.
LABELLED = {organ.name: organ.label for organ in ORGANS if organ.label}


@dataclass(frozen=True)
class Phase:
    """What contrast agent does to the organs: Hounsfield units in place of the table's."""

    intensity: Mapping[str, float] = field(default_factory=dict)  # organ -> HU
    medulla: float | None = None  # HU of the inner kidney; None: the table's
    heart: float = 135  # HU
    vessels: float = 35  # HU above the liver


@dataclass(frozen=True)
class Scanner:
    """Noise and blur of a scan."""

    noise: float  # HU, standard deviation
    grain: float  # voxels, how far noise reaches within a slice
    blur: tuple[float, float, float]  # voxels, point spread along (slice, row, column)


PHASES = {
    # About 70 s after the injection; the values of the table of organs.
    "portal": Phase(),
    # About 30 s: bright arteries and kidney cortex, liver and veins still without contrast.
    "arterial": Phase(
        intensity={
            "aorta": 290,
            "spleen": 138,
            "right kidney": 205,
            "left kidney": 205,
            "pancreas": 118,
            "liver": 74,
            "stomach": 100,
            "small bowel": 110,
            "portal vein": 85,
            "cava": 60,
        },
        medulla=85,
        heart=240,
        vessels=12,
    ),
    # No contrast agent: soft tissues differ by a few HU.
    "unenhanced": Phase(
        intensity={
            "aorta": 42,
            "spleen": 50,
            "right kidney": 34,
            "left kidney": 34,
            "pancreas": 42,
            "liver": 60,
            "stomach": 44,
            "small bowel": 44,
            "duodenum": 42,
            "right colon": 42,
            "left colon": 42,
            "transverse colon": 42,
            "portal vein": 42,
            "cava": 42,
            "right adrenal": 30,
            "left adrenal": 30,
        },
        medulla=34,
        heart=44,
        vessels=-14,
    ),
}
SCANNERS = {
    "standard": Scanner(noise=14, grain=0.7, blur=(0.35, 0.6, 0.6)),
    # A quarter of the dose and smoothed: twice the noise, in coarser grains.
    "low_dose": Scanner(noise=28, grain=1.2, blur=(0.35, 0.8, 0.8)),
    # An edge-enhancing kernel: fine, strong noise.
    "sharp": Scanner(noise=24, grain=0.4, blur=(0.35, 0.4, 0.4)),
}


@dataclass(frozen=True)
class Family:
    """What the cases of a family have in common."""

    phase: str = "portal"  # a row of PHASES
    scanner: str = "standard"  # a row of SCANNERS
    missing: tuple[str, ...] = ()  # organs that half of the cases lack

    def organs(self) -> list[Organ]:
        """Return the table of organs as this phase shows them, in the order of painting."""
        return [_in_phase(organ, PHASES[self.phase]) for organ in ORGANS]

    def absent(self, seed: int | Sequence[int]) -> set[str]:
        """Return the organs that the case of this seed lacks, with their parts.

        The draws are apart from those of the anatomy, so that nothing else in the case changes.
        """
        rng = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])
        drawn = {name: rng.random() < ABSENT_SHARE for name in LABELLED}  # always all of them
        absent = {name for name in self.missing if drawn[name]}
        return {organ.name for organ in ORGANS if organ.name.removesuffix("'s sinus") in absent}


def _in_phase(organ: Organ, phase: Phase) -> Organ:
    """Return an organ with the intensities of a phase."""
    organ = replace(organ, intensity=phase.intensity.get(organ.name, organ.intensity))
    if phase.medulla is not None and organ.name.endswith(" kidney"):
        organ = replace(organ, content=phase.medulla)
    return organ
