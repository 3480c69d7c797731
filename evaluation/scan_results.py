"""What `predict.py` reads of a scan and leaves of it: labels, picture, volumes, and its record."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.errors import InputError, cannot_write, first_few
from common.files import atomic_path, write_json
from datasets.intensity import to_unit, with_channels
from datasets.registry import DatasetSpec
from datasets.scans.files import ScanFile, read_scan, stamp
from datasets.scans.labels import label_suffix, write_label_tables, write_labels, write_like
from datasets.scans.orientation import orientation_of, turned, turned_geometry
from datasets.scans.volumes import Geometry
from evaluation.figures import draw_overlays, save
from evaluation.overlays import case_panel

RECORDS = ".done"
OBLONG = 2.0  # pixels are about square in the plane that a scan was taken in


def finished(
    scans: Sequence[ScanFile], folder: Path, key: dict[str, Any], wanted: str | None
) -> dict[str, dict[str, Any]]:
    """The recorded results of the scans that are as they were when they were segmented so."""
    found = recorded(folder, key)
    return {
        scan.name: found[scan.name][0]
        for scan in scans
        if scan.name in found
        and found[scan.name][1] == stamp(scan.path)
        and (folder / f"{scan.name}{label_suffix(scan, wanted)}").is_file()
    }


def recorded(folder: Path, key: dict[str, Any]) -> dict[str, tuple[dict[str, Any], list[Any]]]:
    """Results of all cases in a folder that were segmented so, and the stamps of their scans."""
    found = {}
    for path in sorted((folder / RECORDS).glob("*.json")):
        try:
            record = json.loads(path.read_text("utf-8"))
            if record["key"] == key and (folder / record["result"]["file"]).is_file():
                found[record["result"]["case"]] = record["result"], record["source"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not one of ours
    return found


def refuse_foreign(scans: Sequence[ScanFile], folder: Path, wanted: str | None) -> None:
    """Raise an `InputError` over label files in the way that are not of this program."""
    foreign = [
        file
        for scan in scans
        if (folder / (file := f"{scan.name}{label_suffix(scan, wanted)}")).exists()
        and not record_path(folder, scan.name).exists()
    ]
    if foreign:
        raise InputError(
            f"--output {folder} holds {first_few(foreign)}, which predict.py has not written; "
            "choose another folder, or pass --overwrite to replace them"
        )


def remove_earlier(folder: Path, name: str) -> None:
    """Delete what an earlier run left of a case: if it fails now, nothing stale may stay."""
    record = record_path(folder, name)
    try:
        file = Path(json.loads(record.read_text("utf-8"))["result"]["file"]).name
    except (OSError, ValueError, KeyError, TypeError):
        return  # not one of ours
    for left in (
        folder / file,
        folder / "overlays" / f"{name}.png",
        *(folder / "probabilities" / name).glob("*"),
        record,  # last: files without it would be taken for someone else's
    ):
        left.unlink(missing_ok=True)


def record_path(folder: Path, name: str) -> Path:
    return folder / RECORDS / f"{name}.json"


def write_record(
    folder: Path, key: dict[str, Any] | None, source: list[Any], result: dict[str, Any]
) -> None:
    """Write the record of a case; without a key it only says whose the files are."""
    record = {"key": key, "source": source, "result": result}
    write_json(record_path(folder, result["case"]), record)


@dataclass(frozen=True)
class UnitSlices:
    """A scan as the network takes it, made a few slices at a time."""

    array: np.ndarray  # (D, H, W), or (D, 3, H, W); as the file holds it
    limits: tuple[float, float]  # its values that become 0 and 1
    channels: int
    source: Path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __getitem__(self, part: slice) -> np.ndarray:  # (B, H, W) or (B, 3, H, W), [0, 1]
        unit = to_unit(np.ascontiguousarray(self.array[part]), *self.limits)
        return with_channels(unit, self.channels, self.source)


@dataclass(frozen=True)
class Case:
    """A scan that was read."""

    scan: ScanFile
    slices: UnitSlices  # in the orientation of the data that were trained on
    geometry: Geometry | None  # of the scan as it lies in its file; None: a picture
    place: Geometry | None  # of `slices`
    orientation: tuple[str, str] | None  # letters of the scan and of `slices`, if they differ
    source: list[Any]  # its stamp from before it was read


def read_case(spec: DatasetSpec, scan: ScanFile) -> Case:
    """Read a scan and bring it to the orientation of the data that were trained on.

    Raises:
        InputError: it is damaged, or cannot be what the network was trained on.
    """
    source = stamp(scan.path)
    array, geometry = read_scan(scan)
    letters, place = None, geometry
    if geometry is not None and spec.orientation is not None:
        letters = (orientation_of(geometry), spec.orientation)
        place = turned_geometry(geometry, array.shape, spec.orientation)
        array = turned(array, *letters)
    if place is not None:
        _, *pixel = place.voxel_spacing
        if max(pixel) > OBLONG * min(pixel):
            logging.warning(
                "%s: its slices were taken in another plane than those that the network was "
                "trained on, it sees pixels of %.3g × %.3g mm; look closely at the result",
                scan.name,
                *pixel,
            )
    limits = spec.intensity.limits(array, scan.path)
    slices = UnitSlices(array, limits, spec.channels, scan.path)
    slices[:1]  # colour where grey was trained on is refused now
    return Case(scan, slices, geometry, place, letters, source)


def write_case(
    args: argparse.Namespace,
    spec: DatasetSpec,
    case: Case,
    labels: np.ndarray,
    likely: np.memmap | None,
    *,
    key: dict[str, Any],
) -> dict[str, Any]:
    """Write all files of a case and, last, the record that says so; returns its result."""
    folder, scan, geometry = Path(args.output), case.scan, case.geometry
    suffix = label_suffix(scan, args.format)
    file = f"{scan.name}{suffix}"
    write_record(folder, None, [], {"case": scan.name, "file": file})
    own = labels if case.orientation is None else turned(labels, *case.orientation[::-1])
    write_labels(folder / file, np.ascontiguousarray(own), scan, geometry, spec)
    if likely is not None:
        write_probabilities(folder / "probabilities" / scan.name, suffix, case, likely, spec)
    panel = case_panel(
        scan.name,
        case.slices,
        None,
        labels,
        spec.num_classes,
        spacing=case.place.voxel_spacing if case.place else None,
        direction=case.place.direction if case.place else None,
    )
    figure = draw_overlays([panel], [""], spec.class_names, kinds=("scan", "prediction"))
    save(figure, folder / "overlays" / f"{scan.name}.png")
    bins = spec.num_classes + 1
    counts = sum(np.bincount(plane.ravel(), minlength=bins) for plane in labels)[1:].tolist()
    ml = None if geometry is None else float(np.prod(geometry.spacing)) / 1000
    result = {
        "case": scan.name,
        "file": file,
        "shape": list(own.shape),
        "voxels": counts,
        "ml": None if ml is None else [count * ml for count in counts],
    }
    write_record(folder, key, case.source, result)
    return result


def scratch_array(folder: Path, shape: tuple[int, ...]) -> np.memmap:  # float16
    """An array on disk, for what may not fit into memory; its file has no name and goes with it.

    Raises:
        InputError: there is no room for it.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        try:  # all of it now: a disk that is full later would end the process by a signal
            os.posix_fallocate(file.fileno(), 0, 2 * math.prod(shape))
        except OSError as error:
            raise cannot_write(folder / "probabilities", error) from None
        return np.memmap(file, np.float16, "r+", shape=shape)


def write_probabilities(
    folder: Path, suffix: str, case: Case, likely: np.memmap, spec: DatasetSpec
) -> None:
    """Write one float32 volume a class, 0…1, where the scan lies; of a picture grey 0…255."""
    values, names = (0, *spec.predicted_values), ("background", *spec.class_names)
    for value, name, volume in zip(values, names, likely, strict=True):
        path = folder / f"{value}_{'_'.join(name.split()).replace('/', '_')}{suffix}"
        if case.geometry is None:
            with atomic_path(path) as temporary:
                Image.fromarray((volume[0] * 255).round().astype(np.uint8)).save(temporary)
            continue
        if case.orientation is not None:
            volume = turned(volume, *case.orientation[::-1])
        write_like(path, np.ascontiguousarray(volume, np.float32), case.scan, case.geometry)


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

    Cases that were segmented into the folder before, by the same adapter and flags, stay in them.
    """
    before = {n: one for n, (one, _) in recorded(folder, key).items() if n not in failures}
    cases = [one for _, one in sorted((before | results).items())]
    write_label_tables(folder, spec)
    with (
        atomic_path(folder / "volumes.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["case", "class", "value", "voxels", "ml"])
        for result in cases:
            amounts = result["ml"] or [""] * spec.num_classes
            rows = zip(spec.class_names, spec.predicted_values, result["voxels"], amounts,
                       strict=True)  # fmt: skip
            writer.writerows([result["case"], *row] for row in rows)
    content = {"cases": cases, "failed": failures, "spec": spec.to_json(),
               **settings}  # fmt: skip
    write_json(folder / "predictions.json", content)
    logging.info("%d segmentations in %s", len(results), folder)
