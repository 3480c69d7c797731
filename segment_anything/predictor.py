"""Segmentation of an image with prompts, with SAM's interface."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange

from .modeling import Sam
from .utils.transforms import ResizeLongestSide


class SamPredictor:
    """Embeds an image once and then segments it for any number of prompts.

    The image is resized so that its longer side is S. Every mask of the network is returned. With
    SAM's weights, channel 0 is the single mask and channels 1…3 are the alternatives. With a SAMed
    adapter, channel 0 is background and channel c is class c.
    """

    def __init__(self, sam_model: Sam) -> None:
        self.model = sam_model
        self.transform = ResizeLongestSide(sam_model.image_encoder.img_size)
        self.reset_image()

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.model.device

    def reset_image(self) -> None:
        """Forget the image."""
        self.features: torch.Tensor | None = None  # (1, 256, S/16, S/16)
        self.original_size: tuple[int, int] | None = None  # (rows, columns)
        self.input_size: tuple[int, int] | None = None

    @torch.no_grad()
    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        """Embed an image.

        Args:
            image: (H, W, 3) uint8, 0…255; brought to [0, 1] for a network that takes such images.
            image_format: order of the channels, "RGB" or "BGR".
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"expected an (H, W, 3) uint8 image, got {image.shape} {image.dtype}")
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format is {image_format!r}, expected 'RGB' or 'BGR'")
        if image_format == "BGR":
            image = image[..., ::-1]
        resized = self.transform.apply_image(image)
        pixels = rearrange(torch.from_numpy(resized), "h w c -> 1 c h w")
        if self.model.takes_unit_range:
            pixels = pixels / 255
        self.set_torch_image(pixels.to(self.device), image.shape[:2])

    @torch.no_grad()
    def set_torch_image(self, image: torch.Tensor, original_size: tuple[int, int]) -> None:
        """Embed an image (1, 3, H, W) whose longer side is S already, in the network's range."""
        if max(image.shape[-2:]) != self.model.image_encoder.img_size:
            raise ValueError(
                f"the longer side is {max(image.shape[-2:])}, expected "
                f"{self.model.image_encoder.img_size}"
            )
        self.reset_image()
        self.features = self.model.image_encoder(self.model.preprocess(image))
        self.original_size = tuple(original_size)
        self.input_size = tuple(image.shape[-2:])

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the masks for a set of prompts.

        Args:
            point_coords: (N, 2) as (x, y) in pixels of the original image.
            point_labels: (N,), 1 inside, 0 outside.
            box: (4,) as (x0, y0, x1, y1) in pixels of the original image.
            mask_input: (1, s, s) logits of an earlier call, s = S/4 or S/2.
            multimask_output: has no effect; every mask is returned.
            return_logits: return logits instead of booleans.

        Returns:
            Masks (masks, H, W), predicted IoU (masks,) and low_res_logits (masks, s, s).
        """
        self._require_image()

        def to_tensor(array: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(np.asarray(array), dtype=torch.float32, device=self.device)

        coords = labels = boxes = mask = None
        if point_coords is not None:
            if point_labels is None:
                raise ValueError("point_coords need point_labels: 1 inside, 0 outside")
            coords = self.transform.apply_coords(to_tensor(point_coords), self.original_size)[None]
            labels = to_tensor(point_labels)[None]
        if box is not None:
            boxes = self.transform.apply_boxes(to_tensor(box), self.original_size)
        if mask_input is not None:
            mask = to_tensor(mask_input)[None]
        results = self.predict_torch(coords, labels, boxes, mask, multimask_output, return_logits)
        masks, iou, low_res_logits = (result[0].cpu().numpy() for result in results)
        return masks, iou, low_res_logits

    @torch.no_grad()
    def predict_torch(
        self,
        point_coords: torch.Tensor | None,
        point_labels: torch.Tensor | None,
        boxes: torch.Tensor | None = None,
        mask_input: torch.Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Do the same as `predict` for P sets of prompts, in pixels of the resized image.

        Args:
            point_coords, point_labels: (P, N, 2) and (P, N).
            boxes: (P, 4).
            mask_input: (P, 1, s, s).

        Returns:
            Masks (P, masks, H, W), predicted IoU (P, masks), logits (P, masks, s, s).
        """
        del multimask_output
        self._require_image()
        points = None if point_coords is None else (point_coords, point_labels)
        encoder = self.model.prompt_encoder
        sparse, dense = encoder(points=points, boxes=boxes, masks=mask_input)
        low_res_logits, iou = self.model.mask_decoder(
            self.features, encoder.get_dense_pe(), sparse, dense
        )
        masks = self.model.postprocess_masks(low_res_logits, self.input_size, self.original_size)
        return (masks if return_logits else masks > self.model.mask_threshold), iou, low_res_logits

    def get_image_embedding(self) -> torch.Tensor:  # -> (1, 256, S/16, S/16)
        """Return the embedding of the image that was set."""
        self._require_image()
        return self.features

    def _require_image(self) -> None:
        if self.features is None:
            raise RuntimeError("no image is set; call set_image first")
