"""One case from its two raw files to slices, volume and record."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from common.errors import InputError, first_few
from common.files import atomic_path, write_json
from datasets.intensity import to_unit, with_channels
from datasets.registry import DatasetSpec
from datasets.resampling import resize_images, resize_labels
from datasets.scans.files import read_scan
from datasets.scans.orientation import orientation_of, turned

from .cases import TEST, TRAIN, Job, laid_on_image
from .descriptor import distinct, read_label


def try_convert(job: Job) -> tuple[str, dict[str, Any] | str]:
    """Name and result of a case, or what is wrong with it: one bad case stops no other."""
    try:
        return job.name, convert_case(job)
    except InputError as error:
        return job.name, f"{job.name}: {error}"
    except (OSError, MemoryError) as error:  # a full disk, a scan too large
        return job.name, f"{job.name}: {type(error).__name__} {error}"


def convert_case(job: Job) -> dict[str, Any]:
    """Write the slices and volume of one case and, last, the record that says so."""
    for left in job.leftovers():
        left.unlink(missing_ok=True)
    spec, source = job.spec, job.case.image.path
    image, geometry = read_scan(job.case.image)  # (D, H, W), or (1, 3, H, W)
    values, label_geometry = read_label(job.case.label)  # (D, H, W)
    shape = (len(image), *image.shape[-2:])
    values = laid_on_image(job, shape, geometry, values, label_geometry)
    if geometry and spec.orientation:
        before = orientation_of(geometry)
        image, values = (turned(array, before, spec.orientation) for array in (image, values))
    labels = map_labels(values, spec, job.label_values, job.case.label.path)
    low, high = spec.intensity.limits(image, source)
    lost = clipped_share(image, labels, low, high)
    unit = with_channels(to_unit(image, low, high), spec.channels, source)
    if TRAIN in job.roles:
        write_slices(job, unit, labels)
    placed = asdict(geometry) if geometry else {}
    if TEST in job.roles:
        with atomic_path(job.volume_path) as temporary, h5py.File(temporary, "w") as file:
            file["image"], file["label"] = unit, labels
            file.attrs.update(placed)
            if geometry and spec.orientation:
                file.attrs["orientation"] = spec.orientation  # of the array; the rest is the scan's
    bins = spec.num_classes + 1
    counts = sum(np.bincount(plane.ravel(), minlength=bins) for plane in labels)
    result = {
        "case": job.name,
        "group": job.case.group,
        "roles": list(job.roles),
        "slices": len(unit),
        "shape": list(labels.shape),
        **placed,
        "limits": [low, high],
        "clipped": lost,
        "voxels": dict(zip(("background", *spec.class_names), counts.tolist(), strict=True)),
        "largest_label_value": int(values.max()),
        "sources": [
            f"{s.path.parent.name}/{s.path.name}" for s in (job.case.image, job.case.label)
        ],
    }
    write_json(job.record_path, {"key": job.key(), "result": result})
    return result


def clipped_share(image: np.ndarray, labels: np.ndarray, low: float, high: float) -> float:
    """The share of labelled voxels that lie outside the limits: what the network cannot see."""
    if image.shape != labels.shape or not labels.any():
        return 0.0
    inside = image[labels > 0]
    return float(np.count_nonzero((inside < low) | (inside > high)) / inside.size)


def map_labels(
    values: np.ndarray, spec: DatasetSpec, label_values: str, path: Path
) -> np.ndarray:  # (D, H, W) -> (D, H, W) uint8 of 0…num_classes
    """Map the values of a label file to classes; `values` itself is left alone.

    Raises:
        InputError: values that are not whole numbers in the range of `label_values`.
    """
    classes = {index: index for index in range(1, spec.num_classes + 1)}
    if label_values == "raw":
        classes = spec.raw_labels | dict.fromkeys(spec.ignored_labels, 0)
    known = sorted({0, *classes})
    wrong = [f"{v:g}" for v in distinct(values) if v not in known]
    if wrong:
        contiguous = known == list(range(len(known)))
        expected = f"0…{known[-1]}" if contiguous else first_few(known, 20)
        raise InputError(
            f"{path} holds label values {first_few(wrong)}, expected whole numbers {expected} for "
            f"--label_values {label_values} of {spec.name}; correct the file or the data set's "
            "description, or pass the --label_values it has"
        )
    table = np.zeros(known[-1] + 1, dtype=np.uint8)
    table[list(classes)] = list(classes.values())
    return table[values.astype(np.uint16)]


def write_slices(job: Job, unit: np.ndarray, labels: np.ndarray) -> None:
    """Write each slice with its label, zoomed if asked; zoomed images may leave [0, 1] a little.

    They are not clipped again, as in the published 224 x 224 training set.
    """
    images, classes = torch.from_numpy(unit), torch.from_numpy(np.ascontiguousarray(labels))
    if job.spec.size is not None:
        side = (job.spec.size, job.spec.size)
        images, classes = resize_images(images, side), resize_labels(classes, side)
    names = job.slice_names(len(unit))
    for name, image, label in zip(names, images.numpy(), classes.numpy(), strict=True):
        with atomic_path(job.slice_path(name)) as temporary:
            np.savez(temporary, image=image, label=label.astype(np.float32))
