"""Clicks and boxes on a slice: where they land in the network, and what they change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_model
from scipy import ndimage

from common.errors import InputError
from correction.predictor import NETWORK, OrganPredictor, merged
from correction.prompts import Box, Click, network_prompts
from correction.reach import reached
from evaluation.predict_volume import predict_volume
from lora import LoRAModel
from segment_anything.modeling import OrganPrompts
from segment_anything.modeling.prompt_encoder import (
    BOTTOM_RIGHT,
    INSIDE,
    OUTSIDE,
    PADDING,
    TOP_LEFT,
)

NAMES = ["liver", "spleen"]
SIZE = (50, 40)  # (H, W) of a slice
SIDES = {"input_size": 48, "img_size": 64}


def prompted_model() -> LoRAModel:
    """Return a network that says that it knows prompts."""
    model = tiny_model().eval()
    model.prompt_prob = 0.5
    return model


@pytest.fixture(scope="module")
def predictor() -> OrganPredictor:
    return OrganPredictor(prompted_model(), NAMES, **SIDES, by=NETWORK)


def test_a_network_that_knows_no_prompts_is_not_asked():
    with pytest.raises(InputError, match=r"knows no prompts.*--prompt_prob"):
        OrganPredictor(tiny_model(), NAMES, **SIDES, by=NETWORK)
    with pytest.raises(InputError, match="ONNX file takes no prompts"):
        OrganPredictor(torch.nn.Identity(), NAMES, **SIDES)


def test_by_its_logits_any_network_is_corrected():
    """Its labels follow `reached`, by the logits at the size of the slice."""
    predictor = OrganPredictor(tiny_model().eval(), NAMES, **SIDES)
    predictor.set_image(a_slice())
    clicks = [Click(2, 5.0, 30.0), Click(1, 20.0, 10.0), Click(2, 8.0, 30.0, inside=False)]
    with torch.inference_mode():
        low_res, _ = predictor.sam.decode(predictor.embedding)
        square = torch.nn.functional.interpolate(low_res, (64, 64), mode="bilinear")
        logits = torch.nn.functional.interpolate(square, SIZE, mode="bilinear")[0].numpy()
    expected = reached(predictor.labels, logits, clicks)
    found = predictor.correct(clicks)
    assert (found != expected).mean() < 0.002  # float32 rounds in another order
    assert (found[30, 5], found[10, 20]) == (2, 1) and found[30, 8] != 2
    labels, logits = predictor.predict([[5, 30]], [1], organ="spleen")
    assert np.array_equal(labels, predictor.correct([Click(2, 5, 30)]))
    assert np.array_equal(logits, low_res[0].numpy())
    for inside in (0, 1):  # clicks correct a box that is given with them
        labels, _ = predictor.predict([[20, 25]], [inside], [[0, 0, 39, 49]], organ=np.uint8(2))
        assert (labels[25, 20] == 2) == inside


def a_slice(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape or SIZE, dtype=np.float32)


def test_merged_changes_only_what_was_or_becomes_a_prompted_organ():
    rng = np.random.default_rng(0)
    before, found = rng.integers(0, 5, (2, 3, 30, 30)).astype(np.uint8)
    result = merged(before, found, [2, 4])
    assert result.dtype == np.uint8
    for old, new, got in zip(before.flat, found.flat, result.flat, strict=True):
        assert got == (new if {old, new} & {2, 4} else old)
    for organ in (2, 4):
        assert np.array_equal(result == organ, found == organ)


@pytest.mark.parametrize("shape", [SIZE, (3, *SIZE), (64, 64)])
def test_labels_are_those_of_predict_volume(predictor: OrganPredictor, shape: tuple[int, ...]):
    image = a_slice(*shape)
    predictor.set_image(image)
    (expected,) = predict_volume(
        tiny_model_of(predictor), image[None], input_size=(48, 48), image_size=(64, 64)
    )
    assert len(np.unique(expected)) > 1
    assert predictor.labels.dtype == np.uint8 and np.array_equal(predictor.labels, expected)
    predictor.labels[:] = 9  # a copy
    assert np.array_equal(predictor.correct([]), expected)


def tiny_model_of(predictor: OrganPredictor) -> torch.nn.Module:
    """Call a network as `predict_volume` does."""

    class Forward(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sam = predictor.sam

        def forward(self, images: torch.Tensor, *rest: object) -> dict[str, torch.Tensor]:
            return self.sam(images, *rest)

    return Forward()


@pytest.mark.parametrize("size", [(512, 512), (50, 40), (64, 64)])
def test_a_place_moves_as_the_zoom_moves_it(size: tuple[int, int]):
    """Zoom ramps with scipy to the training size and on: they hold where each pixel came from."""
    places = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij")).astype(float)
    for side in (48, 64):
        places = np.stack([ndimage.zoom(p, np.divide(side, p.shape), order=1) for p in places])
    rng = np.random.default_rng(0)
    wanted = rng.integers(2, 60, (9, 2))  # (x, y) in the network; the last row may be 0 in scipy
    rows, columns = places[:, wanted[:, 1], wanted[:, 0]]
    clicks = [Click(1, x, y) for x, y in zip(columns, rows, strict=True)]
    found = network_prompts([clicks], size, 64, torch.device("cpu"))
    assert np.allclose(found.coords[0, :9], wanted, atol=1e-3)


def test_prompts_of_several_slices_have_equal_lengths():
    corners = Box(2, 10, 20, 39, 49)
    rows = [[Click(1, 0, 0), Click(1, 39, 49, inside=False), corners], [Click(2, 39, 0)] * 6]
    found = network_prompts(rows, SIZE, 64, torch.device("cpu"))
    assert found.coords.shape == (2, 6, 2)
    kinds = [INSIDE, OUTSIDE, TOP_LEFT, BOTTOM_RIGHT, PADDING, PADDING]
    assert found.kinds.tolist() == [kinds, [INSIDE] * 6]
    assert found.organs.tolist() == [[1, 1, 2, 2, 0, 0], [2] * 6]
    assert found.coords[0, [0, 1, 3]].tolist() == [[0, 0], [63, 63], [63, 63]]


def test_predict_gives_the_network_the_prompts(predictor: OrganPredictor):
    predictor.set_image(a_slice())
    points, boxes = np.array([[0, 0], [39, 49]]), np.array([0, 0, 39, 49])
    labels, logits = predictor.predict(points, np.array([1, 0]), boxes, organ="spleen")
    coords = torch.tensor([[0, 0], [63, 63], [0, 0], [63, 63], *[[0, 0]] * 4]).float()
    kinds = torch.tensor([TOP_LEFT, BOTTOM_RIGHT, INSIDE, OUTSIDE, *[PADDING] * 4])
    prompts = OrganPrompts(coords[None], kinds[None], torch.full((1, 8), 2))
    with torch.inference_mode():
        expected, _ = predictor.sam.decode(predictor.embedding, prompts)
    assert np.array_equal(logits, expected[0].numpy())
    found, _ = predictor.decode(predictor.embedding, prompts, SIZE)
    assert np.array_equal(labels, merged(predictor.labels, found[0], [2]))
    assert np.array_equal(labels, predictor.predict(points, [1, 0], boxes, organ=2)[0])


def test_a_prompt_changes_its_organ_alone(predictor: OrganPredictor):
    predictor.set_image(a_slice())
    before = np.random.default_rng(1).integers(0, 3, SIZE).astype(np.uint8)
    labels, _ = predictor.predict([[5, 30]], [1], organ="liver", before=before)
    changed = labels != before
    assert changed.any()
    assert ((before == 1) | (labels == 1))[changed].all()


def test_several_organs_are_corrected_each_by_its_own_prompts(predictor: OrganPredictor):
    predictor.set_image(a_slice())
    first, second = Click(1, 5, 30), Click(2, 20, 10)
    spleen, _ = predictor.predict([[20, 10]], [1], organ=2)
    both, _ = predictor.predict([[5, 30]], [1], organ=1, before=spleen)
    assert np.array_equal(predictor.correct([second, first]), both)  # the latest prompt wins
    again = predictor.correct([first, second, Click(1, 6, 31)])
    assert np.array_equal(again, predictor.correct([second, first, Click(1, 6, 31)]))
    assert np.array_equal(predictor.correct([second]), spleen)


@pytest.mark.parametrize(
    ("told", "prompt"),
    [
        ("x = 40, y = 3 is outside the slice of 40 columns and 50 rows", {"points": [[40, 3]]}),
        ("y = -1 is outside", {"points": [[0, -1]]}),
        ("x = nan", {"points": [[float("nan"), 1]]}),
        ("y = 50 is outside", {"boxes": [[0, 0, 3, 50]]}),
        ("turned round", {"boxes": [[9, 0, 3, 5]]}),
        ("expected one for each point", {"points": [[1, 1], [2, 2]]}),
        ("1 inside the organ", {"points": [[1, 1]], "point_labels": [2]}),
        ("no point and no box", {}),
        ("no organ 'heart'; it knows the numbers 1 to 2: liver, spleen", {"organ": "heart"}),
        ("no organ 0", {"organ": 0}),
        ("no organ 3", {"organ": 3}),
        ("expected (50, 40) of uint8", {"points": [[1, 1]], "before": np.zeros(SIZE)}),
    ],
)
def test_wrong_prompts_are_refused(predictor: OrganPredictor, told: str, prompt: dict):
    predictor.set_image(a_slice())
    given = {"organ": 1, **prompt}
    if len(given.get("points", [])) == 1:
        given = {"point_labels": [1], **given}
    with pytest.raises(InputError) as refused:
        predictor.predict(**given)
    assert told in str(refused.value)


@pytest.mark.parametrize("image", [np.zeros(SIZE, np.uint8), np.zeros((4, *SIZE)), np.zeros(3)])
def test_other_arrays_are_no_slice(predictor: OrganPredictor, image: np.ndarray):
    with pytest.raises(InputError, match="expected"):
        predictor.set_image(image)


def test_a_network_of_neighbours_needs_them():
    model = prompted_model()
    model.input_slices = 3
    predictor = OrganPredictor(model, NAMES, **SIDES)
    with pytest.raises(InputError, match=r"expected \(3, H, W\)"):
        predictor.set_image(a_slice())
    predictor.set_image(a_slice(3, *SIZE))
    assert predictor.labels.shape == SIZE


def test_without_a_slice_there_is_nothing_to_correct(predictor: OrganPredictor):
    predictor.reset_image()
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.correct([])
