"""The work for one case: its files, roles and outputs, and checks before it is converted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError, first_few, warn
from datasets.names import slice_name
from datasets.registry import DatasetSpec
from datasets.scans.files import read_scan_header
from datasets.scans.geometry import Geometry
from datasets.scans.orientation import orientation_of, reorient, reorient_geometry
from datasets.scans.segmentations import segments_of
from preprocess.labels import read_label_header, refuse_other_names
from preprocess.raw_cases import RawCase
from preprocess.split import TEST, TRAIN

FORMAT = 3  # raise it when the outputs change, so that finished cases are converted again
SLICES, VOLUMES, LISTS, RECORDS = "train_npz", "test_vol_h5", "lists", ".done"


@dataclass(frozen=True)
class Job:
    """One case and everything that its outputs depend on."""

    case: RawCase
    roles: tuple[str, ...]  # TRAIN, TEST or both
    spec: DatasetSpec
    label_values: str  # "raw" or "classes"
    output: Path

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def record_path(self) -> Path:
        return self.output / RECORDS / f"{self.name}.json"

    @property
    def volume_path(self) -> Path:
        return self.output / VOLUMES / f"{self.name}.npy.h5"

    def slice_path(self, name: str) -> Path:
        return self.output / SLICES / f"{name}.npz"

    def slice_names(self, count: int) -> list[str]:
        """Return the names of the training slices; a picture's name has its slice number already.

        Args:
            count: number of slices in the case.
        """
        if self.case.is_slice:
            return [self.name]
        return [slice_name(self.name, index) for index in range(count)]

    def outputs(self, slices: int) -> Iterator[Path]:
        """Yield every file that a case with this number of slices writes, except its record."""
        if TRAIN in self.roles:
            yield from map(self.slice_path, self.slice_names(slices))
        if TEST in self.roles:
            yield self.volume_path

    def key(self) -> dict[str, Any]:
        """Return, as plain JSON, the settings that the outputs of the case depend on."""
        spec = self.spec.to_json()
        if TRAIN not in self.roles:
            spec["size"] = None  # only training slices are resized
        return {
            "format": FORMAT,
            "spec": {k: v for k, v in spec.items() if k not in ("train_cases", "test_cases")},
            "label_values": self.label_values,
            "roles": list(self.roles),
            "channel": self.case.image.channel,
        }


def check_headers(
    jobs: list[Job],
) -> tuple[list[tuple[tuple[int, ...], Geometry | None]], list[str]]:
    """Compare the headers of each image and label; warn of segments that no class is named like.

    Returns:
        Shapes (D, H, W) and geometries of the images, and the problems that were found.
    """
    headers, problems = [], []
    unknown: dict[str, str] = {}  # value and name of a segment -> the first file that has it
    for job in jobs:
        try:
            shape, geometry = read_scan_header(job.case.image)
            label_shape, label_geometry = read_label_header(job.case.label)
            for text in refuse_other_names(job.case.label, job.spec, job.label_values):
                unknown.setdefault(text, job.case.label.path.name)
            voxels = np.broadcast_to(np.uint8(0), label_shape)  # stands for voxels that are unread
            label_on_image_grid(job.case, shape, geometry, voxels, label_geometry)
            headers.append((shape, geometry))
        except InputError as error:
            problems.append(str(error))
    if unknown:
        shown = first_few([f"{text} in {file}" for text, file in unknown.items()])
        warn(f"segments have names that no class has, and count by their values: {shown}")
    return headers, problems


def turned(
    shape: tuple[int, ...], geometry: Geometry | None, orientation: str | None
) -> tuple[tuple[int, ...], Geometry | None]:
    """Return shape (D, H, W) and geometry of the slices of a scan.

    Args:
        geometry: of the scan; None for a picture.
        orientation: of the slices; None: that of the scan.
    """
    if geometry is None or orientation is None:
        return shape, geometry
    voxels = np.broadcast_to(np.uint8(0), shape)
    place = reorient_geometry(geometry, shape, orientation)
    return reorient(voxels, orientation_of(geometry), orientation).shape, place


def label_on_image_grid(
    case: RawCase,
    shape: tuple[int, ...],
    geometry: Geometry | None,
    label: np.ndarray,
    label_geometry: Geometry | None,
) -> np.ndarray:  # (D, H, W) of the image
    """Return the label on the grid of its image.

    A label that covers the same voxels with other axes is turned to the axes of the image. A
    segmentation of 3D Slicer may cover a part of the grid, or more than it: what it does not cover
    is background.

    Args:
        shape: (D, H, W) of the image.
        geometry: of the image; None for a picture.
        label: voxels (D, H, W).
        label_geometry: of the label; None for a picture.

    Raises:
        InputError: the label does not lie on the grid of the image, or has voxels outside of it.
    """
    differences = []
    if geometry and label_geometry:
        differences = geometry.differences(label_geometry)
        label_orientation, orientation = orientation_of(label_geometry), orientation_of(geometry)
        if label_orientation != orientation:
            reoriented = reorient(label, label_orientation, orientation)
            there = reorient_geometry(label_geometry, label.shape, orientation)
            if reoriented.shape == shape and geometry.matches(there):
                return reoriented
        else:
            reoriented, there = label, label_geometry
        if (differences or shape != label.shape) and segments_of(case.label.path) is not None:
            laid = _laid_on_grid(case, shape, geometry, reoriented, there)
            if laid is not None:
                return laid
    if shape != label.shape:
        differences.insert(0, f"shape (D, H, W) {shape} and {label.shape}")
    if differences:
        raise InputError(
            f"{case.image.path} and {case.label.path} differ in {'; '.join(differences)}; export "
            "the label on the image's grid"
        )
    return label


def _laid_on_grid(
    case: RawCase, shape: tuple[int, ...], geometry: Geometry, label: np.ndarray, place: Geometry
) -> np.ndarray | None:  # (D, H, W) of the image
    """Return a label of another extent on the grid of the image; None: its voxels lie elsewhere.

    Voxels are moved by a whole number of voxels, nothing is interpolated.

    Args:
        place: geometry of the label, with the axes of the image.

    Raises:
        InputError: labelled voxels lie outside the image.
    """
    axes, spacing = np.reshape(geometry.direction, (3, 3)), np.array(geometry.spacing)
    shift = axes.T @ np.subtract(place.origin, geometry.origin) / spacing
    first = np.rint(shift)  # the label's first voxel, in voxels of the image (x, y, z)
    origin = np.subtract(place.origin, axes @ (first * spacing))
    if not geometry.matches(Geometry(place.spacing, tuple(origin.tolist()), place.direction)):
        return None
    start = first[::-1].astype(int)
    begin, end = np.maximum(start, 0), np.minimum(start + label.shape, shape)
    if (begin >= end).any():
        return None
    inside = label[tuple(map(slice, begin - start, end - start))]
    outside = np.count_nonzero(label) - np.count_nonzero(inside)
    if outside:
        raise InputError(
            f"{case.label.path} has {outside} labelled voxels outside {case.image.path}; it was "
            "drawn on a larger scan, or does not belong to this one"
        )
    laid = np.zeros(shape, label.dtype)
    laid[tuple(map(slice, begin, end))] = inside
    return laid
