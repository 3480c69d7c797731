"""How pictures of slices are shown: radiological view, true shape, letters, a scale bar, titles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.writing import atomic_path
from datasets.intensity import PERCENTILES, WINDOW, Intensity
from datasets.scans.geometry import Geometry

SHOWN_SIDE = (300, 1024)  # smallest and largest longer side of a picture, pixels
MOST_RATIO = 4.0  # largest ratio of a picture's sides, so that odd voxels give no endless picture
LONGEST_BAR = 0.3  # largest length of the scale bar, as a share of the picture's width


@dataclass(frozen=True)
class View:
    """How a slice is shown: flipped, with voxels in their true shape, letters and a scale bar."""

    flips: tuple[int, ...]  # axes to flip: 0 rows, 1 columns
    aspect: float  # height of a voxel over its width
    sides: str | None  # sides of the patient at the left, right, top, bottom; None: unknown
    pixel: float | None  # width of a voxel, mm; None: unknown


def view_of(geometry: Geometry | None) -> View:
    """Return the radiological view of slices (y, x) of arrays (z, y, x).

    In that view the patient's right or front is at the left, and front or head at the top.
    """
    if geometry is None:
        return View((), 1.0, None, None)
    axes = np.reshape(geometry.direction, (3, 3)).T  # a row for each of the axes x, y, z
    flips, sides, taken = [], "", None
    for axis in (1, 0):  # columns run along x, rows along y
        cosines = axes[1 - axis]
        nearest = max((i for i in range(3) if i != taken), key=lambda i: abs(cosines[i]))
        wanted = -1 if nearest == 2 else 1  # axes run to the patient's left, back and head
        if cosines[nearest] * wanted < 0:
            flips.append(axis)
        sides += ("RL", "AP", "SI")[nearest]
        taken = nearest
    _, height, width = geometry.voxel_spacing
    return View(tuple(flips), height / width, sides, width)


def slice_place(geometry: Geometry | None, index: int) -> str | None:
    """Return where a slice lies along the patient's axis nearest to its normal, as `S 120.0 mm`.

    The letters are those of 3D Slicer: S is towards the head, seen from the scanner's origin.
    """
    if geometry is None:
        return None
    normal = np.reshape(geometry.direction, (3, 3))[:, 2]
    axis = int(np.argmax(np.abs(normal)))
    place = geometry.origin[axis] + index * geometry.spacing[2] * normal[axis]
    return f"{('RL', 'AP', 'IS')[axis][int(place >= 0)]} {abs(place):.1f} mm"


def slice_title(index: int, depth: int, place: str | None) -> str:
    """Return `slice 13 of 32, S 120.0 mm`, counted from 1; empty for a case of one slice."""
    if depth == 1:
        return ""
    return f"slice {index + 1} of {depth}" + (f", {place}" if place else "")


def window_text(intensity: Intensity) -> str:
    """Return which values are shown black and white, as `window −125…275 HU`."""
    limits = f"{intensity.low:g}…{intensity.high:g}".replace("-", "−")
    if intensity.rule == WINDOW:
        return f"window {limits} HU"
    return f"{'percentiles' if intensity.rule == PERCENTILES else 'values'} {limits}"


def shown_ratio(picture: np.ndarray, aspect: float) -> float:  # (H, W, 3)
    """Return height over width of a picture with voxels in their true shape, within a limit."""
    height, width = picture.shape[:2]
    return min(max(height * aspect / width, 1 / MOST_RATIO), MOST_RATIO)


def framed(picture: np.ndarray, view: View, longest: int = SHOWN_SIDE[1]) -> Image.Image:
    """Return a picture (H, W, 3) with voxels in their true shape, letters and a scale bar.

    Every row and column is kept unless the picture is longer than `longest` pixels.
    """
    ratio = shown_ratio(picture, view.aspect)
    width = max(picture.shape[1], len(picture) / ratio)
    longer = width * max(1.0, ratio)
    # A whole factor shows all pixels equally large.
    width *= math.ceil(SHOWN_SIDE[0] / longer) if longer < SHOWN_SIDE[0] else 1
    width *= min(1.0, longest / (width * max(1.0, ratio)))
    size = (max(1, round(width)), max(1, round(width * ratio)))
    # BOX averages when it shrinks and repeats otherwise.
    shown = Image.fromarray(picture).resize(size, Image.Resampling.BOX)
    _mark_sides(shown, view.sides)
    if view.pixel is not None:
        _draw_scale(shown, view.pixel * picture.shape[1] / size[0])
    return shown


def _mark_sides(picture: Image.Image, sides: str | None) -> None:
    """Write the letters of the patient's sides at the left, right, top and bottom edge."""
    width, height = picture.size
    places = ((4, height / 2, "lm"), (width - 4, height / 2, "rm"))
    places += ((width / 2, 2, "ma"), (width / 2, height - 2, "md"))
    for letter, (x, y, anchor) in zip(sides or "", places, strict=False):
        _write(picture, (x, y), letter, anchor, max(14, min(width, height) // 22))


def _draw_scale(picture: Image.Image, mm_per_pixel: float) -> None:
    """Draw a bar of 1, 2 or 5 × 10ⁿ mm with its length at the lower left."""
    width, height = picture.size
    longest = LONGEST_BAR * width * mm_per_pixel
    power = 10.0 ** math.floor(math.log10(longest))
    length = max(step * power for step in (1, 2, 5) if step * power <= longest)
    pixels = length / mm_per_pixel
    x, y, thick = 6, height - 8, 2
    draw = ImageDraw.Draw(picture)
    draw.rectangle((x - 1, y - thick - 1, x + pixels + 1, y + 1), fill="black")
    draw.rectangle((x, y - thick, x + pixels, y), fill="white")
    _write(picture, (x, y - thick - 3), f"{length:g} mm", "ld", max(12, min(width, height) // 30))


def _write(
    picture: Image.Image, place: tuple[float, float], text: str, anchor: str, size: int
) -> None:
    """Write white text with a black rim, which can be read on any image."""
    ImageDraw.Draw(picture).text(
        place,
        text,
        font=font(size),
        anchor=anchor,
        fill="white",
        stroke_width=2,
        stroke_fill="black",
    )


@lru_cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return matplotlib's own font, which has more letters than that of Pillow."""
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / name, size)


def save_row(pictures: Sequence[np.ndarray], view: View, path: Path) -> None:
    """Write pictures (H, W, 3) uint8 of equal size side by side, as they are shown."""
    shown = [framed(picture, view) for picture in pictures]
    width, height = shown[0].size
    gap = 1 + width // 40
    row = Image.new("RGB", (len(shown) * (width + gap) - gap, height), "white")
    for index, picture in enumerate(shown):
        row.paste(picture, (index * (width + gap), 0))
    save_picture(row, path)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as a file that is complete or absent."""
    with atomic_path(path) as temporary:
        picture.save(temporary)
