"""Simulated clicks and boxes (`--prompt_prob`), so that the tuned network can be corrected.

SAM was trained with a first prompt and clicks where its mask was wrong (SAM, arXiv 2304.02643,
appendix A). Here a slice gets one box, or up to five clicks at once, that speak of one organ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lora import LoRAModel
from segment_anything.modeling import OrganPrompts
from segment_anything.modeling.prompt_encoder import (
    INSIDE,
    OUTSIDE,
    PADDING,
    TOP_LEFT,
)

MOST_CLICKS = 5
# Share of the prompted slices that get a box, if the organ is in the slice.
BOXES = 0.25
# A corner is off by up to this part of the box's side, as hands are (SAM: a standard deviation of
# 10%).
JITTER = 0.1
# Random numbers of a slice: whether it is prompted, for which organ, by a box or clicks, by how
# many clicks, and their places. The corners of a box use those of the clicks.
NUMBERS = 4 + MOST_CLICKS


class DrawnPrompts:
    """What was drawn for the prompts of a batch, whose places depend on the network's errors.

    A part of a batch (`drawn[start:end]`) finds its prompts once. So both passes of a batch in
    parts have the same ones.

    Args:
        prompted: for each slice whether it gets prompts.
        numbers: (B, NUMBERS) float64 in [0, 1), on the device of the labels.
        labels: (B, s, s) int64 classes, of the side of the logits.
    """

    def __init__(
        self, prompted: Sequence[bool], numbers: torch.Tensor, labels: torch.Tensor
    ) -> None:
        self.prompted, self.numbers, self.labels = list(prompted), numbers, labels
        self.asked = [index for index, wanted in enumerate(prompted) if wanted]
        self.others = [index for index, wanted in enumerate(prompted) if not wanted]
        self._found: OrganPrompts | None = None

    @classmethod
    def draw(
        cls, generators: Sequence[np.random.Generator], prompt_prob: float, labels: torch.Tensor
    ) -> DrawnPrompts:
        """Draw the numbers of each slice from its own generator."""
        numbers = np.stack([generator.random(NUMBERS) for generator in generators])
        on_device = torch.from_numpy(numbers).to(labels.device, non_blocking=True)
        return cls((numbers[:, 0] < prompt_prob).tolist(), on_device, labels)

    def __len__(self) -> int:
        return len(self.prompted)

    def __getitem__(self, part: slice) -> DrawnPrompts:
        return DrawnPrompts(self.prompted[part], self.numbers[part], self.labels[part])

    def prompts(self, logits: torch.Tensor, side: int) -> OrganPrompts:
        """Return the prompts of the slices `asked`, in their order.

        Args:
            logits: (len(asked), classes + 1, s, s) of these slices without prompts.
            side: of the network's input in pixels.
        """
        if self._found is None:
            labels, numbers = _rows(self.labels, self.asked), _rows(self.numbers, self.asked)
            self._found = simulated_prompts(logits, labels, numbers, side)
        return self._found


def simulated_prompts(
    logits: torch.Tensor, labels: torch.Tensor, numbers: torch.Tensor, side: int
) -> OrganPrompts:
    """Return clicks or a box for one organ of each slice, without waiting for the device.

    The organ is one that the slice has, or that the network sees in it. Its clicks lie where the
    network is wrong about it, and without an error anywhere in it. In a slice without any organ,
    the clicks say of a random organ that it is not there.

    Args:
        logits: (B, classes + 1, s, s) of the network without prompts.
        labels: (B, s, s) classes.
        numbers: (B, NUMBERS) in [0, 1).
        side: of the network's input in pixels.

    Returns:
        Prompts (B, MOST_CLICKS).
    """
    which, form, count = numbers[:, 1:4, None].unbind(1)  # each (B, 1)
    places = numbers[:, 4:]
    seen = logits.argmax(1)
    classes = torch.arange(1, logits.shape[1], device=labels.device)
    there = _occurs(labels, classes) | _occurs(seen, classes)  # (B, classes)
    organ = 1 + _pick(_first_that_is_not_empty(there, torch.ones_like(there)), which)  # (B, 1)
    truth = labels == organ[..., None]
    wrong = (truth != (seen == organ[..., None])).flatten(1)
    inside = truth.flatten(1)  # (B, s·s)
    voxels = _pick(
        _first_that_is_not_empty(wrong, inside, torch.ones_like(wrong)), places
    )  # (B, MOST_CLICKS)
    kinds = torch.where(inside.gather(1, voxels), INSIDE, OUTSIDE)
    order = torch.arange(MOST_CLICKS, device=labels.device)
    kinds = kinds.masked_fill(order > count * MOST_CLICKS, PADDING)
    pixels = side / labels.shape[-1]  # of the input, in a voxel of the logits
    coords = torch.stack([voxels % labels.shape[-1], voxels // labels.shape[-1]], dim=-1)
    coords = (coords + 0.5) * pixels - 0.5

    boxed = (form < BOXES) & inside.any(1, keepdim=True)  # (B, 1)
    corners = torch.nn.functional.pad(
        _loose_box(truth, places[:, :4], pixels), (0, 0, 0, MOST_CLICKS - 2)
    )
    corner_kinds = torch.where(order < 2, TOP_LEFT + order, PADDING)
    return OrganPrompts(
        torch.where(boxed[..., None], corners, coords).float(),
        torch.where(boxed, corner_kinds, kinds),
        organ.expand(-1, MOST_CLICKS),
    )


def prompted_logits(
    model: LoRAModel,
    images: torch.Tensor,
    drawn: DrawnPrompts,
    seeds: Sequence[int] | None = None,
) -> torch.Tensor:
    """Compute the logits of a batch of which some slices have prompts.

    The encoder runs once. The decoder runs once more, without gradient, for the slices with
    prompts, to find where they would be corrected.

    Args:
        images: (B, 3, S, S) about [0, 1].
        seeds: those of the dropout, `LoRAModel.seed_dropout`.

    Returns:
        (B, classes + 1, s, s).
    """
    sam = model.sam
    if seeds is not None:
        model.seed_dropout(seeds)
    embeddings = sam.image_encoder(sam.preprocess(images))

    def decode(slices: list[int], prompts: OrganPrompts | None = None) -> torch.Tensor:
        if seeds is not None:
            model.seed_dropout([seeds[index] for index in slices])
        return sam.decode(_rows(embeddings, slices), prompts)[0]

    with torch.no_grad():
        before = decode(drawn.asked)
    # Autocast keeps what it has rounded, and the weights rounded here are without gradient.
    torch.clear_autocast_cache()
    prompts = drawn.prompts(before, images.shape[-1])
    found = dict(zip(drawn.asked, decode(drawn.asked, prompts), strict=True))
    if drawn.others:
        found |= zip(drawn.others, decode(drawn.others), strict=True)
    if seeds is not None:  # Blocks that are computed again in the backward pass need all of them.
        model.seed_dropout(seeds)
    return torch.stack([found[index] for index in range(len(drawn))])


def _rows(tensor: torch.Tensor, indices: list[int]) -> torch.Tensor:
    """Return some slices of a batch; the host alone knows the indices, so nothing is copied."""
    if len(indices) == len(tensor):
        return tensor
    return torch.stack([tensor[index] for index in indices])


def _occurs(labels: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return whether classes (C,) occur in each of the labels (B, s, s), as (B, C)."""
    return (labels.flatten(1)[:, None] == classes[:, None]).any(2)


def _first_that_is_not_empty(*masks: torch.Tensor) -> torch.Tensor:
    """Return of masks (B, N), for each row, the first in which something is set."""
    *others, found = masks
    for mask in reversed(others):
        found = torch.where(mask.any(1, keepdim=True), mask, found)
    return found


def _pick(mask: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return places that are set in a mask, for each row as many as there are numbers.

    Args:
        mask: (B, N) bool, no row without a place that is set.
        numbers: (B, K) in [0, 1); each chooses among all places alike.

    Returns:
        (B, K) int64.
    """
    counted = mask.cumsum(1)
    chosen = (numbers * counted[:, -1:]).long()  # 0…count - 1
    return torch.searchsorted(counted, chosen, right=True)


def _loose_box(mask: torch.Tensor, numbers: torch.Tensor, pixels: float) -> torch.Tensor:
    """Return the corners of the box around a mask, each moved by up to `JITTER` of a side.

    Args:
        mask: (B, s, s) bool; where it is empty, the box means nothing.
        numbers: (B, 4) in [0, 1).
        pixels: of the input, in a voxel of the mask.

    Returns:
        (B, 2, 2) top left and bottom right as (x, y), the centres of pixels of the input.
    """
    size = mask.shape[-1]
    line = torch.arange(size, device=mask.device)
    occupied = torch.stack([mask.any(1), mask.any(2)], dim=1)  # (B, xy, s)
    first = torch.where(occupied, line, size).amin(2) * pixels  # (B, xy)
    last = (torch.where(occupied, line, -1).amax(2) + 1) * pixels - 1
    moved = (2 * numbers.unflatten(1, (2, 2)) - 1) * JITTER * (last - first + 1)[:, None]
    return (torch.stack([first, last], dim=1) + moved).clamp(0, size * pixels - 1)
