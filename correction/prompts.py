"""Clicks and boxes in pixels of a slice, each of which speaks of one organ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.errors import InputError
from segment_anything.modeling import OrganPrompts
from segment_anything.modeling.prompt_encoder import (
    BOTTOM_RIGHT,
    INSIDE,
    OUTSIDE,
    PADDING,
    TOP_LEFT,
)


@dataclass(frozen=True)
class Click:
    """A pixel that belongs to an organ or does not."""

    organ: int  # class 1…C
    x: float  # column, from 0 to W - 1
    y: float  # row, from 0 to H - 1
    inside: bool = True

    @property
    def corners(self) -> list[tuple[float, float, int]]:
        """Each token of the prompt: x, y and its kind."""
        return [(self.x, self.y, INSIDE if self.inside else OUTSIDE)]


@dataclass(frozen=True)
class Box:
    """A box around an organ: the columns and rows of its first and last pixels."""

    organ: int  # class 1…C
    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def corners(self) -> list[tuple[float, float, int]]:
        """Each token of the prompt: x, y and its kind."""
        return [(self.x0, self.y0, TOP_LEFT), (self.x1, self.y1, BOTTOM_RIGHT)]


Prompt = Click | Box


def require_inside(prompts: Sequence[Prompt], size: tuple[int, int]) -> None:
    """Raise an `InputError` for a prompt that does not lie in a slice of `size` (rows, columns)."""
    rows, columns = size
    for prompt in prompts:
        for x, y, _ in prompt.corners:
            if not (0 <= x <= columns - 1 and 0 <= y <= rows - 1):  # NaN neither
                raise InputError(
                    f"the place x = {x:g}, y = {y:g} is outside the slice of {columns} columns and "
                    f"{rows} rows; x goes from 0 to {columns - 1}, y from 0 to {rows - 1}"
                )
        if isinstance(prompt, Box) and not (prompt.x0 <= prompt.x1 and prompt.y0 <= prompt.y1):
            raise InputError(
                f"the box ({prompt.x0:g}, {prompt.y0:g}, {prompt.x1:g}, {prompt.y1:g}) is turned "
                "round, expected x0 ≤ x1 and y0 ≤ y1; give its corners as (x0, y0, x1, y1)"
            )


def network_prompts(
    images: Sequence[Sequence[Prompt]], size: tuple[int, int], img_size: int, device: torch.device
) -> OrganPrompts:
    """Return the prompts of B slices in pixels of the network's input.

    A place moves as the zoom of the slices moves it: the centre of the first pixel stays that of
    the first, and the centre of the last that of the last, whatever sizes lie between.

    Args:
        images: the prompts of each slice.
        size: (rows, columns) of the slices.
        img_size: side S of the network's input.
    """
    rows, columns = size
    across, down = (img_size - 1) / max(columns - 1, 1), (img_size - 1) / max(rows - 1, 1)
    tokens = [
        [(x * across, y * down, kind, one.organ) for one in prompts for x, y, kind in one.corners]
        for prompts in images
    ]
    count = max(map(len, tokens))
    filled = [row + [(0.0, 0.0, PADDING, 0)] * (count - len(row)) for row in tokens]
    table = torch.tensor(filled, dtype=torch.float32, device=device)  # (B, count, 4)
    kinds, organs = table[..., 2].long(), table[..., 3].long()
    return OrganPrompts(coords=table[..., :2], kinds=kinds, organs=organs)
