"""Colours of classes, the same in every picture and table."""

from __future__ import annotations

import colorsys

import numpy as np

# These colours are easy to distinguish on grey CT. `label_colours` makes colours for more classes.
COLOURS = (
    (230, 60, 60),  # spleen
    (250, 190, 40),  # right kidney
    (60, 180, 75),  # left kidney
    (70, 240, 240),  # gallbladder
    (190, 120, 60),  # liver
    (240, 80, 230),  # stomach
    (60, 110, 255),  # aorta
    (190, 240, 70),  # pancreas
)


def label_colours(num_classes: int) -> np.ndarray:  # (num_classes + 1, 3) uint8
    """Return a different colour for each class; the first row is black, for the background."""
    rows = [(0, 0, 0), *COLOURS[:num_classes]]
    for index in range(len(COLOURS), num_classes):
        hue = index * 0.618034 % 1  # steps of the golden ratio keep neighbouring hues far apart
        colour = colorsys.hsv_to_rgb(hue, (0.9, 0.55)[index % 2], (1, 0.8, 0.6)[index % 3])
        rows.append(tuple(round(255 * part) for part in colour))
    return np.array(rows, dtype=np.uint8)
