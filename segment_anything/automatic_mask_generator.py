"""All masks of an image: a grid of points as prompts, filters, and non-maximum suppression.

The interface is that of SAM. It is good for SAM's own weights, whose decoder was trained with
points. A network that SAMed trained has seen no prompts: see `SamAutomaticMaskGenerator`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from common.errors import InputError, warn

from .modeling import Sam
from .predictor import SamPredictor

MODES = ("binary_mask", "uncompressed_rle")
# A box this near to the edge of a crop, in pixels, belongs to an object that the crop cuts.
NEAR_EDGE = 20
SAM_TOKENS = 4  # the single mask and three alternatives

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels of the image


@dataclass
class Candidates:
    """Masks of one crop that passed the filters; N of them, in pixels of the whole image."""

    masks: torch.Tensor  # (N, H, W) bool
    boxes: torch.Tensor  # (N, 4) x0, y0, x1, y1 of the outermost pixels, int64
    iou: torch.Tensor  # (N,) predicted
    stability: torch.Tensor  # (N,)
    points: torch.Tensor  # (N, 2) x, y
    crops: torch.Tensor  # (N, 4) x0, y0, x1, y1

    def __len__(self) -> int:
        return len(self.masks)

    def take(self, index: torch.Tensor) -> Candidates:
        """Return the candidates at these indices, or where a mask of bools is true."""
        return Candidates(*(value[index] for value in vars(self).values()))

    @staticmethod
    def joined(parts: Sequence[Candidates]) -> Candidates:
        """Return all candidates as one."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return Candidates(*(torch.cat(column) for column in columns))


@dataclass
class SamAutomaticMaskGenerator:
    """Segments everything in an image, with SAM's parameters and their defaults.

    A network with a SAMed adapter was trained without prompts. Its mask c is the region of class c
    wherever the point lies, and its predicted IoU was never trained. So the filters mean nothing
    there, and each class is found again and again; `predict.py` segments classes. Such a network
    still runs here, with a warning.

    Args:
        points_per_side: points along each side of the image; None: those of `point_grids`.
        points_per_batch: points that are decoded at once.
        pred_iou_thresh: least predicted IoU of a mask, 0…1.
        stability_score_thresh: least IoU of the masks at the two thresholds ± the offset.
        stability_score_offset: of the mask threshold, in logits.
        box_nms_thresh: a mask whose box has a larger IoU with that of a better mask is dropped.
        crop_n_layers: layer i segments (2^i)² crops of the image as well; 0: none.
        crop_nms_thresh: the same threshold between crops; smaller crops win.
        crop_overlap_ratio: overlap of crops, as a share of the shorter side, halved by each layer.
        crop_n_points_downscale_factor: layer i has points_per_side / factor^i points.
        point_grids: for each layer, (N, 2) points (x, y) in [0, 1].
        min_mask_region_area: holes and islands of fewer pixels are removed; 0: none.
        output_mode: "binary_mask" or "uncompressed_rle".
    """

    model: Sam
    points_per_side: int | None = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    point_grids: Sequence[np.ndarray] | None = None
    min_mask_region_area: int = 0
    output_mode: str = "binary_mask"

    def __post_init__(self) -> None:
        if (self.points_per_side is None) == (self.point_grids is None):
            raise InputError("pass either points_per_side or point_grids, and the other as None")
        if self.output_mode not in MODES:
            raise InputError(f"output_mode is {self.output_mode!r}, expected {' or '.join(MODES)}")
        if self.point_grids is None:
            self.point_grids = [
                point_grid(max(1, self.points_per_side // self.crop_n_points_downscale_factor**i))
                for i in range(self.crop_n_layers + 1)
            ]
        if len(self.point_grids) <= self.crop_n_layers:
            raise InputError(
                f"point_grids has {len(self.point_grids)} grids for {self.crop_n_layers + 1} layers"
            )
        self.model = getattr(self.model, "sam", self.model)  # inside a LoRA_Sam
        self.predictor = SamPredictor(self.model)
        if self.model.mask_decoder.num_mask_tokens != SAM_TOKENS or self.model.takes_unit_range:
            warn(
                "this network was tuned without prompts: its masks are regions of classes wherever "
                "a point lies, and its predicted IoU was not trained. Automatic masks are meant "
                "for SAM's own weights (keep_mask_heads=True); predict.py segments classes"
            )

    @torch.no_grad()
    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        """Return a record for each mask of an image (H, W, 3) uint8.

        Returns:
            Dicts with `segmentation` ((H, W) bool, or run lengths as COCO counts them), `bbox`
            (x, y, width, height), `area` in pixels, `predicted_iou`, `point_coords` [[x, y]],
            `stability_score` and `crop_box` (x, y, width, height).
        """
        crops = crop_boxes(image.shape[:2], self.crop_n_layers, self.crop_overlap_ratio)
        parts = [self._segment_crop(image, box, layer) for box, layer in crops]
        found = Candidates.joined(parts)
        if len(crops) > 1:
            sizes = (found.crops[:, 2:] - found.crops[:, :2]).prod(dim=1)
            found = found.take(nms(found.boxes, 1 / sizes, self.crop_nms_thresh))
        if self.min_mask_region_area:
            found = self._without_small_regions(found)
        return [self._record(found, index) for index in range(len(found))]

    def _segment_crop(self, image: np.ndarray, box: Box, layer: int) -> Candidates:
        left, top, right, bottom = box
        self.predictor.set_image(np.ascontiguousarray(image[top:bottom, left:right]))
        size = torch.tensor([right - left, bottom - top], device=self.predictor.device)
        points = torch.as_tensor(np.asarray(self.point_grids[layer]), dtype=torch.float32)
        points = points.to(size.device) * size  # (N, 2) in pixels of the crop
        batches = points.split(self.points_per_batch)
        found = Candidates.joined([self._decode(batch, box, image.shape[:2]) for batch in batches])
        self.predictor.reset_image()
        return found.take(nms(found.boxes, found.iou, self.box_nms_thresh))

    def _decode(self, points: torch.Tensor, box: Box, size: tuple[int, int]) -> Candidates:
        """Return the masks of P points (x, y) of a crop that pass the filters."""
        labels = torch.ones(len(points), 1, device=points.device)
        coords = self.predictor.transform.apply_coords(
            points[:, None], self.predictor.original_size
        )
        logits, iou, _ = self.predictor.predict_torch(coords, labels, return_logits=True)
        # Mask 0 is SAM's single mask, which points do not use.
        logits, iou = logits[:, 1:].flatten(0, 1), iou[:, 1:].flatten()
        points = points.repeat_interleave(len(iou) // len(points), dim=0)
        threshold = self.model.mask_threshold
        stability = stability_scores(logits, threshold, self.stability_score_offset)
        kept = stability >= self.stability_score_thresh
        if self.pred_iou_thresh > 0:  # 0 switches the filter off, as in SAM
            kept &= iou > self.pred_iou_thresh
        inside = logits[kept] > threshold  # (N, h, w) in the crop
        left, top, right, bottom = box
        masks = inside.new_zeros(len(inside), *size)
        masks[:, top:bottom, left:right] = inside
        crop = torch.tensor(box, device=masks.device)
        found = Candidates(
            masks=masks,
            boxes=mask_boxes(masks),
            iou=iou[kept],
            stability=stability[kept],
            points=points[kept] + crop[:2],
            crops=crop.expand(len(masks), -1),
        )
        return found.take(masks.flatten(1).any(dim=1) & ~cut_by_crop(found.boxes, box, size))

    def _without_small_regions(self, found: Candidates) -> Candidates:
        """Remove small holes and islands; of masks that became alike, the unchanged ones stay."""
        device, masks, unchanged = found.masks.device, [], []
        for mask in found.masks.cpu().numpy():
            cleaned = remove_small_regions(mask, self.min_mask_region_area)
            masks.append(torch.from_numpy(cleaned))
            unchanged.append(float(np.array_equal(cleaned, mask)))
        if not masks:
            return found
        found.masks = torch.stack(masks).to(device)
        found.boxes = mask_boxes(found.masks)
        threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
        return found.take(nms(found.boxes, torch.tensor(unchanged, device=device), threshold))

    def _record(self, found: Candidates, index: int) -> dict[str, Any]:
        mask = found.masks[index].cpu().numpy()
        x0, y0, x1, y1 = found.boxes[index].tolist()
        left, top, right, bottom = found.crops[index].tolist()
        return {
            "segmentation": mask if self.output_mode == MODES[0] else run_lengths(mask),
            "area": int(mask.sum()),
            # As in SAM: from the first pixel to the last, so one less than their number.
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "predicted_iou": float(found.iou[index]),
            "point_coords": [found.points[index].tolist()],
            "stability_score": float(found.stability[index]),
            "crop_box": [left, top, right - left, bottom - top],
        }


def point_grid(per_side: int) -> np.ndarray:  # (per_side², 2), x and y in (0, 1)
    """Return the centres of per_side × per_side equal cells."""
    centres = (np.arange(per_side) + 0.5) / per_side
    return np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)


def crop_boxes(size: tuple[int, int], layers: int, overlap_ratio: float) -> list[tuple[Box, int]]:
    """Return the whole image and (2^i)² overlapping crops for each layer i, with their layers."""
    height, width = size
    crops = [((0, 0, width, height), 0)]
    for layer in range(1, layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(size) * 2 / count)
        across, down = (
            -(-(overlap * (count - 1) + length) // count) for length in (width, height)
        )  # size of a crop, rounded up
        for column in range(count):
            for row in range(count):
                left, top = column * (across - overlap), row * (down - overlap)
                box = (left, top, min(left + across, width), min(top + down, height))
                crops.append((box, layer))
    return crops


def stability_scores(
    logits: torch.Tensor, threshold: float, offset: float
) -> torch.Tensor:  # (N, H, W) -> (N,)
    """Return the IoU of each mask at the higher and at the lower threshold; 0 for no mask."""
    inner = (logits > threshold + offset).flatten(1).sum(dim=1)
    outer = (logits > threshold - offset).flatten(1).sum(dim=1)
    return inner / outer.clamp(min=1)


def mask_boxes(masks: torch.Tensor) -> torch.Tensor:  # (N, H, W) bool -> (N, 4) int64
    """Return x0, y0, x1, y1 of the outermost pixels of each mask; zeros for an empty mask."""

    def ends(filled: torch.Tensor) -> Iterator[torch.Tensor]:  # (N, L) bool -> two of (N,)
        filled = filled.int()
        yield filled.argmax(dim=1)
        yield (filled.shape[1] - 1 - filled.flip(1).argmax(dim=1)) * filled.amax(dim=1)

    if not masks.numel():
        return masks.new_zeros(len(masks), 4, dtype=torch.long)
    (x0, x1), (y0, y1) = ends(masks.any(dim=1)), ends(masks.any(dim=2))
    return torch.stack([x0, y0, x1, y1], dim=1)


def cut_by_crop(boxes: torch.Tensor, crop: Box, size: tuple[int, int]) -> torch.Tensor:
    """Return which boxes (N, 4) end at an edge of the crop that is no edge of the image."""
    height, width = size
    at_crop = (boxes - boxes.new_tensor(crop)).abs() <= NEAR_EDGE
    at_image = (boxes - boxes.new_tensor([0, 0, width, height])).abs() <= NEAR_EDGE
    return (at_crop & ~at_image).any(dim=1)


def nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the indices of the boxes (N, 4) that no better box overlaps by more than a threshold.

    The best come first; of equal scores, the earlier one.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes.float()
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        sides = torch.minimum(boxes[best, 2:], boxes[order, 2:]) - torch.maximum(
            boxes[best, :2], boxes[order, :2]
        )
        overlap = sides.clamp(min=0).prod(dim=1)
        union = areas[best] + areas[order] - overlap
        order = order[overlap <= threshold * union]
    return torch.stack(kept) if kept else order


def remove_small_regions(mask: np.ndarray, least: int) -> np.ndarray:
    """Fill holes and delete islands of fewer than `least` pixels, but keep the largest island."""
    neighbours = np.ones((3, 3))  # diagonal neighbours count too
    for holes in (True, False):
        regions, count = ndimage.label(mask != holes, neighbours)
        sizes = np.bincount(regions.ravel(), minlength=count + 1)[1:]
        small = sizes < least
        if not small.any():
            continue
        if not holes:
            small[sizes.argmax()] = False
        mask = mask ^ np.concatenate([[False], small])[regions]
    return mask


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """Return the lengths of the runs down the columns, the first of zeros, as COCO does."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}
