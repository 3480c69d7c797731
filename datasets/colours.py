"""Colours of classes, the same in every picture and table."""

from __future__ import annotations

import colorsys

import numpy as np


def label_colours(num_classes: int) -> np.ndarray:
    """The colour of every class, (num_classes + 1, 3) uint8, no two alike; background is black."""
    rows = [(0, 0, 0), *_COLOURS[:num_classes]]
    for index in range(len(_COLOURS), num_classes):
        hue = index * 0.618034 % 1  # golden ratio: far from those just before
        colour = colorsys.hsv_to_rgb(hue, (0.9, 0.55)[index % 2], (1, 0.8, 0.6)[index % 3])
        rows.append(tuple(round(255 * part) for part in colour))
    return np.array(rows, dtype=np.uint8)
