"""How far a click and a box reach by the network's logits, against pixel-by-pixel searches."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from correction.prompts import Box, Click
from correction.reach import REACH, reached

SIZE = (60, 90)  # (H, W), not square: the reach is an ellipse


def smooth_logits(seed: int, classes: int = 4) -> np.ndarray:
    """Logits (classes, H, W) with blobs of several sizes."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    logits = np.zeros((classes, *SIZE), np.float32)
    for one in logits:
        for _ in range(6):
            y, x, width = rng.uniform(0, SIZE[0]), rng.uniform(0, SIZE[1]), rng.uniform(4, 20)
            one += rng.normal() * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / width**2)
    return logits


def flooded(logits: np.ndarray, click: Click, reach: float) -> set[tuple[int, int]]:
    """The pixels that follow a click, by a flood from it."""

    def likely(y: int, x: int) -> float:
        others = [logits[c, y, x] for c in range(len(logits)) if c != click.organ]
        value = logits[click.organ, y, x] - max(others)
        return value if click.inside else -value

    start = int(click.y), int(click.x)
    found, left = {start}, deque([start])
    while left:
        y, x = left.popleft()
        for to in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if to in found or not (0 <= to[0] < SIZE[0] and 0 <= to[1] < SIZE[1]):
                continue
            down, across = (to[0] - start[0]) / SIZE[0], (to[1] - start[1]) / SIZE[1]
            if down**2 + across**2 <= reach**2 and likely(*to) >= likely(*start):
                found.add(to)
                left.append(to)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_a_click_takes_the_piece_that_a_flood_finds(seed: int):
    rng, logits = np.random.default_rng(seed), smooth_logits(seed)
    before = logits.argmax(0).astype(np.uint8)
    labels, clicks = before.copy(), []
    for number in range(1, 5):
        y, x = rng.integers(0, SIZE[0]), rng.integers(0, SIZE[1])
        clicks.append(Click(2, float(x), float(y), bool(rng.integers(2))))
        piece = flooded(logits, clicks[-1], REACH / number**0.5)
        for other in clicks[:-1]:
            if other.inside != clicks[-1].inside:
                piece.discard((int(other.y), int(other.x)))
        for place in piece:
            if clicks[-1].inside:
                labels[place] = 2
            elif labels[place] == 2:
                order = np.argsort(-logits[:, *place])
                labels[place] = next(c for c in order if c != 2)
        assert np.array_equal(reached(before, logits, clicks), labels)
    assert np.array_equal(before, logits.argmax(0))  # not written into


@pytest.mark.parametrize("seed", range(20))
def test_every_click_is_obeyed_and_stays_local(seed: int):
    rng, logits = np.random.default_rng(seed), smooth_logits(seed)
    before = logits.argmax(0).astype(np.uint8)
    places = rng.choice(SIZE[0] * SIZE[1], 12, replace=False)
    clicks = [
        Click(3, float(p % SIZE[1]), float(p // SIZE[1]), bool(rng.integers(2))) for p in places
    ]
    labels = reached(before, logits, clicks)
    for click in clicks:
        assert (labels[int(click.y), int(click.x)] == 3) == click.inside
    rows, columns = np.nonzero(labels != before)
    distances = [((rows - c.y) / SIZE[0]) ** 2 + ((columns - c.x) / SIZE[1]) ** 2 for c in clicks]
    assert (np.min(distances, axis=0) <= REACH**2).all()
    # What changed was, or became, the organ that the clicks speak of.
    assert ((labels == 3) | (before == 3))[labels != before].all()


def test_the_last_click_on_a_pixel_counts():
    logits = smooth_logits(0)
    before = logits.argmax(0).astype(np.uint8)
    clicks = [Click(1, 40.0, 30.0, True), Click(1, 40.0, 30.0, False)]
    assert reached(before, logits, clicks)[30, 40] != 1
    assert reached(before, logits, clicks[::-1])[30, 40] == 1


def test_a_box_around_an_organ_that_the_network_finds_too_faint_brings_it_back():
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    distance = np.hypot(rows - 25, columns - 40)
    logits = np.stack([np.zeros(SIZE), -distance - 1]).astype(np.float32)  # nowhere the largest
    before = np.zeros(SIZE, np.uint8)
    labels = reached(before, logits, [Box(1, 30.0, 15.0, 50.0, 35.0)])
    rows, columns = np.nonzero(labels)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (15, 35, 30, 50)
    disc = distance <= 10
    assert (labels[disc] == 1).all() and labels.sum() < disc.sum() * 1.25  # and not the whole box


def test_a_piece_that_reaches_into_a_box_ends_there_and_others_stay():
    logits = np.stack([np.zeros(SIZE), np.full(SIZE, -1.0)]).astype(np.float32)
    before = np.zeros(SIZE, np.uint8)
    before[10:20, 10:60] = 1
    before[40:50, 10:20] = 1
    logits[1][before == 1] = 1
    labels = reached(before, logits, [Box(1, 10.0, 10.0, 29.0, 19.0)])
    wanted = np.zeros(SIZE, np.uint8)
    wanted[10:20, 10:30] = 1
    wanted[40:50, 10:20] = 1
    assert np.array_equal(labels, wanted)


@pytest.mark.parametrize("seed", range(8))
def test_a_box_does_not_overrule_earlier_clicks_on_its_organ(seed: int):
    rng, logits = np.random.default_rng(seed), smooth_logits(seed)
    before = logits.argmax(0).astype(np.uint8)
    places = rng.choice(SIZE[0] * SIZE[1], 8, replace=False)
    clicks = [
        Click(2, float(p % SIZE[1]), float(p // SIZE[1]), bool(rng.integers(2))) for p in places
    ]
    labels = reached(before, logits, [*clicks, Box(2, 5.0, 5.0, 80.0, 50.0)])
    for click in clicks:
        assert (labels[int(click.y), int(click.x)] == 2) == click.inside


def test_a_click_in_a_corner_and_one_on_a_tiny_slice():
    for size in ((60, 90), (1, 1), (3, 2)):
        logits = np.random.default_rng(0).normal(size=(3, *size)).astype(np.float32)
        before = logits.argmax(0).astype(np.uint8)
        corner = Click(1, float(size[1] - 1), float(size[0] - 1), True)
        assert reached(before, logits, [corner])[-1, -1] == 1
        outside = Click(1, 0.0, 0.0, False)
        assert reached(before, logits, [outside])[0, 0] != 1
