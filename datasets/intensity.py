"""How the values of a scan or picture become an image in [0, 1], and what they cannot be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.errors import InputError, warn

WINDOW, PERCENTILES, RANGE = "window", "percentiles", "range"
FAT = -50.0  # HU: in every scan something is darker, unless it is cropped to one organ


@dataclass(frozen=True)
class Intensity:
    """How the values of a scan become an image in [0, 1]: `low` and `high` go to 0 and 1."""

    rule: str  # WINDOW: HU; PERCENTILES: of each scan's own values; RANGE: of a picture's type
    low: float
    high: float
    sure: bool = False  # WINDOW: the user said so; values that look otherwise are only warned of

    def limits(self, image: np.ndarray, source: object) -> tuple[float, float]:
        """The values of this scan that become 0 and 1.

        Args:
            image: its voxels, any shape.
            source: its path, for messages.

        Raises:
            InputError: the values cannot be what the rule is for.
        """
        smallest, largest = float(image.min()), float(image.max())
        if self.rule == PERCENTILES:
            low, high = np.percentile(image, (self.low, self.high)).tolist()
            if low < high:
                return low, high
            if smallest < largest:  # nearly all voxels have one value, as in a mask
                return smallest, largest
            raise InputError(f"{source} holds {smallest:g} everywhere, expected an image")
        if self.rule == WINDOW:
            self._check_hounsfield(smallest, largest, source)
        else:
            self._check_grey_values(image.dtype, smallest, largest, source)
        return self.low, self.high

    def _check_hounsfield(self, smallest: float, largest: float, source: object) -> None:
        """Fractions, grey values, MR, and CT stored from 0 have nothing as dark as fat or air."""
        told = f"{source} holds intensities from {smallest:g} to {largest:g}"
        if smallest >= FAT:
            doubt = f"{told}, which do not look like Hounsfield units (expected some below {FAT:g})"
            if not self.sure:
                raise InputError(
                    f"{doubt}; give the scan as the scanner wrote it, or prepare the data with "
                    "--intensity ct if that is what they are"
                )
            warn(f"{doubt}; they were taken as such")
        if largest <= self.low or smallest >= self.high:
            raise InputError(
                f"{told}, of which {self.low:g}…{self.high:g} shows nothing; pass another --window "
                "when the data are prepared, or another scan"
            )

    def _check_grey_values(
        self, kind: np.dtype, smallest: float, largest: float, source: object
    ) -> None:
        """What is of another type than the data that were trained on would be black or white."""
        full = 255 if self.high <= 255 else 65535  # limits may be narrower than the type
        if full > 255 and kind == np.uint8:
            raise InputError(
                f"{source} holds 8 bits a pixel, the data set is of 16; convert it to 16 bits"
            )
        if smallest < min(0, self.low) or largest > full:
            raise InputError(
                f"{source} holds values from {smallest:g} to {largest:g}, expected "
                f"0…{full} as in the data that were trained on; convert it"
            )
        if kind.kind == "f" and largest <= 1 < self.high:
            raise InputError(
                f"{source} holds fractions from {smallest:g} to {largest:g}, expected 0…{full} as "
                "in the data that were trained on; convert it"
            )

    def __str__(self) -> str:
        what = {
            WINDOW: "HU {low:g}…{high:g} to [0, 1]",
            PERCENTILES: "percentiles {low:g}…{high:g} of each scan to [0, 1]",
            RANGE: "values {low:g}…{high:g} to [0, 1]",
        }[self.rule]
        return what.format(low=self.low, high=self.high)


def to_unit(image: np.ndarray, low: float, high: float) -> np.ndarray:  # (…) -> (…) float32
    """Clip to `low`…`high` and map them to 0 and 1."""
    unit = image.astype(np.float32)
    np.clip(unit, low, high, out=unit)
    unit -= low
    unit /= high - low
    return unit


def with_channels(
    unit: np.ndarray, channels: int, source: object
) -> np.ndarray:  # (D, H, W) or (D, 3, H, W) -> (D, H, W), or (D, 3, H, W) for 3 channels
    """Repeat grey where the data set is in colour.

    Raises:
        InputError: colour where the data set is grey.
    """
    if channels == 1 and unit.ndim == 4:
        raise InputError(f"{source} is in colour, the data set is grey; convert it to grey")
    if channels == 3 and unit.ndim == 3:
        return np.repeat(unit[:, None], 3, axis=1)
    return unit


CT = Intensity(WINDOW, -125.0, 275.0)
MR = Intensity(PERCENTILES, 0.5, 99.5)
PICTURE = Intensity(RANGE, 0.0, 255.0)
