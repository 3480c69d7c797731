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

from common.errors import cannot_write
from common.writing import atomic_path, partial_name
from common.written import Written
from datasets.registry import DatasetSpec
from datasets.scans.files import ScanFile
from datasets.scans.labels import label_suffix, write_labels, write_like
from datasets.scans.orientation import reorient
from datasets.scans.unused import path_below
from evaluation.cases import Case
from evaluation.figures import draw_overlays
from evaluation.overlays import case_panel
from evaluation.records import (
    OVERLAYS,
    PROBABILITIES,
    RECORDS,
    earlier_files,
    record_path,
    remove_own,
    require_output,
    write_record,
)
from evaluation.views import save_picture, window_text


def case_files(args: argparse.Namespace, spec: DatasetSpec, scan: ScanFile) -> list[str]:
    """Return the names of all files of a case below the output folder, the label file last."""
    suffix = label_suffix(scan, args.format)
    names = probability_names(spec, suffix) if args.probabilities else []
    return [
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
    require_output(folder)
    if not args.overwrite:
        written.refuse_foreign(names, flag="--output")
    is_new = not record_path(folder, scan.name).exists()
    try:
        _write_files(folder, spec, case, labels, probabilities, names)
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
    counts = sum(np.bincount(plane.ravel(), minlength=bins) for plane in labels)[1:].tolist()
    return {
        "case": case.scan.name,
        "file": file,
        "input": path_below(case.scan.path, source),
        "shape": list(turned_back(labels, case).shape),
        "voxels": counts,
        "ml": None if case.voxel_ml is None else [count * case.voxel_ml for count in counts],
        "cut_by_edge": [value in cut for value in range(1, bins)],
        "warnings": case.warnings,
        "not_used": [
            asdict(replace(one, path=path_below(case.scan.path / one.path, source)))
            for one in case.unused
        ],
    }


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
