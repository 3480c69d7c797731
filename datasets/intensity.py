"""Rules that map the values of a scan or picture to an image in [0, 1], and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import InputError, warn

WINDOW, PERCENTILES, RANGE = "window", "percentiles", "range"
UNKNOWN = "unknown"  # the training data were prepared elsewhere and do not say how
AIR = -900.0  # HU; air around a patient or in the lungs is darker
SOME_AIR = 0.01  # of the voxels
UNDERSHOOT = 0.05  # of the largest value: resampling makes values a little negative
FAINT = 8  # a picture that uses less than this part of the values in training is nearly black
FAT = -50.0  # HU; every scan has darker voxels, unless it is cropped to a single organ


@dataclass(frozen=True)
class Intensity:
    """A rule that maps the values of a scan to [0, 1]: `low` becomes 0 and `high` becomes 1."""

    # WINDOW: limits in HU; PERCENTILES: percentiles of each scan; RANGE: limits in grey values.
    rule: str
    low: float
    high: float
    # WINDOW: the user asked for this rule, so values that do not look like HU are only a warning.
    sure: bool = False

    def limits(self, image: np.ndarray, source: object) -> tuple[float, float]:
        """Return the values of this scan that become 0 and 1.

        Args:
            image: voxels, any shape.
            source: path of the scan, for messages.

        Raises:
            InputError: the values do not fit the rule.
        """
        if self.rule == UNKNOWN:
            raise InputError(
                f"the adapter does not record how {source} is scaled to [0, 1], because its "
                "training slices were prepared elsewhere; pass --intensity, with --window for "
                "other limits, as they were prepared"
            )
        smallest, largest = float(image.min()), float(image.max())
        if self.rule == PERCENTILES:
            low, high = np.percentile(image, (self.low, self.high)).tolist()
            if low < high:
                return low, high
            if smallest < largest:  # nearly all voxels have the same value, as in a mask
                return smallest, largest
            raise InputError(f"{source} holds {smallest:g} everywhere, expected an image")
        if self.rule == WINDOW:
            self._check_hounsfield(smallest, largest, source)
        else:
            self._check_grey_values(image.dtype, smallest, largest, source)
        return self.low, self.high

    def doubts(self, image: np.ndarray, raw_range: tuple[float, float] | None) -> list[str]:
        """Say how values that fit the rule still differ in kind from the training data's.

        Args:
            image: voxels, any shape.
            raw_range: smallest and largest value of the training data; None: not known.
        """
        smallest, largest = float(image.min()), float(image.max())
        held = f"its values from {smallest:g} to {largest:g}"
        low, high = raw_range or (0.0, np.inf)
        trained = f" (values from {low:g} to {high:g})" if raw_range else ""
        kind = "do not use the result unless the scan is of the kind that the network knows"
        dark = self.rule == PERCENTILES and smallest <= AIR < low
        if dark and air_share(image) >= SOME_AIR:
            known = "was not trained on CT" if raw_range else "scales scans as is usual for MR"
            return [
                f"{held} look like CT in Hounsfield units, but the network {known}{trained}; {kind}"
            ]
        if raw_range is None:
            return []
        if self.rule != RANGE and low <= AIR and smallest > AIR / 2:
            return [
                f"{held} hold no air, unlike the CT that the network was trained on{trained}, so "
                f"this may be MR, or a CT that is cropped; {kind}"
            ]
        if self.rule == PERCENTILES:
            negative = low >= 0 > smallest + UNDERSHOOT * largest
            return [f"{held} are partly negative, unlike the training data{trained}"] * negative
        if largest > high + (high - low):
            return [f"{held} lie far outside those of the training data{trained}; {kind}"]
        if self.rule == RANGE and largest * FAINT < high:
            return [f"{held} are nearly black beside those of the training data{trained}"]
        return []

    def _check_hounsfield(self, smallest: float, largest: float, source: object) -> None:
        """Refuse values that are not HU: nothing is as dark as fat or air.

        This finds fractions, grey values, MR, and CT that is stored with an offset of 1024.
        """
        values = f"{source} holds intensities from {smallest:g} to {largest:g}"
        if smallest >= FAT:
            problem = (
                f"{values}, which do not look like Hounsfield units (expected some below {FAT:g})"
            )
            if not self.sure:
                raise InputError(
                    f"{problem}; use the scan as the scanner wrote it, or prepare the data with "
                    "--intensity ct if the values are Hounsfield units"
                )
            warn(
                f"{problem}; they are used as Hounsfield units because --intensity or --window "
                "asked for it"
            )
        if largest <= self.low or smallest >= self.high:
            raise InputError(
                f"{values}, which all lie outside the window {self.low:g}…{self.high:g}; prepare "
                "the data with another --window, or use another scan"
            )

    def _check_grey_values(
        self, dtype: np.dtype, smallest: float, largest: float, source: object
    ) -> None:
        """Refuse pictures of another type than the training data: they would be black or white."""
        full = 255 if self.high <= 255 else 65535  # `low` and `high` may be narrower than the type
        if full > 255 and dtype == np.uint8:
            raise InputError(
                f"{source} holds 8 bits per pixel but the data set has 16; convert it to 16 bits"
            )
        expected = f"expected 0…{full} as in the training data; convert it"
        if smallest < min(0, self.low) or largest > full:
            raise InputError(f"{source} holds values from {smallest:g} to {largest:g}, {expected}")
        if dtype.kind == "f" and largest <= 1 < self.high:
            raise InputError(
                f"{source} holds fractions from {smallest:g} to {largest:g}, {expected}"
            )

    def __str__(self) -> str:
        what = {
            WINDOW: "HU {low:g}…{high:g} to [0, 1]",
            PERCENTILES: "percentiles {low:g}…{high:g} of each scan to [0, 1]",
            RANGE: "values {low:g}…{high:g} to [0, 1]",
            UNKNOWN: "unknown",
        }[self.rule]
        return what.format(low=self.low, high=self.high)


def air_share(image: np.ndarray) -> float:
    """Return the share of voxels (D, …) that are as dark as air if they are Hounsfield units."""
    return sum(np.count_nonzero(plane <= AIR) for plane in image) / image.size


def to_unit(image: np.ndarray, low: float, high: float) -> np.ndarray:  # (…) -> (…) float32
    """Clip values to `low`…`high` and map these limits to 0 and 1."""
    unit = image.astype(np.float32)
    np.clip(unit, low, high, out=unit)
    unit -= low
    unit /= high - low
    return unit


def with_channels(
    unit: np.ndarray, channels: int, source: object
) -> np.ndarray:  # (D, H, W) or (D, 3, H, W) -> (D, H, W) for 1 channel, (D, 3, H, W) for 3
    """Repeat a grey image three times if the data set is in colour.

    Raises:
        InputError: the image is in colour but the data set is grey.
    """
    if channels == 1 and unit.ndim == 4:
        raise InputError(f"{source} is in colour but the data set is grey; convert it to grey")
    if channels == 3 and unit.ndim == 3:
        return np.repeat(unit[:, None], 3, axis=1)
    return unit


CT = Intensity(rule=WINDOW, low=-125.0, high=275.0)
MR = Intensity(rule=PERCENTILES, low=0.5, high=99.5)
PICTURE = Intensity(rule=RANGE, low=0.0, high=255.0)
NOT_RECORDED = Intensity(rule=UNKNOWN, low=0.0, high=1.0)
RULES = {"ct": CT, "mr": MR, "picture": PICTURE}  # the values of --intensity


def choose_intensity(
    default: Intensity, rule: str | None, window: Sequence[float] | None
) -> Intensity:
    """Return the rule that the flags name, or `default`.

    Args:
        rule: `--intensity`, a key of `RULES`.
        window: `--window`, the lower and the upper limit.

    Raises:
        InputError: the limits are in the wrong order, or are not percentiles.
    """
    named = RULES.get(rule, default)
    if named.rule == default.rule:
        named = default  # its limits fit the data: 16-bit pictures have wider limits than 8-bit
    if named.rule == UNKNOWN and window:
        raise InputError("--window needs --intensity, which says what its limits mean; pass both")
    low, high = window or (named.low, named.high)
    percentiles = named.rule == PERCENTILES
    if not low < high or (percentiles and not 0 <= low < high <= 100):
        expected = "two percentiles, " if percentiles else ""
        raise InputError(f"--window is {low:g} {high:g}, expected {expected}the lower limit first")
    chosen = rule is not None or window is not None
    return Intensity(rule=named.rule, low=low, high=high, sure=chosen and named.rule == WINDOW)
