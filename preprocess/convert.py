"""One case from its two raw files to slices, volume and record."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from datasets.registry import DatasetSpec
from datasets.resampling import resize_images, resize_labels
from safe_io import InputError, atomic_path, first_few
from volumes import read_volume

from .cases import RECORDS, SLICES, TEST, TRAIN, VOLUMES, Job, check_pair


def try_convert(job: Job) -> tuple[int, dict[str, Any] | str]:
    """Number and result of a case, or what is wrong with it: one bad case stops no other."""
    try:
        return job.number, convert_case(job)
    except InputError as error:
        return job.number, f"{job.name}: {error}"
    except (OSError, MemoryError) as error:  # a full disk, a scan too large
        return job.number, f"{job.name}: {type(error).__name__} {error}"


def convert_case(job: Job) -> dict[str, Any]:
    """Write the slices and volume of one case and, last, the record that says so."""
    remove_outputs(job)
    image, geometry = read_volume(job.image_path)  # (D, H, W)
    values, label_geometry = read_volume(job.label_path)  # (D, H, W)
    check_pair(job, image.shape, geometry, values.shape, label_geometry)
    unit = window_image(image, job.spec.window, job.image_path)
    labels = map_labels(values, job.spec, job.label_values, job.label_path)
    if TRAIN in job.roles:
        write_slices(job, unit, labels)
    if TEST in job.roles:
        with atomic_path(job.volume_path) as temporary, h5py.File(temporary, "w") as file:
            file["image"], file["label"] = unit, labels
            file.attrs.update(asdict(geometry))
    bins = job.spec.num_classes + 1
    counts = sum(np.bincount(plane.ravel(), minlength=bins) for plane in labels)
    result = {
        "case": job.name,
        "number": job.number,
        "roles": list(job.roles),
        "slices": len(unit),
        "shape": list(unit.shape),
        **asdict(geometry),
        "voxels": dict(zip(("background", *job.spec.class_names), counts.tolist(), strict=True)),
        "largest_label_value": int(values.max()),
        "sources": [f"{p.parent.name}/{p.name}" for p in (job.image_path, job.label_path)],
    }
    write_json(job.record_path, {"key": job.key(), "result": result})
    return result


def remove_outputs(job: Job) -> None:
    """Remove all that earlier runs left of a case, unfinished files of a killed run included."""
    job.record_path.unlink(missing_ok=True)
    for folder, pattern in (
        (SLICES, f"{job.name}_slice*.npz"),
        (VOLUMES, f"{job.name}.npy.h5"),
        (RECORDS, f"{job.name}.json"),
    ):
        for prefix in ("", ".*.partial."):
            for path in (job.output / folder).glob(prefix + pattern):
                path.unlink(missing_ok=True)


def window_image(
    image: np.ndarray, window: tuple[float, float], path: Path
) -> np.ndarray:  # (D, H, W) HU -> (D, H, W) float32 in [0, 1]
    """Clip to the window and map its ends to 0 and 1.

    Raises:
        InputError: no voxel lies at or below the window, or none above its lower end, as in a
            scan that is not in Hounsfield units (8-bit, scaled to [0, 1], standardised, MR).
    """
    low, high = window
    smallest, largest = float(image.min()), float(image.max())
    if not smallest <= low < largest:
        raise InputError(
            f"{path} holds intensities from {smallest:g} to {largest:g}, which do not look like "
            f"Hounsfield units (expected air near -1000 and values within {low:g}…{high:g}); give "
            "the scan as the scanner wrote it"
        )
    unit = image.astype(np.float32)
    np.clip(unit, low, high, out=unit)
    unit -= low
    unit /= high - low
    return unit


def map_labels(
    values: np.ndarray, spec: DatasetSpec, label_values: str, path: Path
) -> np.ndarray:  # (D, H, W) -> (D, H, W) uint8 of 0…num_classes
    """Map the values of a label file to classes; `values` itself is left alone.

    Raises:
        InputError: values that are not whole numbers in the range of `label_values`.
    """
    largest = spec.num_classes if label_values == "classes" else spec.largest_raw_label
    if values.min() < 0 or values.max() > largest or (values != np.rint(values)).any():
        wrong = [v for v in np.unique(values).tolist() if not (0 <= v <= largest and v == int(v))]
        raise InputError(
            f"{path} holds label values {first_few([f'{v:g}' for v in wrong])}, expected whole "
            f"numbers 0…{largest} for --label_values {label_values} of {spec.name}; correct the "
            "file, or pass the --label_values it has"
        )
    table = np.arange(largest + 1) if label_values == "classes" else np.zeros(largest + 1)
    if label_values == "raw":
        table[list(spec.raw_labels)] = list(spec.raw_labels.values())
    return table.astype(np.uint8)[values.astype(np.uint8)]


def write_slices(job: Job, unit: np.ndarray, labels: np.ndarray) -> None:
    """Write each slice with its label, zoomed if asked; zoomed images may leave [0, 1] a little.

    They are not clipped again, as in the published 224 x 224 training set.
    """
    images, classes = torch.from_numpy(unit), torch.from_numpy(labels)  # (D, H, W) both
    if job.size is not None:
        images = resize_images(images, (job.size, job.size))
        classes = resize_labels(classes, (job.size, job.size))
    for index, (image, label) in enumerate(zip(images.numpy(), classes.numpy(), strict=True)):
        with atomic_path(job.slice_path(index)) as temporary:
            np.savez(temporary, image=image, label=label.astype(np.float32))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
