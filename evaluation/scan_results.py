"""Read the scans that `predict.py` segments, and write their labels, pictures and records."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.errors import cannot_write, warn
from common.writing import atomic_path
from datasets.intensity import WINDOW, to_unit, with_channels
from datasets.registry import DatasetSpec
from datasets.scans.dicom_tags import MODALITY
from datasets.scans.files import DICOM, ScanFile, read_scan, stamp, unused_in_series
from datasets.scans.labels import label_suffix, write_labels, write_like
from datasets.scans.orientation import orientation_of, reorient, reorient_geometry
from datasets.scans.planes import is_cut_across
from datasets.scans.series_header import series_tags
from datasets.scans.unused import Unused, path_below
from datasets.scans.volumes import Geometry
from datasets.scans.voxel_size import voxel_size_is_known
from evaluation.figures import draw_overlays
from evaluation.overlays import case_panel
from evaluation.records import write_record
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
    voxel_ml: float | None  # volume of a voxel; None: a picture, or the file states no size
    warnings: list[str]  # why the result may be wrong
    unused: list[Unused]  # files in the folder of a series that are not read


def read_case(spec: DatasetSpec, scan: ScanFile) -> Case:
    """Read a scan, turn it to the orientation of the training data, and warn of what is odd.

    Raises:
        InputError: the scan is damaged, or is of another kind than the training data.
    """
    source = stamp(scan.path)
    array, geometry = read_scan(scan)
    tags = series_tags(scan.path) if scan.suffix == DICOM else {}
    warnings = [*_doubts_of_kind(spec, scan, tags), *spec.intensity.doubts(array, spec.raw_range)]
    voxel_ml = None
    if voxel_size_is_known(scan, len(array), geometry):
        voxel_ml = float(np.prod(geometry.spacing)) / 1000
    elif geometry is not None:
        warnings.append("the file does not state the size of its voxels, so volumes have no ml")
    letters, place = None, geometry
    if geometry is not None and spec.orientation is not None:
        letters = (orientation_of(geometry), spec.orientation)
        place = reorient_geometry(geometry, array.shape, spec.orientation)
        array = reorient(array, *letters)
    if place is not None and is_cut_across(array.shape, place):
        _, *pixel = place.voxel_spacing
        warnings.append(
            "its slices were taken in another plane than the training slices, so the network sees "
            f"pixels of {pixel[0]:.3g} × {pixel[1]:.3g} mm; check the result closely"
        )
    limits = spec.intensity.limits(array, scan.path)
    slices = UnitSlices(array, limits, spec.channels, scan.path)
    slices[:1]  # refuses a colour picture for a network of grey slices now, not later
    for text in warnings:
        warn(f"{scan.name}: {text}")
    unused = unused_in_series(scan) if scan.suffix == DICOM else []
    return Case(scan, slices, geometry, place, letters, source, voxel_ml, warnings, unused)


def _doubts_of_kind(spec: DatasetSpec, scan: ScanFile, tags: Mapping[int, str]) -> list[str]:
    """Say whether a scan is for another kind of network: pictures, or another modality."""
    if scan.is_picture != spec.is_pictures:
        kinds = ("a picture", "scans") if scan.is_picture else ("a scan", "pictures")
        return [f"this is {kinds[0]}, but the adapter was trained on {kinds[1]}"]
    is_ct = spec.intensity.rule == WINDOW and not spec.intensity.sure
    trained, found = spec.modality or ("CT" if is_ct else None), tags.get(MODALITY)
    if trained and found not in (None, "", "OT", trained):
        return [f"its DICOM modality is {found}, but the adapter was trained on {trained}"]
    return []


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
    folder, source = Path(args.output), Path(args.input)
    scan, geometry = case.scan, case.geometry
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
    bins, cut = spec.num_classes + 1, cut_classes(labels)
    counts = sum(np.bincount(plane.ravel(), minlength=bins) for plane in labels)[1:].tolist()
    result = {
        "case": scan.name,
        "file": file,
        "input": path_below(scan.path, source),
        "shape": list(scan_labels.shape),
        "voxels": counts,
        "ml": None if case.voxel_ml is None else [count * case.voxel_ml for count in counts],
        "cut_by_edge": [value in cut for value in range(1, bins)],
        "warnings": case.warnings,
        "not_used": [
            asdict(replace(one, path=path_below(scan.path / one.path, source)))
            for one in case.unused
        ],
    }
    write_record(folder, key, case.source, result)
    return result


def cut_classes(labels: np.ndarray) -> set[int]:
    """Return the classes that touch an edge of labels (D, H, W): they may go on outside the scan.

    A single slice has no first and last slice that could cut an organ.
    """
    axes = range(1 if len(labels) == 1 else 0, 3)
    found = [np.unique(np.take(labels, (0, -1), axis)) for axis in axes]
    return set(np.concatenate(found).tolist())


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
