"""Correction of slices by clicks and boxes, in the style of `SamPredictor`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch

from common.errors import InputError, first_few
from correction.prompts import Box, Click, Prompt, network_prompts, require_inside
from correction.reach import reached
from datasets.neighbours import BETWEEN_NEIGHBOURS
from evaluation.predict_volume import labels_of, network_input, require_finite
from lora import LoRAModel
from lora.prompts import require_knows_prompts, require_takes_prompts
from segment_anything.modeling import OrganPrompts
from segment_anything.modeling.common import resize_bilinear
from segment_anything.modeling.prompt_encoder import TOKENS

# What decides which pixels follow a prompt: `correction.reach`, with any network; or the network,
# which gets the prompts as tokens and has to know them (`--prompt_prob`).
REACH, NETWORK = WAYS = ("reach", "network")
DECODED = 16  # rows that are decoded at once: 9 classes of 512 x 512 take 150 MB
Row = tuple[int, int, list[Prompt]]  # a slice, an organ, and the prompts of this organ there


def merged(before: np.ndarray, found: np.ndarray, organs: Sequence[int]) -> np.ndarray:
    """Take the prompted organs from `found`, and leave all other organs as they were.

    Only pixels that were, or become, one of the prompted organs change. So a click never alters
    another organ elsewhere.

    Args:
        before: labels, uint8, of any shape.
        found: labels that the network found with the prompts, of the same shape.
        organs: classes that the prompts speak of.

    Returns:
        New labels, uint8.
    """
    taken = np.isin(before, organs) | np.isin(found, organs)
    return np.where(taken, found, before)


class OrganPredictor:
    """Embeds a slice once, and then corrects its labels for any number of prompts.

    By default the network is not asked again: `reached` corrects by its logits, whatever it was
    trained with. With `by=NETWORK` it is asked with the prompts, as SAM is.

    Without a prompt the labels are those of `predict_volume`. Call it inside `torch.autocast` to
    compute in bf16.

    Args:
        model: network of `build_model`, in evaluation mode; its updates may be merged.
        class_names: of the classes 1…C.
        input_size: side of the training slices, as `--input_size`.
        img_size: side S of the network's input, as `--img_size`.
        by: `REACH` or `NETWORK`.

    Raises:
        InputError: the network knows no prompts and is to decide, or is one of an ONNX file.
    """

    def __init__(
        self,
        model: LoRAModel,
        class_names: Sequence[str],
        *,
        input_size: int,
        img_size: int,
        by: str = REACH,
    ) -> None:
        require_takes_prompts(model, "correct its labels in another program")
        if by == NETWORK:
            require_knows_prompts(model)
        self.by = by
        self.sam, self.input_slices = model.sam, model.input_slices
        self.class_names = list(class_names)
        self.input_size, self.img_size = input_size, img_size
        self.reset_image()

    def reset_image(self) -> None:
        """Forget the slice."""
        self.embedding: torch.Tensor | None = None  # (1, 256, S/16, S/16)
        self._labels: np.ndarray | None = None
        self._logits: torch.Tensor | None = None  # (1, classes + 1, s, s)

    def set_image(self, image: np.ndarray) -> None:
        """Embed a slice, and label it without prompts.

        Args:
            image: (H, W), or (3, H, W) in colour or with its neighbours (`--input_slices 3`), in
                [0, 1], floating point: a slice of `network_slices(case.slices, …)`.

        Raises:
            InputError: another shape or type, or the network's output is not finite.
        """
        image = np.asarray(image)
        with_neighbours = self.input_slices == BETWEEN_NEIGHBOURS
        right_shape = (
            image.shape[:-2] == (3,) if with_neighbours else image.shape[:-2] in ((), (3,))
        )
        if image.ndim < 2 or not right_shape or not np.issubdtype(image.dtype, np.floating):
            wanted = "(3, H, W)" if with_neighbours else "(H, W) or (3, H, W)"
            raise InputError(
                f"the slice is an array {image.shape} of {image.dtype}, expected {wanted} of "
                "float32 in [0, 1]; pass a slice as `network_slices` returns it"
            )
        self.reset_image()
        slices = torch.as_tensor(image.astype(np.float32)[None], device=self.sam.device)
        embedding = self.embed(slices)
        labels, self._logits = self.decode(embedding, None, image.shape[-2:])
        self.embedding, self._labels = embedding, labels[0]

    @property
    def labels(self) -> np.ndarray:
        """The labels (H, W) of the slice without prompts, uint8: a copy."""
        self._require_image()
        return self._labels.copy()

    def organ_number(self, organ: str | int) -> int:
        """Return the class 1…C of an organ, which is given by its name or as this number.

        Raises:
            InputError: there is no such organ.
        """
        if organ in self.class_names:
            return self.class_names.index(organ) + 1
        if isinstance(organ, (int, np.integer)) and 1 <= organ <= len(self.class_names):
            return int(organ)
        raise InputError(
            f"the network knows no organ {organ!r}; it knows the numbers 1 to "
            f"{len(self.class_names)}: {first_few(self.class_names, 20)}"
        )

    def predict(
        self,
        points: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        boxes: np.ndarray | None = None,
        *,
        organ: str | int,
        before: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Correct one organ of the slice.

        Args:
            points: (N, 2) as (x, y) in pixels of the slice, x from 0 to W - 1.
            point_labels: (N,), 1 inside the organ, 0 outside.
            boxes: (M, 4) as (x0, y0, x1, y1) in pixels of the slice, or one box (4,).
            organ: name or class number.
            before: labels (H, W) to correct; None: those without prompts.

        Returns:
            Labels (H, W) uint8, and the low_res_logits (classes + 1, s, s) that decided, float32:
            with the prompts, or by `REACH` without. s is S/4, or S/2 if the decoder has a third
            upscaling.

        Raises:
            InputError: no prompt, a prompt outside the slice, or no such organ.
        """
        number = self.organ_number(organ)
        places = np.zeros((0, 2)) if points is None else np.asarray(points, float).reshape(-1, 2)
        inside = np.ones(0) if point_labels is None else np.ravel(point_labels)
        corners = np.zeros((0, 4)) if boxes is None else np.asarray(boxes, float).reshape(-1, 4)
        if len(places) != len(inside) or not np.isin(inside, (0, 1)).all():
            raise InputError(
                f"{len(places)} points have the point_labels {inside.tolist()}, expected one for "
                "each point: 1 inside the organ, 0 outside"
            )
        prompts: list[Prompt] = [
            Click(number, x, y, bool(label))
            for (x, y), label in zip(places.tolist(), inside, strict=True)
        ]
        # First, because clicks say what is wrong in a box.
        prompts = [Box(number, *corner) for corner in corners.tolist()] + prompts
        if not prompts:
            raise InputError("there is no point and no box; pass at least one")
        labels = self.correct(prompts, before)
        logits = self._logits
        if self.by == NETWORK:
            on_network = network_prompts([prompts], labels.shape, self.img_size, self.sam.device)
            _, logits = self.decode(self.embedding, on_network, labels.shape)
        return labels, logits[0].float().cpu().numpy()

    def correct(self, prompts: Sequence[Prompt], before: np.ndarray | None = None) -> np.ndarray:
        """Correct several organs of the slice, each by its own prompts.

        A prompt of one organ does not change what the network finds for another, as in training.
        Where two organs claim a pixel, the organ with the later prompt gets it.

        Args:
            prompts: in the order in which the user gave them; may be empty.
            before: labels (H, W) to correct; None: those without prompts.

        Returns:
            Labels (H, W), uint8.
        """
        labels = self._start(before)
        prompts = [replace(one, organ=self.organ_number(one.organ)) for one in prompts]
        require_inside(prompts, labels.shape)
        return self.correct_slices(self.embedding, [prompts], labels[None])[0]

    def correct_slices(
        self, embeddings: torch.Tensor, prompts: Sequence[Sequence[Prompt]], before: np.ndarray
    ) -> np.ndarray:
        """Do the same as `correct` for B slices, with all organs of all slices at once.

        Args:
            embeddings: (B, 256, S/16, S/16), from `embed`.
            prompts: of each slice.
            before: labels (B, H, W), uint8.

        Returns:
            Labels (B, H, W), uint8.
        """
        if self.by == REACH:
            return self._reached(embeddings, prompts, before)
        labels, size = before.copy(), before.shape[1:]
        rows = [
            (index, organ, [one for one in given if one.organ == organ])
            for index, given in enumerate(prompts)
            for organ in _latest_last(given)
        ]
        found: dict[tuple[int, int], np.ndarray] = {}
        for part in _of_equal_tokens(rows):
            places = [index for index, _, _ in part]
            given = [own for _, _, own in part]
            on_network = network_prompts(given, size, self.img_size, self.sam.device)
            several, _ = self.decode(embeddings[places], on_network, size)
            for (index, organ, _), one in zip(part, several, strict=True):
                found[index, organ] = one
        for index, organ, _ in rows:
            labels[index] = merged(labels[index], found[index, organ], [organ])
        return labels

    @torch.inference_mode()
    def _reached(
        self, embeddings: torch.Tensor, prompts: Sequence[Sequence[Prompt]], before: np.ndarray
    ) -> np.ndarray:
        labels, square = before.copy(), (self.img_size, self.img_size)
        for index, given in enumerate(prompts):
            if given:  # one slice after the other: the logits of all classes are large
                logits, _ = self.sam.decode(embeddings[index : index + 1])
                masks = self.sam.postprocess_masks(logits.float(), square, square)
                full = resize_bilinear(masks, before.shape[1:])[0].cpu().numpy()
                labels[index] = reached(before[index], full, given)
        return labels

    def _start(self, before: np.ndarray | None) -> np.ndarray:  # (H, W) uint8
        labels = self.labels
        if before is None:
            return labels
        before = np.asarray(before)
        if before.shape != labels.shape or before.dtype != np.uint8:
            raise InputError(
                f"the labels to correct are {before.shape} of {before.dtype}, expected "
                f"{labels.shape} of uint8; pass the labels of the slice that was set"
            )
        return before

    @torch.inference_mode()
    def embed(self, slices: torch.Tensor) -> torch.Tensor:
        """Embed slices (B, H, W) or (B, 3, H, W), float32 in [0, 1], as (B, 256, S/16, S/16)."""
        sides = [(side, side) for side in (self.input_size, self.img_size)]
        images = network_input(slices, *sides)
        return self.sam.image_encoder(self.sam.preprocess(images))

    @torch.inference_mode()
    def decode(
        self, embeddings: torch.Tensor, prompts: OrganPrompts | None, size: tuple[int, int]
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Label B slices of `size` (rows, columns) from their embeddings.

        Returns:
            Labels (B, *size) uint8, and logits (B, classes + 1, s, s).
        """
        logits, _ = self.sam.decode(embeddings, prompts)
        square = (self.img_size, self.img_size)
        labels, finite = labels_of(self.sam.postprocess_masks(logits.float(), square, square), size)
        require_finite(finite.cpu().numpy())
        return labels.cpu().numpy(), logits

    def _require_image(self) -> None:
        if self.embedding is None:
            raise RuntimeError("no slice is set; call set_image first")


def _latest_last(prompts: Sequence[Prompt]) -> list[int]:
    """Return the organs of prompts in the order of the last prompt of each."""
    return list(dict.fromkeys(prompt.organ for prompt in reversed(prompts)))[::-1]


def _of_equal_tokens(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Cut rows into batches whose prompts get the same padding, which attention sees."""

    def blocks(row: Row) -> int:
        return -(-sum(len(prompt.corners) for prompt in row[2]) // TOKENS)

    for _, equal in groupby(sorted(rows, key=blocks), blocks):
        together = list(equal)
        for start in range(0, len(together), DECODED):
            yield together[start : start + DECODED]
