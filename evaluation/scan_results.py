"""Read the scans that `predict.py` segments, and write their labels, pictures and records."""

from __future__ import annotations

import argparse
import csv
import logging
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.errors import cannot_write
from common.files import atomic_path, write_json
from datasets.intensity import to_unit, with_channels
from datasets.registry import DatasetSpec
from datasets.scans.files import ScanFile, read_scan, stamp
from datasets.scans.labels import label_suffix, write_label_tables, write_labels, write_like
from datasets.scans.orientation import orientation_of, reorient, reorient_geometry
from datasets.scans.planes import has_oblong_pixels
from datasets.scans.volumes import Geometry
from evaluation.figures import draw_overlays
from evaluation.overlays import case_panel
from evaluation.records import recorded, write_record
from evaluation.views import save_picture, window_text


@dataclass(frozen=True)
class UnitSlices:
    """A scan with intensities for the network, converted a few slices at a time."""

    array: np.ndarray  # (D, H, W) or (D, 3, H, W), values of the file
    limits: tuple[float, float]  # the values that become 0 and 1
    channels: int
    source: Path  # the file, for messages

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.array.shape

    def __getitem__(self, part: slice) -> np.ndarray:  # (B, H, W) or (B, 3, H, W), [0, 1]
        unit = to_unit(np.ascontiguousarray(self.array[part]), *self.limits)
        return with_channels(unit, self.channels, self.source)


@dataclass(frozen=True)
class Case:
    """A scan in memory."""

    scan: ScanFile
    slices: UnitSlices  # in the orientation of the training data
    geometry: Geometry | None  # geometry of the scan in its file; None: a picture
    place: Geometry | None  # geometry of `slices`
    orientation: tuple[str, str] | None  # letters of the file and of `slices`; None: not turned
    source: list[Any]  # stamp of the file before it was read


def read_case(spec: DatasetSpec, scan: ScanFile) -> Case:
    """Read a scan and turn it to the orientation of the training data.

    Raises:
        InputError: the scan is damaged, or is of another kind than the training data.
    """
    source = stamp(scan.path)
    array, geometry = read_scan(scan)
    letters, place = None, geometry
    if geometry is not None and spec.orientation is not None:
        letters = (orientation_of(geometry), spec.orientation)
        place = reorient_geometry(geometry, array.shape, spec.orientation)
        array = reorient(array, *letters)
    if place is not None and has_oblong_pixels(array.shape, place):
        _, *pixel = place.voxel_spacing
        logging.warning(
            "%s: its slices were taken in another plane than the training slices, so the "
            "network sees pixels of %.3g × %.3g mm; check the result closely",
            scan.name,
            *pixel,
        )
    limits = spec.intensity.limits(array, scan.path)
    slices = UnitSlices(array, limits, spec.channels, scan.path)
    slices[:1]  # refuses a colour picture for a network of grey slices now, not later
    return Case(scan, slices, geometry, place, letters, source)


def write_case(
    args: argparse.Namespace,
    spec: DatasetSpec,
    case: Case,
    labels: np.ndarray,
    probabilities: np.memmap | None,
    *,
    key: dict[str, Any],
) -> dict[str, Any]:
    """Write all files of a case and then its record; return its result.

    Args:
        labels: (D, H, W) classes, in the orientation of `case.slices`.
        probabilities: (classes + 1, D, H, W) probabilities; None: not wanted.
        key: see `config.settings.prediction_key`.
    """
    folder, scan, geometry = Path(args.output), case.scan, case.geometry
    suffix = label_suffix(scan, args.format)
    file = f"{scan.name}{suffix}"
    write_record(folder, None, [], {"case": scan.name, "file": file})
    scan_labels = turned_back(labels, case)
    write_labels(folder / file, np.ascontiguousarray(scan_labels), scan, geometry, spec)
    if probabilities is not None:
        write_probabilities(folder / "probabilities" / scan.name, suffix, case, probabilities, spec)
    panel = case_panel(
        scan.name,
        case.slices,
        None,
        labels,
        spec.class_names,
        geometry=case.place,
        window=window_text(spec.intensity),
    )
    picture = draw_overlays([panel], [""], spec.class_names, kinds=("scan", "prediction"))
    save_picture(picture, folder / "overlays" / f"{scan.name}.png")
    bins = spec.num_classes + 1
    counts = sum(np.bincount(plane.ravel(), minlength=bins) for plane in labels)[1:].tolist()
    ml = None if geometry is None else float(np.prod(geometry.spacing)) / 1000
    result = {
        "case": scan.name,
        "file": file,
        "shape": list(scan_labels.shape),
        "voxels": counts,
        "ml": None if ml is None else [count * ml for count in counts],
    }
    write_record(folder, key, case.source, result)
    return result


def turned_back(array: np.ndarray, case: Case) -> np.ndarray:
    """Turn an array (D, H, W) from the orientation of `case.slices` to that of the scan."""
    if case.orientation is None:
        return array
    of_scan, of_slices = case.orientation
    return reorient(array, of_slices, of_scan)


def scratch_array(folder: Path, shape: tuple[int, ...]) -> np.memmap:  # float16
    """Make an array on disk, in a file without a name that vanishes together with the array.

    Raises:
        InputError: the disk has no room for it.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        try:  # Reserve all of it now: on a full disk, a later write ends the process by a signal.
            os.posix_fallocate(file.fileno(), 0, 2 * math.prod(shape))
        except OSError as error:
            raise cannot_write(folder / "probabilities", error) from None
        return np.memmap(file, np.float16, "r+", shape=shape)


def write_probabilities(
    folder: Path, suffix: str, case: Case, probabilities: np.memmap, spec: DatasetSpec
) -> None:
    """Write the probabilities of each class: for a scan float32 0…1, for a picture grey 0…255.

    Args:
        suffix: of the files.
        probabilities: (classes + 1, D, H, W), in the orientation of `case.slices`.
    """
    values, names = (0, *spec.predicted_values), ("background", *spec.class_names)
    for value, name, volume in zip(values, names, probabilities, strict=True):
        path = folder / f"{value}_{'_'.join(name.split()).replace('/', '_')}{suffix}"
        if case.geometry is None:
            with atomic_path(path) as temporary:
                Image.fromarray((volume[0] * 255).round().astype(np.uint8)).save(temporary)
            continue
        volume = np.ascontiguousarray(turned_back(volume, case), np.float32)
        write_like(path, volume, case.scan, case.geometry)


def write_summary(
    spec: DatasetSpec,
    folder: Path,
    results: dict[str, dict[str, Any]],
    failures: dict[str, str],
    *,
    key: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Write `volumes.csv`, `predictions.json` and the tables of names and colours.

    They also list the cases that earlier runs with the same adapter and flags have segmented.

    Args:
        results: result of each segmented scan, by name.
        failures: message for each scan that failed, by name.
    """
    earlier = {
        name: result for name, (result, _) in recorded(folder, key).items() if name not in failures
    }
    cases = [result for _, result in sorted((earlier | results).items())]
    write_label_tables(folder, spec)
    with (
        atomic_path(folder / "volumes.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["case", "class", "value", "voxels", "ml"])
        for result in cases:
            amounts = result["ml"] or [""] * spec.num_classes
            classes = zip(
                spec.class_names, spec.predicted_values, result["voxels"], amounts, strict=True
            )
            writer.writerows([result["case"], *row] for row in classes)
    content = {
        "cases": cases,
        "failed": failures,
        "spec": spec.to_json(),
        **settings,
    }
    write_json(folder / "predictions.json", content)
    logging.info("%d segmentations in %s", len(results), folder)
