"""Automatic masks: each step against a plain computation, and a whole image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_sam

from common.errors import InputError
from segment_anything import Sam, SamAutomaticMaskGenerator, sam_model_registry
from segment_anything.automatic_mask_generator import (
    crop_boxes,
    cut_by_crop,
    mask_boxes,
    nms,
    point_grid,
    remove_small_regions,
    run_lengths,
    stability_scores,
)


class Squares(torch.nn.Module):
    """A decoder that returns the square of a picture in which the prompted point lies."""

    num_mask_tokens = 4

    def __init__(self, picture: np.ndarray, squares: list[tuple[int, int, int, int]]) -> None:
        super().__init__()
        self.side, self.squares = picture.shape[0], squares

    def forward(self, embedding, position, sparse, dense):
        masks, iou = [], []
        for x, y in sparse[:, 0, :2].tolist():
            logits = torch.full((self.side, self.side), -9.0)
            inside = [s for s in self.squares if s[0] <= x < s[2] and s[1] <= y < s[3]]
            for x0, y0, x1, y1 in inside:
                logits[y0:y1, x0:x1] = 9.0
            masks.append(logits)
            iou.append(0.95 if inside else 0.5)
        masks = torch.stack(masks)[:, None].expand(-1, 4, -1, -1)
        # The second alternative is a poor mask, the third is an unstable one.
        scale = torch.tensor([1, 1, 1, 1 / 90])[None, :, None, None]
        return masks * scale, torch.tensor(iou)[:, None] * torch.tensor([1, 1, 0.5, 1])


class Points(torch.nn.Module):
    """A prompt encoder that passes the points on."""

    def get_dense_pe(self):
        return None

    def forward(self, points, boxes, masks):
        coords, labels = points
        assert torch.equal(labels, torch.ones_like(labels))
        return coords, None


def sam_of_squares(squares: list[tuple[int, int, int, int]], side: int = 64) -> Sam:
    """SAM's normalisation around a decoder that knows the answer, in S/4 of 256 px."""
    sam, _ = sam_model_registry["vit_tiny"](image_size=side, num_classes=3)
    sam.mask_decoder = Squares(np.zeros((side, side)), squares)
    sam.prompt_encoder = Points()
    sam.image_encoder.forward = lambda images: images
    return sam.eval()


SQUARES = [(4, 8, 20, 24), (36, 30, 60, 50)]
PICTURE = np.zeros((64, 64, 3), np.uint8)


def test_every_object_is_found_once():
    generator = SamAutomaticMaskGenerator(sam_of_squares(SQUARES), points_per_side=8)
    records = generator.generate(PICTURE)
    assert len(records) == 2
    for record, (x0, y0, x1, y1) in zip(
        sorted(records, key=lambda r: r["bbox"]), SQUARES, strict=True
    ):
        expected = np.zeros((64, 64), bool)
        expected[y0:y1, x0:x1] = True
        assert np.array_equal(record["segmentation"], expected)
        assert record["area"] == expected.sum()
        assert record["bbox"] == [x0, y0, x1 - x0 - 1, y1 - y0 - 1]
        assert record["crop_box"] == [0, 0, 64, 64]
        assert record["predicted_iou"] == pytest.approx(0.95)
        assert record["stability_score"] == 1
        ((x, y),) = record["point_coords"]
        assert x0 <= x < x1 and y0 <= y < y1 and (x % 8, y % 8) == (4, 4)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"pred_iou_thresh": 0.96}, 0),
        ({"stability_score_thresh": 0.0, "box_nms_thresh": 1.0, "points_per_batch": 3}, None),
        ({"points_per_side": None, "point_grids": [np.array([[0.15, 0.2]])]}, 1),
        ({"min_mask_region_area": 300}, 2),
        ({"crop_n_layers": 1}, None),
    ],
)
def test_options(options: dict, count: int | None):
    sam = sam_of_squares(SQUARES)
    records = SamAutomaticMaskGenerator(sam, **{"points_per_side": 8} | options).generate(PICTURE)
    if count is None:
        assert len(records) > 2
    else:
        assert len(records) == count


def test_run_lengths_give_the_mask_back():
    generator = SamAutomaticMaskGenerator(
        sam_of_squares(SQUARES), points_per_side=8, output_mode="uncompressed_rle"
    )
    for record in generator.generate(PICTURE):
        counts = record["segmentation"]["counts"]
        values = np.repeat(np.arange(len(counts)) % 2, counts)
        mask = values.reshape(record["segmentation"]["size"], order="F")
        assert mask.sum() == record["area"]
    assert run_lengths(np.array([[1, 0], [1, 1]], bool)) == {"size": [2, 2], "counts": [0, 2, 1, 1]}
    assert run_lengths(np.zeros((2, 3), bool)) == {"size": [2, 3], "counts": [6]}


def test_nms_against_all_pairs():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 50, (60, 2))
    boxes = np.concatenate([corners, corners + rng.integers(5, 40, (60, 2))], axis=1)
    scores = rng.random(60)
    expected: list[int] = []
    for index in np.argsort(-scores):
        overlaps = []
        for other in expected:
            low = np.maximum(boxes[index, :2], boxes[other, :2])
            high = np.minimum(boxes[index, 2:], boxes[other, 2:])
            shared = np.prod(np.clip(high - low, 0, None))
            areas = [np.prod(boxes[i, 2:] - boxes[i, :2]) for i in (index, other)]
            overlaps.append(shared / (sum(areas) - shared))
        if all(overlap <= 0.4 for overlap in overlaps):
            expected.append(int(index))
    found = nms(torch.tensor(boxes), torch.tensor(scores), 0.4)
    assert found.tolist() == expected and 5 < len(expected) < 60
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.4).tolist() == []


def test_boxes_and_stability():
    logits = torch.full((3, 6, 8), -5.0)
    logits[0, 1:4, 2:7] = 0.5  # above 0, between the two thresholds
    logits[0, 2, 3:5] = 5.0
    logits[1, 5, 7] = 5.0
    assert mask_boxes(logits > 0).tolist() == [[2, 1, 6, 3], [7, 5, 7, 5], [0, 0, 0, 0]]
    assert stability_scores(logits, 0.0, 1.0).tolist() == pytest.approx([2 / 15, 1, 0])


def test_crops_cover_the_image_and_overlap():
    crops = crop_boxes((100, 160), 2, 0.3)
    assert [layer for _, layer in crops] == [0] + [1] * 4 + [2] * 16
    for layer in (1, 2):
        covered = np.zeros((100, 160), int)
        for (x0, y0, x1, y1), of in crops:
            if of == layer:
                covered[y0:y1, x0:x1] += 1
        assert covered.min() == 1 and covered.max() == 4
    boxes = torch.tensor([[5, 5, 30, 25], [30, 30, 59, 49], [0, 0, 50, 49]])
    assert cut_by_crop(boxes, (0, 0, 60, 50), (100, 160)).tolist() == [False, True, True]
    assert not cut_by_crop(boxes, (0, 0, 60, 50), (50, 60)).any()  # the edges of the image


def test_small_regions():
    mask = np.zeros((12, 12), bool)
    mask[1:9, 1:9] = True
    mask[4, 4] = False  # a hole
    mask[11, 11] = True  # an island
    expected = np.zeros((12, 12), bool)
    expected[1:9, 1:9] = True
    assert np.array_equal(remove_small_regions(mask, 4), expected)
    assert np.array_equal(remove_small_regions(mask, 1), mask)
    assert remove_small_regions(mask, 70).sum() == 64  # the largest island stays
    assert point_grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


@pytest.mark.parametrize("tuned", [tiny_sam, tiny_model])
def test_a_tuned_network_runs_with_a_warning(tuned, capsys):
    generator = SamAutomaticMaskGenerator(
        tuned().eval(), points_per_side=2, pred_iou_thresh=-9, stability_score_thresh=0
    )
    assert "tuned without prompts" in capsys.readouterr().err
    records = generator.generate(np.full((48, 64, 3), 90, np.uint8))
    assert all(record["segmentation"].shape == (48, 64) for record in records)


def test_sam_itself_runs_without_a_warning(capsys):
    sam, _ = sam_model_registry["vit_tiny"](image_size=64, num_classes=3)
    SamAutomaticMaskGenerator(sam, points_per_side=2).generate(PICTURE)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"points_per_side": None}, "either points_per_side or point_grids"),
        ({"output_mode": "coco_rle"}, "expected binary_mask or uncompressed_rle"),
        (
            {"points_per_side": None, "point_grids": [point_grid(2)], "crop_n_layers": 1},
            "1 grids for 2 layers",
        ),
    ],
)
def test_wrong_options(options: dict, cause: str):
    with pytest.raises(InputError, match=cause):
        SamAutomaticMaskGenerator(sam_of_squares([]), **options)
