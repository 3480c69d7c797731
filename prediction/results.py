"""Write the labels, pictures and records of the scans that `predict.py` segments."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.errors import cannot_write, warn
from common.writing import atomic_path, partial_name
from common.written import Written
from datasets.registry import DatasetSpec
from datasets.scans.files import ScanFile
from datasets.scans.labels import label_suffix, write_labels, write_like
from datasets.scans.orientation import reorient
from datasets.scans.text_headers import SEGMENTATION
from datasets.scans.unused import path_below
from evaluation.figures import draw_overlays
from evaluation.overlays import case_panel
from evaluation.viewer_case import count_classes
from evaluation.views import save_picture, window_text
from prediction.cases import Case
from prediction.dicom_seg import dicom_seg_names, write_dicom_seg
from prediction.records import (
    OVERLAYS,
    PROBABILITIES,
    RECORDS,
    earlier_files,
    record_path,
    remove_own,
    require_output,
    view_name,
    write_record,
)
from prediction.viewing import write_view


def case_files(args: argparse.Namespace, spec: DatasetSpec, scan: ScanFile) -> list[str]:
    """Return the names of all files of a case below the output folder, the label file last."""
    suffix = label_suffix(scan, args.format)
    # A segmentation of 3D Slicer holds labels alone.
    of_probabilities = ".nrrd" if suffix == SEGMENTATION else suffix
    names = probability_names(spec, of_probabilities) if args.probabilities else []
    return [
        *dicom_seg_names(args, scan),
        *[f"{PROBABILITIES}/{scan.name}/{name}" for name in names],
        f"{OVERLAYS}/{scan.name}.png",
        f"{scan.name}{suffix}",
    ]


def write_case(
    args: argparse.Namespace,
    spec: DatasetSpec,
    case: Case,
    labels: np.ndarray,
    probabilities: np.memmap | None,
    *,
    key: dict[str, Any],
    written: Written,
) -> dict[str, Any]:
    """Write all files of a case and then its record; return its result.

    Files of an earlier run are replaced or removed. If writing fails, they stay as far as they are
    not replaced yet; of a new case, no file stays.

    Args:
        labels: (D, H, W) classes, in the orientation of `case.slices`.
        probabilities: (classes + 1, D, H, W) probabilities; None: not wanted.
        key: see `config.settings.prediction_key`.
        written: the output folder.

    Raises:
        InputError: no room or no right to write, the folder is gone, or another program has
            written a file of the case meanwhile.
    """
    folder, scan = written.folder, case.scan
    names = case_files(args, spec, scan)
    segmentations = dicom_seg_names(args, scan)
    require_output(folder)
    if not args.overwrite:
        written.refuse_foreign(names, flag="--output")
    is_new = not record_path(folder, scan.name).exists()
    try:
        rest = names[len(segmentations) :]
        _write_files(folder, spec, case, labels, probabilities, rest)
        for name in segmentations:
            voxels = turned_back(labels, case)
            if failed := write_dicom_seg(folder / name, spec, case, voxels, key):
                warn(f"{scan.name}: {failed}")
                case = replace(case, warnings=[*case.warnings, failed])
                names = rest  # one of an earlier run would be another segmentation
        if not args.no_viewer:
            names = [view_name(scan.name), *names]
            write_view(folder / names[0], spec, case, labels)
        earlier = earlier_files(folder, scan.name, spec.num_classes)
        remove_own(written, [name for name in earlier if name not in names])
        result = _result(Path(args.input), spec, case, labels, names[-1])
        write_record(folder, key, case.source, result)
    except Exception:
        if is_new:
            with contextlib.suppress(OSError):  # the first error is the one to report
                remove_own(written, names)
        raise
    return result


def _write_files(
    folder: Path,
    spec: DatasetSpec,
    case: Case,
    labels: np.ndarray,
    probabilities: np.memmap | None,
    names: Sequence[str],
) -> None:
    """Write probabilities, picture and labels of a case under the names of `case_files`."""
    *parts, picture, file = (folder / name for name in names)
    if probabilities is not None:
        write_probabilities(parts, case, probabilities)
    panel = case_panel(
        case.scan.name,
        case.slices,
        None,
        labels,
        spec.class_names,
        geometry=case.place,
        window=window_text(spec.intensity),
    )
    drawn = draw_overlays([panel], [""], spec.class_names, kinds=("scan", "prediction"))
    save_picture(drawn, picture)
    voxels = np.ascontiguousarray(turned_back(labels, case))
    write_labels(file, voxels, case.scan, case.geometry, spec)


def _result(
    source: Path, spec: DatasetSpec, case: Case, labels: np.ndarray, file: str
) -> dict[str, Any]:
    """Return the result of a case, as `predictions.json` lists it."""
    bins, cut = spec.num_classes + 1, cut_classes(labels)
    counts = count_classes(labels)[1:bins]
    means, deviations = intensities(case.slices.array, labels, spec.num_classes)
    return {
        "case": case.scan.name,
        "file": file,
        "input": path_below(case.scan.path, source),
        "shape": list(turned_back(labels, case).shape),
        "voxels": counts,
        "ml": None if case.voxel_ml is None else [count * case.voxel_ml for count in counts],
        "cut_by_edge": [value in cut for value in range(1, bins)],
        "intensity_mean": means,
        "intensity_sd": deviations,
        "warnings": case.warnings,
        "not_used": [
            asdict(replace(one, path=path_below(case.scan.path / one.path, source)))
            for one in case.unused
        ],
    }


def intensities(
    array: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[list[float | None], list[float | None]]:
    """Return mean and standard deviation of a scan's own values in each class, in float64.

    The deviation is that of the voxels themselves (divided by their number), as `numpy.std` and
    PyRadiomics have it.

    Args:
        array: values of the file, in HU for CT: (D, H, W), or (D, 3, H, W) of a colour picture.
        labels: classes (D, H, W).

    Returns:
        Both for the classes 1…num_classes; None for an empty class, and in colour pictures.
    """
    if array.ndim == 4:
        return [None] * num_classes, [None] * num_classes
    counts, sums, squares = np.zeros((3, num_classes + 1))
    bins = len(counts)
    for values, classes in zip(array, labels, strict=True):
        flat = classes.ravel()
        counts += np.bincount(flat, minlength=bins)
        sums += np.bincount(flat, values.ravel().astype(np.float64), bins)
    means = sums / np.maximum(counts, 1)
    for values, classes in zip(array, labels, strict=True):  # from the mean: nothing cancels
        flat = classes.ravel()
        squares += np.bincount(flat, (values.ravel() - means[flat]) ** 2, bins)
    deviations = np.sqrt(squares / np.maximum(counts, 1))
    return tuple(
        [float(value) if count else None for value, count in zip(found, counts, strict=True)][1:]
        for found in (means, deviations)
    )


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
    require_output(folder)
    # Where a file without a name is not possible, it has one for a moment: as unfinished files do.
    name = partial_name(folder / RECORDS / "scratch")
    with tempfile.TemporaryFile(prefix=name.name, dir=name.parent) as file:
        try:  # Reserve all of it now: on a full disk, a later write ends the process by a signal.
            os.posix_fallocate(file.fileno(), 0, 2 * math.prod(shape))
        except OSError as error:
            raise cannot_write(folder / "probabilities", error) from None
        return np.memmap(file, np.float16, "r+", shape=shape)


def probability_names(spec: DatasetSpec, suffix: str) -> list[str]:
    """Return the names of the files of probabilities: value and name of each class."""
    classes = zip((0, *spec.predicted_values), ("background", *spec.class_names), strict=True)
    return [
        f"{value}_{'_'.join(name.split()).replace('/', '_')}{suffix}" for value, name in classes
    ]


def write_probabilities(paths: Sequence[Path], case: Case, probabilities: np.memmap) -> None:
    """Write the probabilities of each class: for a scan float32 0…1, for a picture grey 0…255.

    Args:
        paths: a file for each class.
        probabilities: (classes + 1, D, H, W), in the orientation of `case.slices`.
    """
    for path, volume in zip(paths, probabilities, strict=True):
        if case.geometry is None:
            with atomic_path(path) as temporary:
                Image.fromarray((volume[0] * 255).round().astype(np.uint8)).save(temporary)
            continue
        volume = np.ascontiguousarray(turned_back(volume, case), np.float32)
        write_like(path, volume, case.scan, case.geometry)
