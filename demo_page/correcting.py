"""Correction of a result by clicks: which ones were made, what they change, how it is shown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from common.errors import InputError
from correction.predictor import OrganPredictor
from correction.prompts import Click, require_inside
from datasets.colours import label_colours
from datasets.neighbours import network_slices
from datasets.registry import DatasetSpec
from evaluation.overlays import shown_slice
from evaluation.viewer_case import count_classes
from evaluation.views import framed, view_of
from prediction.cases import Case
from prediction.results import cut_classes

SHOWN_SIDE = 600  # pixels of the longer side of a picture, at least
MARK = 8  # pixels from the middle of a click's mark to its end
OUTSIDE_THE_PICTURE = "this click is outside the slice; click on the slice itself"


class Correction:
    """The labels of a case and the clicks that corrected them.

    Args:
        labels: (D, H, W) uint8 classes, in the orientation of `case.slices`; they are not changed.
    """

    def __init__(
        self, spec: DatasetSpec, case: Case, labels: np.ndarray, predictor: OrganPredictor
    ) -> None:
        self.spec, self.case, self.predictor = spec, case, predictor
        self.automatic, self.labels = labels, labels.copy()
        self.clicks: list[tuple[int, Click]] = []  # with the slice of each
        self.embedded: int | None = None  # the slice that the predictor holds
        self.view = view_of(case.place)
        self.colours = label_colours(spec.class_names)

    @property
    def depth(self) -> int:
        """The number of slices."""
        return len(self.labels)

    def fullest(self) -> int:
        """Return the slice with most labels."""
        return int(np.count_nonzero(self.automatic, axis=(1, 2)).argmax())

    def click(self, index: int, place: tuple[float, float], organ: int, inside: bool) -> None:
        """Correct a slice by one more click.

        Args:
            place: (x, y) in pixels of `picture(index)`.
            organ: class 1…C.

        Raises:
            InputError: the click is outside the slice.
        """
        x, y = self.pixel_at(index, place)
        made = Click(organ, x, y, inside)
        require_inside([made], self.labels.shape[1:])
        self.clicks.append((index, made))
        try:
            self._correct(index)
        except BaseException:
            self.clicks.pop()
            raise

    def undo(self) -> int | None:
        """Take the last click back; return its slice, or None if there is no click."""
        if not self.clicks:
            return None
        index, _ = self.clicks.pop()
        self._correct(index)
        return index

    def _correct(self, index: int) -> None:
        """Compute the labels of a slice from the automatic ones and all its clicks."""
        clicks = [click for number, click in self.clicks if number == index]
        if not clicks:
            self.labels[index] = self.automatic[index]
            return
        if self.embedded != index:
            self.embedded = None
            slices = network_slices(
                self.case.slices, self.predictor.input_slices, self.case.scan.name
            )
            self.predictor.set_image(slices[index : index + 1][0])
            self.embedded = index
        self.labels[index] = self.predictor.correct(clicks, self.automatic[index])

    def counts(self) -> list[int]:
        """Return the number of voxels of each class 1…C."""
        return count_classes(self.labels)[1 : self.spec.num_classes + 1]

    def cuts(self) -> list[bool]:
        """Return for each class 1…C whether the edge of the scan cuts it, as predict.py tells."""
        cut = cut_classes(self.labels)
        return [value in cut for value in range(1, self.spec.num_classes + 1)]

    def picture(self, index: int) -> Image.Image:
        """Draw a slice with its labels and clicks: + inside, × outside."""
        picture = shown_slice(self.case.slices, self.labels, index, self.colours, self.view)
        shown = self._enlarged(picture)
        draw = ImageDraw.Draw(shown)
        for number, click in self.clicks:
            if number == index:
                self._mark(draw, shown.size, click)
        return shown

    def _enlarged(self, picture: np.ndarray) -> Image.Image:  # (H, W, 3)
        """Return a slice as `framed` does, with pixels that are large enough to be clicked on."""
        times = -(-SHOWN_SIDE // max(picture.shape))
        large = picture.repeat(times, axis=0).repeat(times, axis=1)
        pixel = None if self.view.pixel is None else self.view.pixel / times
        return framed(large, replace(self.view, pixel=pixel))

    def _mark(self, draw: ImageDraw.ImageDraw, size: tuple[int, int], click: Click) -> None:
        place = np.array([click.x, click.y])
        (rows, columns), flips = self.labels.shape[1:], self.view.flips
        if 1 in flips:
            place[0] = columns - 1 - place[0]
        if 0 in flips:
            place[1] = rows - 1 - place[1]
        x, y = (place + 0.5) * size / (columns, rows)
        turned = 0 if click.inside else np.pi / 4
        colour = tuple(self.colours[click.organ].tolist())
        for width, fill in ((5, "black"), (3, "white"), (1, colour)):
            for angle in (turned, turned + np.pi / 2):
                across, down = MARK * np.cos(angle), MARK * np.sin(angle)
                draw.line([x - across, y - down, x + across, y + down], fill, width)

    def pixel_at(self, index: int, place: tuple[float, float]) -> tuple[float, float]:
        """Return the pixel (x, y) of the slice at a place of `picture(index)`.

        Raises:
            InputError: the place is no pair of numbers, or outside the picture.
        """
        known = [type(value) in (int, float) for value in place]
        if not 0 <= index < self.depth or len(known) != 2 or not all(known):
            raise InputError(OUTSIDE_THE_PICTURE)
        rows, columns = self.labels.shape[1:]
        size = self._enlarged(np.zeros((rows, columns, 3), np.uint8)).size
        x, y = np.floor(np.array(place, float) * (columns, rows) / size)
        if not (0 <= x < columns and 0 <= y < rows):
            raise InputError(OUTSIDE_THE_PICTURE)
        if 1 in self.view.flips:
            x = columns - 1 - x
        if 0 in self.view.flips:
            y = rows - 1 - y
        return float(x), float(y)
