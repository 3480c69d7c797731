"""Phantoms of abdominal CT: labelled volumes, each with a different anatomy, from a seed.

Organs are smooth shapes in millimetres around the spine. They are painted in a fixed order through
a random smooth warp of space, so that all cases and all slices differ. Blur, partial volume and
correlated noise of a scanner follow. Phantoms replace scans that may not be distributed. They look
plausible but are not anatomically correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from preprocess.phantom_anatomy import Organ
from preprocess.phantom_families import PHASES, SCANNERS, Family, Scanner

FIELD_OF_VIEW = 380.0  # mm, side of a square slice
SLICE_THICKNESS = 5.0  # mm
MARGIN = 25.0  # mm; an organ lies within this distance of its mean place
FAT, MUSCLE, AIR, LUNG = -100.0, 58.0, -1000.0, -850.0  # HU


@dataclass(frozen=True)
class Phantom:
    """The scan and the label of one case."""

    image: np.ndarray  # (D, H, W) int16, HU
    label: np.ndarray  # (D, H, W) uint8, raw BTCV values
    spacing: tuple[float, float, float]  # (x, y, z), mm


@dataclass(frozen=True)
class Canvas:
    """Views of the volumes in the box around one organ."""

    place: np.ndarray  # (3, D, H, W): x, y, z in mm
    image: np.ndarray  # (D, H, W) HU
    label: np.ndarray  # (D, H, W) uint8
    cavity: np.ndarray  # (D, H, W) bool, True where organs may lie
    lumps: np.ndarray  # (D, H, W), smooth noise of unit variance


@dataclass(frozen=True)
class Look:
    """What an organ is like in one case."""

    move: np.ndarray  # (3,), mm
    scale: float
    intensity: float  # HU
    gas: float  # share of the content


def make_phantom(
    seed: int | Sequence[int],
    *,
    size: int = 160,
    slices: int = 32,
    variation: float = 1.0,
    family: Family | None = None,
) -> Phantom:
    """Make one case; the same seed makes the same case.

    Args:
        seed: one or several numbers, e.g. (seed of the set, number of the case).
        size: number of rows and of columns; the field of view is always 380 mm.
        slices: number of slices of 5 mm, from below the kidneys upwards.
        variation: factor on all differences between cases; 0 gives the mean anatomy.
        family: phase, scanner and missing organs; None: the default family. The anatomy of a seed
            is the same in all families.
    """
    family = family or Family()
    phase, absent = PHASES[family.phase], family.absent(seed)
    rng = np.random.default_rng(seed)
    spacing = FIELD_OF_VIEW / size  # mm
    axes = [  # z, y, x of the nominal grid, mm
        (np.arange(count) - (count - 1) / 2) * step
        for count, step in ((slices, SLICE_THICKNESS), (size, spacing), (size, spacing))
    ]
    place = warped_places(rng, axes, variation)
    image, cavity = paint_body(rng, place, variation, blood=phase.heart)
    label = np.zeros(image.shape, dtype=np.uint8)
    lumps = smooth_noise(rng, image.shape, (3, 14, 14))
    for organ in family.organs():
        box = nominal_box(organ, axes)
        canvas = Canvas(  # of views, so that painting an organ changes the volume
            place=place[:, *box],
            image=image[box],
            label=label[box],
            cavity=cavity[box],
            lumps=lumps[box],
        )
        look = draw_look(rng, organ, variation)
        if organ.name not in absent:
            paint_organ(organ, look, canvas, vessels=phase.vessels)
    image = scan(rng, image, SCANNERS[family.scanner])
    return Phantom(image=image, label=label, spacing=(spacing, spacing, SLICE_THICKNESS))


def warped_places(
    rng: np.random.Generator, axes: list[np.ndarray], variation: float
) -> np.ndarray:  # (3, D, H, W): x, y, z in mm
    """Return the place of each voxel in the mean anatomy: pose, build and a smooth random warp."""
    z, y, x = np.meshgrid(*axes, indexing="ij")
    angle = np.radians(4) * variation * rng.standard_normal()
    build = 1 + 0.05 * variation * rng.standard_normal(3).clip(-2, 2)
    x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    # The middle of the body lies 15 mm before the origin, near the middle of the slice.
    place = np.stack([x / build[0], y / build[1] - 15, z / build[2]])
    place += variation * rng.normal(0, (5, 5, 8))[:, None, None, None]
    for axis in range(3):
        place[axis] += 4 * variation * smooth_noise(rng, z.shape, (4, 5, 5))
    return place


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, ...], knots: tuple[int, ...]
) -> np.ndarray:
    """Draw numbers of unit variance at a few knots, and zoom them to `shape` with splines."""
    coarse = rng.standard_normal(knots)
    return ndimage.zoom(coarse, np.divide(shape, knots), order=3, mode="nearest", grid_mode=True)


def ellipse(place: np.ndarray, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Return the distance from the centre as a share of the radii; it is below 1 inside.

    `centre` and `radii` may have two values; the shape is then a cylinder along z.
    """
    return np.sqrt(
        sum(((place[i] - c) / r) ** 2 for i, (c, r) in enumerate(zip(centre, radii, strict=True)))
    )


def paint_body(
    rng: np.random.Generator, place: np.ndarray, variation: float, *, blood: float
) -> tuple[np.ndarray, np.ndarray]:  # (D, H, W) float HU; (D, H, W) bool
    """Paint skin, fat, muscles, ribs, spine, heart and lungs; return image and organ cavity."""
    x, y, z = place
    fat = 16 + 6 * variation * rng.uniform(-1, 1)  # mm under the skin
    outline = ellipse(place[:2], (0, -15), (165, 118))
    image = np.where(outline < 1, MUSCLE, AIR)  # the skin looks like muscle
    image[outline < 0.975] = FAT
    wall = ellipse(place[:2], (0, -15), (163 - fat, 116 - fat))
    image[wall < 1] = MUSCLE
    ribs = (np.abs(wall - 0.955) < 0.035) & (np.sin(z / 5.5 + np.arctan2(y + 15, x) * 5) > 0.55)
    image[ribs & (y > 20 - 1.3 * z)] = 380  # upper ribs reach further forward
    cavity = wall < 0.9
    image[cavity] = FAT
    for side in (-1, 1):
        image[ellipse(place[:2], (side * 34, 76), (30, 19)) < 1] = MUSCLE
        psoas = 14 - z * 0.2  # thick at the bottom, absent in the chest
        image[ellipse(place[:2], (side * 37, 42), (1, 1)) < np.clip(psoas, 0, 24)] = MUSCLE
    paint_spine(place, image)
    dome = 68 - 0.0045 * ((np.abs(x) - 60) ** 2 + (y + 20) ** 2) + 5 * variation * rng.normal()
    heart = cavity & (ellipse(place, (14, -50, 108), (58, 44, 50)) < 1)
    beside_spine = (ellipse(place[:2], (0, 25), (36, 60)) > 1) & ((y < 62) | (np.abs(x) > 45))
    chest = cavity & ~heart & (z > dome) & beside_spine
    image[chest & (image == FAT)] = LUNG  # muscle and bone stay
    image[heart] = blood
    return image, cavity & ~chest & ~heart & (ellipse(place[:2], (0, 40), (25, 23)) > 1)


def paint_spine(place: np.ndarray, image: np.ndarray) -> None:
    """Paint vertebrae with a shell of cortical bone, discs, spinal canal and processes."""
    body = ellipse(place[:2], (0, 40), (25, 21))
    bone = np.where(np.mod(place[2], 33) < 26, 190.0, 85.0)  # vertebra or disc
    image[body < 1] = bone[body < 1]
    image[(body < 1) & (body > 0.88) & (bone > 100)] = 480
    arch = ellipse(place[:2], (0, 68), (17, 14))
    image[arch < 1] = 350
    image[arch < 0.62] = 35  # the spinal canal
    image[ellipse(place[:2], (0, 90), (4, 13)) < 1] = 320


def draw_look(rng: np.random.Generator, organ: Organ, variation: float) -> Look:
    """Draw what an organ is like in one case."""
    return Look(
        move=organ.shift * variation * rng.standard_normal(3).clip(-2, 2),
        scale=1 + organ.swell * variation * float(np.clip(rng.standard_normal(), -2, 2)),
        intensity=organ.intensity + organ.varies * variation * rng.standard_normal(),
        gas=organ.gas * (1 - 0.7 * variation * rng.random()),
    )


def paint_organ(organ: Organ, look: Look, canvas: Canvas, *, vessels: float) -> None:
    """Paint an organ into image and label, where it lies inside the cavity.

    Args:
        vessels: HU that the vessels of the liver are brighter than it.
    """
    # An organ is enlarged by a factor if all places move towards its centre by this factor.
    centre = np.mean([part[:3] for part in organ.balls + organ.tube], axis=0)[:, None, None, None]
    place = (canvas.place - look.move[:, None, None, None] - centre) / look.scale + centre
    depth = ball_depth(organ, place) if organ.balls else tube_depth(organ, place)
    mask = (depth > 0) & canvas.cavity
    canvas.image[mask] = look.intensity
    canvas.label[mask] = organ.label
    if organ.name == "liver":  # vessels are thin lines
        canvas.image[(depth > 10) & mask & (np.abs(canvas.lumps) < 0.12)] += vessels
    if organ.wall is not None:
        inner = mask & (depth > organ.wall)
        canvas.image[inner] = organ.content + 10 * canvas.lumps[inner]
        if look.gas and inner.any():  # gas rises to the front
            level = np.quantile(place[1][inner], look.gas)
            canvas.image[inner & (place[1] < level)] = AIR + 60


def nominal_box(organ: Organ, axes: list[np.ndarray]) -> tuple[slice, ...]:
    """Return the box of voxels around an organ's mean place, with room for warp and shift."""
    parts = organ.balls + organ.tube
    centres = np.array([part[:3] for part in parts])
    radii = np.array([np.broadcast_to(part[3:], 3) for part in parts])  # a tube has one radius
    low = (centres - radii).min(axis=0) - MARGIN  # x, y, z
    high = (centres + radii).max(axis=0) + MARGIN
    offset = np.array([0, 15, 0])  # see warped_places
    box = []
    for axis, start, stop in zip(axes, (low + offset)[::-1], (high + offset)[::-1], strict=True):
        box.append(slice(*np.searchsorted(axis, [start, stop])))
    return tuple(box)


def ball_depth(organ: Organ, place: np.ndarray) -> np.ndarray:
    """Return the approximate depth of each place below the surface of the ellipsoids, in mm."""
    return np.max(
        [(1 - ellipse(place, ball[:3], ball[3:])) * min(ball[3:]) for ball in organ.balls], axis=0
    )


def tube_depth(organ: Organ, place: np.ndarray) -> np.ndarray:
    """Return the depth of each place below the surface of the tube around the curve, in mm."""
    points = np.array(organ.tube)  # (N, 4)
    steps = np.linspace(0, len(points) - 1, 8 * len(points))
    order = min(3, len(points) - 1)  # a cubic spline where there are enough points
    columns = [
        ndimage.map_coordinates(column, steps[None], order=order, mode="nearest")
        for column in points.T
    ]
    curve = np.stack(columns, axis=1)  # (8N, 4)
    depth = np.full(place.shape[1:], -np.inf)
    for x, y, z, radius in curve:
        distance = np.sqrt((place[0] - x) ** 2 + (place[1] - y) ** 2 + (place[2] - z) ** 2)
        np.maximum(depth, radius - distance, out=depth)
    return depth


def scan(
    rng: np.random.Generator, image: np.ndarray, scanner: Scanner
) -> np.ndarray:  # (D, H, W) HU -> int16
    """Imitate a scanner: blur, which mixes tissues in a voxel, and grainy noise."""
    blurred = ndimage.gaussian_filter(image, scanner.blur, mode="nearest")
    grain = ndimage.gaussian_filter(
        rng.standard_normal(image.shape), (0, scanner.grain, scanner.grain)
    )
    return np.clip(blurred + scanner.noise / grain.std() * grain, -1024, 3071).astype(np.int16)
