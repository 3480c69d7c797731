"""A simulated user, who clicks where the labels of a slice are wrong about an organ.

As usual in interactive segmentation, each click falls on the inmost pixel of the largest piece of
error: the evaluation of RITM (Sofiiuk et al., arXiv 2102.06583) and of SAM (arXiv 2304.02643,
appendix D.1) places clicks where the distance to the edge of the error is largest.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from correction.prompts import Click


def next_click(
    labels: np.ndarray, truth: np.ndarray, organ: int, rng: np.random.Generator | None = None
) -> Click | None:
    """Return the click of the user on one slice; None: the labels are right about the organ.

    Args:
        labels: (H, W) classes that the user sees.
        truth: (H, W) classes that the user has in mind.
        organ: class 1…C.
        rng: None: the inmost pixel of the largest piece of error; else any pixel of error.

    Returns:
        A click inside the organ where it is missed, outside where it is false.
    """
    wanted = truth == organ
    wrong = wanted != (labels == organ)
    if not wrong.any():
        return None
    if rng is None:
        row, column = inmost_pixel(largest_piece(wrong & wanted, wrong & ~wanted))
    else:
        row, column = rng.choice(np.argwhere(wrong)).tolist()
    return Click(organ, x=column, y=row, inside=bool(wanted[row, column]))


def largest_piece(missed: np.ndarray, false: np.ndarray) -> np.ndarray:
    """Return the largest connected piece of two masks (H, W) bool that do not overlap.

    A missed and a false piece that touch are two errors, and need two clicks. Pixels that touch at
    a corner belong to the same piece. Of equal pieces the first counts, missed ones first.
    """
    pieces, _ = ndimage.label(missed, np.ones((3, 3)))
    others, _ = ndimage.label(false, np.ones((3, 3)))
    pieces = np.where(false, others + pieces.max(), pieces)
    sizes = np.bincount(pieces.ravel())[1:]
    return pieces == 1 + sizes.argmax()


def inmost_pixel(piece: np.ndarray) -> tuple[int, int]:
    """Return (row, column) of the pixel of a mask (H, W) that is farthest from its edge.

    Outside of the slice nothing belongs to the piece. Of equally far pixels the first counts.
    """
    distances = ndimage.distance_transform_edt(np.pad(piece, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(distances.argmax(), piece.shape)
    return int(row), int(column)
