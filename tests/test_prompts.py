"""Prompts that speak of organs: their tokens, and the clicks and boxes that training simulates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_model

from segment_anything.modeling import OrganPrompts
from segment_anything.modeling.prompt_encoder import (
    BOTTOM_RIGHT,
    INSIDE,
    OUTSIDE,
    PADDING,
    TOKENS,
    TOP_LEFT,
)
from training.prompts import BOXES, JITTER, MOST_CLICKS, NUMBERS, DrawnPrompts, simulated_prompts

SIDE, LOW = 64, 16
CLASSES = 3


def some_prompts(batch: int, count: int, seed: int = 0) -> OrganPrompts:
    generator = torch.Generator().manual_seed(seed)
    return OrganPrompts(
        torch.rand(batch, count, 2, generator=generator) * SIDE,
        torch.randint(OUTSIDE, BOTTOM_RIGHT + 1, (batch, count), generator=generator),
        torch.randint(1, 3, (batch, count), generator=generator),
    )


def some_slices(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits, labels of which some have few organs or none, and drawn numbers."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, CLASSES + 1, (count, 4, 4), generator=generator)
    seen = torch.where(torch.rand(count, 4, 4, generator=generator) < 0.8, truth, truth.roll(1, 1))
    for labels in (truth, seen):
        empty = torch.rand(count, generator=generator) < 0.4
        labels[empty] = 0
    seen[::5] = truth[::5]  # without an error
    labels, seen = (x.repeat_interleave(4, 1).repeat_interleave(4, 2) for x in (truth, seen))
    logits = torch.nn.functional.one_hot(seen, CLASSES + 1).permute(0, 3, 1, 2).float()
    return logits, labels, torch.rand(count, NUMBERS, generator=generator, dtype=torch.float64)


def test_a_prompt_says_kind_and_organ_in_a_token_and_at_its_place():
    """Against numpy; padding has neither position nor organ, and no place in the image."""
    sam = tiny_model().sam
    prompts = some_prompts(2, 6)
    prompts.kinds[1, 4:] = PADDING
    encoder, organs = sam.prompt_encoder, sam.mask_decoder.mask_tokens.weight
    found, dense = encoder.embed_organs(prompts, organs)
    assert found.shape == (2, TOKENS, 256) and dense.shape == (2, 256, 4, 4)
    kinds = [encoder.not_a_point_embed, *encoder.point_embeddings]
    kinds = [kind.weight[0].detach().double().numpy() for kind in kinds]
    matrix = encoder.pe_layer.positional_encoding_gaussian_matrix.double().numpy()
    put = np.zeros(dense.shape)
    for row in range(2):
        for column in range(TOKENS):
            kind = PADDING if column >= 6 else int(prompts.kinds[row, column])
            expected = kinds[kind + 1]
            if kind != PADDING:
                organ = organs[prompts.organs[row, column]].detach().double().numpy()
                place = (prompts.coords[row, column].double().numpy() + 0.5) / SIDE
                x, y = np.clip(place * 4 - 0.5, 0, 3)
                for i, j in np.ndindex(4, 4):
                    share = max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j))
                    put[row, :, i, j] += share * (expected + organ)
                angles = 2 * np.pi * (2 * place - 1) @ matrix
                expected = expected + np.concatenate([np.sin(angles), np.cos(angles)]) + organ
            assert np.abs(found[row, column].detach().numpy() - expected).max() < 1e-4
    assert np.abs(dense.detach().numpy() - put).max() < 1e-4
    with torch.autocast("cpu", torch.bfloat16):  # A place must not move by pixels.
        assert all(map(torch.equal, encoder.embed_organs(prompts, organs), (found, dense)))


@pytest.mark.parametrize("count", [1, 7, 8, 13])
@torch.no_grad()
def test_padding_is_always_up_to_a_multiple(count: int):
    """A slice has the same logits whatever its neighbours in the batch are asked."""
    sam = tiny_model().sam
    prompts = some_prompts(2, count)
    embeddings = sam.image_encoder(torch.rand(2, 3, SIDE, SIDE))
    together, _ = sam.decode(embeddings, prompts)
    padded = prompts.padded()
    assert padded.kinds.shape[1] == -(-count // TOKENS) * TOKENS
    assert torch.equal(sam.decode(embeddings, padded)[0], together)
    alone = OrganPrompts(prompts.coords[:1], prompts.kinds[:1], prompts.organs[:1])
    assert torch.allclose(sam.decode(embeddings[:1], alone)[0], together[:1], atol=1e-4)
    # A second slice that is asked less.
    fewer = OrganPrompts(prompts.coords, prompts.kinds.clone(), prompts.organs)
    fewer.kinds[1, 1:] = PADDING
    assert torch.allclose(sam.decode(embeddings, fewer)[0][0], together[0], atol=1e-4)


def test_clicks_lie_where_the_network_is_wrong():
    """Each rule, one slice at a time in numpy."""
    logits, labels, numbers = some_slices(200)
    numbers[:, 2] = numbers[:, 2] * (1 - BOXES) + BOXES  # clicks alone
    found = simulated_prompts(logits, labels, numbers, SIDE)
    assert found.coords.dtype == torch.float32
    cases = {"missed": 0, "false": 0, "right": 0, "none": 0}
    for index in range(len(labels)):
        truth, seen = labels[index].numpy(), logits[index].argmax(0).numpy()
        kinds, organs = found.kinds[index].numpy(), found.organs[index].numpy()
        organ, count = organs[0], 1 + int(numbers[index, 3] * MOST_CLICKS)
        there = {*np.unique(truth), *np.unique(seen)} - {0}
        assert (organs == organ).all() and organ in (there or range(1, CLASSES + 1))
        assert (kinds[:count] >= 0).all() and (kinds[count:] == PADDING).all()
        wrong = (truth == organ) != (seen == organ)
        voxels = (found.coords[index].numpy() + 0.5) / (SIDE / LOW) - 0.5
        assert (voxels == voxels.round()).all()  # the centre of a voxel of the logits
        for (x, y), kind in zip(voxels.astype(int)[:count], kinds, strict=False):
            assert kind == (INSIDE if truth[y, x] == organ else OUTSIDE)
            if wrong.any():
                assert wrong[y, x]
                cases["missed" if kind == INSIDE else "false"] += 1
            elif (truth == organ).any():
                assert kind == INSIDE
                cases["right"] += 1
            else:
                assert not there and kind == OUTSIDE
                cases["none"] += 1
    assert min(cases.values()) > 10, cases


def test_each_wrong_voxel_and_each_organ_is_as_likely():
    labels = torch.zeros(1, LOW, LOW, dtype=torch.int64)
    labels[0, 2, 3:7] = 1
    labels[0, 9:11, 14] = 2
    logits = torch.zeros(1, CLASSES + 1, LOW, LOW)
    logits[:, 0] = 1
    seen: dict[tuple[int, float, float], int] = {}
    steps = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    for organ in (0.1, 0.3, 0.6, 0.9):
        for place in steps:
            numbers = torch.full((1, NUMBERS), float(place), dtype=torch.float64)
            numbers[:, 1], numbers[:, 2] = organ, 1 - 1e-9
            found = simulated_prompts(logits, labels, numbers, SIDE)
            key = (int(found.organs[0, 0]), *found.coords[0, 0].tolist())
            seen[key] = seen.get(key, 0) + 1
    voxels = {1: [(x, 2) for x in range(3, 7)], 2: [(14, 9), (14, 10)]}
    assert seen == {
        (organ, 4 * x + 1.5, 4 * y + 1.5): 2 * 40 // len(places)
        for organ, places in voxels.items()
        for x, y in places
    }


def test_a_box_is_tight_but_for_its_jitter():
    logits, labels, numbers = some_slices(100, seed=1)
    numbers[:, 2] *= BOXES
    numbers[:, 4:] = 0.5  # no jitter
    tight = simulated_prompts(logits, labels, numbers, SIDE)
    numbers[:, 4:] = torch.rand(100, MOST_CLICKS, dtype=torch.float64)
    loose = simulated_prompts(logits, labels, numbers, SIDE)
    boxes = 0
    for index in range(len(labels)):
        rows, columns = np.nonzero(labels[index].numpy() == int(tight.organs[index, 0]))
        kinds = tight.kinds[index].tolist()
        if not len(rows):  # The network sees an organ that is not there: clicks.
            assert set(kinds) <= {OUTSIDE, PADDING}
            continue
        boxes += 1
        assert kinds == [TOP_LEFT, BOTTOM_RIGHT, *[PADDING] * (MOST_CLICKS - 2)]
        first = np.array([columns.min(), rows.min()]) * 4
        last = np.array([columns.max(), rows.max()]) * 4 + 3
        assert np.array_equal(tight.coords[index, :2].numpy(), [first, last])
        off = np.abs(loose.coords[index, :2].numpy() - [first, last])
        assert (off <= JITTER * (last - first + 1) + 1e-4).all()
        assert ((loose.coords[index] >= 0) & (loose.coords[index] <= SIDE - 1)).all()
    assert boxes > 50 and not torch.equal(tight.coords, loose.coords)


def test_the_prompts_of_a_slice_do_not_depend_on_the_others():
    logits, labels, numbers = some_slices(12)
    drawn = DrawnPrompts([index % 3 > 0 for index in range(12)], numbers, labels)
    asked = [index for index in range(12) if index % 3]
    whole = drawn.prompts(logits[asked], SIDE)
    assert whole is drawn.prompts(torch.zeros_like(logits[asked]), SIDE)  # found once
    for start in range(0, 12, 4):
        part = drawn[start : start + 4]
        slices = [index for index in asked if start <= index < start + 4]
        assert len(part) == 4 and [start + index for index in part.asked] == slices
        found = part.prompts(logits[slices], SIDE)
        rows = [asked.index(index) for index in slices]
        for name in ("coords", "kinds", "organs"):
            assert torch.equal(getattr(found, name), getattr(whole, name)[rows])
