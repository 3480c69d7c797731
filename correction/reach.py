"""How far a click or a box reaches, by the network's own logits: no training with prompts needed.

A click tells of one pixel. The pixels around it that the network finds at least as likely as this
one to be the organ (for a click outside: at least as unlikely) follow it, as far as they hang
together with it within its reach. So a click is always obeyed, and stays local.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from correction.prompts import Box, Click, Prompt

# Of the sides of the slice, for the first click on an organ; that of click n is divided by √n,
# since later clicks are about smaller errors.
REACH = 12 / 224
LEVELS = 32  # of the margin, that are tried for a box


def reached(labels: np.ndarray, logits: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    """Correct the labels of a slice by prompts, one after the other.

    Args:
        labels: (H, W) uint8.
        logits: (classes + 1, H, W) of the network without prompts, floating point.
        prompts: in the order in which the user gave them.

    Returns:
        New labels (H, W), uint8. The pixel of every click is as the click says, unless a later
        click on the same pixel, or a later prompt of another organ, says otherwise.
    """
    labels, made = labels.copy(), Counter()
    told: dict[tuple[int, int, int], bool] = {}  # organ and pixel of each click: is it inside?
    for prompt in prompts:
        if isinstance(prompt, Box):
            _fit(labels, logits, prompt)
            _obey(labels, logits, prompt.organ, told)
            continue
        made[prompt.organ] += 1
        told[prompt.organ, round(prompt.y), round(prompt.x)] = prompt.inside
        piece = piece_around(logits, prompt, REACH / made[prompt.organ] ** 0.5)
        for (organ, row, column), inside in told.items():
            if organ == prompt.organ and inside != prompt.inside:
                piece[row, column] = False
        if prompt.inside:
            labels[piece] = prompt.organ
        else:
            _take_away(labels, logits, piece, prompt.organ)
    return labels


def margin(logits: np.ndarray, organ: int) -> np.ndarray:  # (classes + 1, …) -> (…)
    """Return by how much the logit of an organ exceeds the largest of the others."""
    return logits[organ] - np.delete(logits, organ, axis=0).max(axis=0)


def piece_around(logits: np.ndarray, click: Click, reach: float) -> np.ndarray:
    """Return the piece of the slice (H, W) bool that follows a click.

    Args:
        logits: (classes + 1, H, W).
        reach: of the sides of the slice, so that it is an ellipse where these are not equal.
    """
    height, width = logits.shape[1:]
    row, column = round(click.y), round(click.x)
    down, across = max(reach * height, 1), max(reach * width, 1)
    top, left = max(row - int(down), 0), max(column - int(across), 0)
    window = slice(top, row + int(down) + 1), slice(left, column + int(across) + 1)
    likely = margin(logits[:, *window], click.organ) * (1 if click.inside else -1)
    rows, columns = np.ogrid[: likely.shape[0], : likely.shape[1]]
    near = ((rows + top - row) / down) ** 2 + ((columns + left - column) / across) ** 2 <= 1
    at = row - top, column - left
    pieces, _ = ndimage.label(near & (likely >= likely[at]))
    found = np.zeros((height, width), bool)
    found[window] = pieces == pieces[at]
    return found


def _take_away(labels: np.ndarray, logits: np.ndarray, piece: np.ndarray, organ: int) -> None:
    """Give an organ's pixels in a piece of the slice to the likeliest other class, in place."""
    taken = piece & (labels == organ)
    others = np.delete(logits[:, taken], organ, axis=0).argmax(axis=0)
    labels[taken] = others + (others >= organ)


def _obey(
    labels: np.ndarray, logits: np.ndarray, organ: int, told: dict[tuple[int, int, int], bool]
) -> None:
    """Let the pixels of an organ's clicks be as these say, after a box of the organ, in place."""
    for (of, row, column), inside in told.items():
        if of != organ:
            continue
        pixel = np.zeros(labels.shape, bool)
        pixel[row, column] = True
        if inside:
            labels[pixel] = organ
        else:
            _take_away(labels, logits, pixel, organ)


def _fit(labels: np.ndarray, logits: np.ndarray, box: Box) -> None:
    """Let an organ fill a box, in place.

    Of its pieces in the box, at any level of its margin, the one whose own box is most like the
    given one. Earlier pieces of the organ that reach into the box end there.
    """
    window = slice(round(box.y0), round(box.y1) + 1), slice(round(box.x0), round(box.x1) + 1)
    likely = margin(logits[:, *window], box.organ)
    levels = np.quantile(likely, np.linspace(0, 1, LEVELS, endpoint=False))
    # `max` takes the first of equally good ones: nearest to 0, where the network itself decides.
    pieces = (_largest_piece(likely >= level) for level in sorted(levels, key=abs))
    piece = max(pieces, key=_share_that_its_box_fills)
    own, _ = ndimage.label(labels == box.organ)
    ends = np.isin(own, np.unique(own[window])) & (own > 0)
    ends[window] &= ~piece
    _take_away(labels, logits, ends, box.organ)
    labels[window][piece] = box.organ


def _largest_piece(mask: np.ndarray) -> np.ndarray:  # (H, W) bool, not empty -> (H, W) bool
    pieces, _ = ndimage.label(mask)
    return pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()


def _share_that_its_box_fills(piece: np.ndarray) -> float:  # (H, W) bool, not empty
    rows, columns = (np.flatnonzero(piece.any(axis=axis)) for axis in (1, 0))
    return (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1) / piece.size
