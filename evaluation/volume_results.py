"""Read the volumes that `test.py` scores, and write their results."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from datasets.colours import label_colours
from datasets.dataset_synapse import Synapse_dataset
from datasets.prepared_files import size_is_stated
from datasets.registry import DatasetSpec, spec_from_json
from datasets.scans.geometry import Geometry
from datasets.scans.orientation import orientation_of, reorient, reorient_geometry
from evaluation.figures import ROWS, save_case
from evaluation.medpy_check import MedpyCheck
from evaluation.metrics import compare_volume
from evaluation.overlays import case_panel, shown_slice, worst_slices
from evaluation.tables import CaseResult
from evaluation.viewer_case import Picture, encode_case, write_case_part
from evaluation.viewer_library import find_library
from evaluation.views import save_row, window_text

VOLUMES = ("pred", "img", "gt")  # endings of the names of the NIfTI files of a case


@dataclass(frozen=True)
class Case:
    """One test volume."""

    name: str
    image: np.ndarray  # (D, H, W) float32, about [0, 1]
    label: np.ndarray  # (D, H, W) uint8
    geometry: Geometry | None  # geometry of these arrays; None: unknown
    scan: tuple[Geometry, str] | None  # geometry of the scan, letters of these arrays; None: equal
    size_is_stated: bool = True  # else the spacing is no size in mm


def read_case(dataset: Synapse_dataset, index: int) -> Case:
    """Read one volume and log what is unusual about it."""
    sample, stored, letters = dataset[index], dataset.geometry(index), dataset.orientation(index)
    name, image, label = sample["case_name"], sample["image"], sample["label"]
    if image.shape[1] != image.shape[2]:
        logging.info("%s: slices of %d×%d are squashed to a square", name, *image.shape[1:])
    if not label.any():
        logging.info("%s: the label has no foreground", name)
    scan = Geometry(**stored) if stored else None
    stated = size_is_stated(dataset.paths[index])
    if scan is None or letters is None:
        return Case(name, image, label, geometry=scan, scan=None, size_is_stated=stated)
    before = orientation_of(scan)
    shape = reorient(label, letters, before).shape
    geometry = reorient_geometry(scan, shape, letters)
    return Case(name, image, label, geometry=geometry, scan=(scan, letters), size_is_stated=stated)


def score_case(
    case: Case,
    prediction: np.ndarray,
    args: argparse.Namespace,
    folder: Path,
    check: MedpyCheck | None,
) -> CaseResult:
    """Score a prediction (D, H, W), and write pictures of the slices that are shown."""
    known = case.geometry if case.size_is_stated else None
    spacing = known.voxel_spacing if known else None
    scores, counts = compare_volume(
        prediction, case.label, args.num_classes, spacing, args.nsd_tolerance
    )
    if check is not None:
        check.add_case(case.name, prediction, case.label, scores)
    spec = spec_from_json(args.spec, "--config")
    panel = case_panel(
        case.name,
        case.image,
        case.label,
        prediction,
        spec.class_names,
        geometry=known,
        window=window_text(spec.intensity),
    )
    worst = worst_slices(case.name, case.label, prediction, spec.class_names, known)
    if not getattr(args, "no_viewer", False) and find_library():
        encoded = encode_case(
            case.name,
            Picture(case.image, spec.intensity, limits=None),
            prediction,
            case.label,
            geometry=case.geometry,
            worst=worst,
            voxel_ml=float(np.prod(spacing)) / 1000 if spacing else None,
        )
        write_case_part(view_part(folder, case.name), encoded)
    colours = label_colours(spec.class_names)
    for found in worst:
        pictures = [
            shown_slice(case.image, labels, found.index, colours, panel.view)
            for labels in (None, case.label, prediction)
        ]
        save_row(pictures, panel.view, folder / found.picture)
    result = CaseResult(
        case=case.name,
        scores=scores,
        confusion=counts.tolist(),
        worst=worst,
        slices=len(case.label),
        spacing=spacing,
        sides=panel.view.sides,
    )
    save_case(folder, panel, result)
    return result


def view_part(folder: Path, case: str) -> Path:
    """Return the file of what `viewer.html` shows of a case, until the page is put together."""
    return folder / ROWS / f"{case}.view"


def write_case(
    case: Case, prediction: np.ndarray, folder: Path | None, spec: DatasetSpec | None = None
) -> None:
    """Write prediction, image and label as NIfTI in the geometry of the scan.

    Args:
        folder: to write into; None: write nothing.
        spec: its class names and their colours go into prediction and label, in which the classes
            are 1, 2 …; None: the files have no names.
    """
    if folder is None:
        return
    from datasets.scans.label_names import add_names, named_labels
    from datasets.scans.volumes import write_volume

    if case.geometry is None:
        logging.info("%s: no geometry is stored, so its NIfTI files get voxels of 1 mm", case.name)
    names = named_labels(spec, range(1, spec.num_classes + 1)) if spec else []
    for kind, array in zip(VOLUMES, (prediction, case.image, case.label), strict=True):
        geometry = case.geometry or Geometry.unknown()
        if case.scan is not None:
            geometry, letters = case.scan
            array = np.ascontiguousarray(reorient(array, letters, orientation_of(geometry)))
        if array.ndim == 4:  # (D, 3, H, W): colours are averaged, NIfTI stores one value per voxel
            array = array.mean(axis=1, dtype=np.float32)
        named = names if kind != "img" else []
        write_volume(
            folder / f"{case.name}_{kind}.nii.gz",
            array,
            geometry,
            partial(add_names, labels=named, shape=array.shape) if named else None,
        )
