"""Conversion of one case: from two raw files to slices, volume and record."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

import h5py
import numpy as np
import torch

from common.errors import InputError, warn
from common.writing import write_bytes
from datasets.digests import slice_digests
from datasets.intensity import to_unit, with_channels
from datasets.resampling import resize_images, resize_labels
from datasets.scans.dicom_tags import MODALITY
from datasets.scans.files import DICOM, ScanFile, read_scan
from datasets.scans.geometry import Geometry
from datasets.scans.orientation import orientation_of, reorient
from datasets.scans.series_header import series_tags
from datasets.scans.voxel_size import distances_are_known
from preprocess.jobs import Job, label_on_image_grid
from preprocess.labels import map_labels, read_label
from preprocess.records import are_current, facts_of_sources, write_record
from preprocess.split import TEST, TRAIN

BLOCK = 1 << 24  # bytes by which a file in memory grows at once


class NoPlaceError(InputError):
    """The output folder cannot be written, so that the other cases would fail too."""


def try_convert(job: Job) -> dict[str, Any] | str | NoPlaceError:
    """Convert a case, and return its result or a sentence that says what is wrong.

    A faulty case therefore does not stop the other cases.
    """
    try:
        return convert_case(job)
    except NoPlaceError as error:
        return error
    except InputError as error:
        return f"{job.name}: {error}"
    except OSError as error:  # a file cannot be read or written
        return f"{job.name}: {type(error).__name__} {error}"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):  # of torch
            raise
        return (
            f"{job.name}: the memory is too small to convert {job.case.image.path}; use fewer "
            "--workers or a smaller --size"
        )


def convert_case(job: Job) -> dict[str, Any]:
    """Write the slices and the volume of a case, then the record that the case is finished."""
    spec, source = job.spec, job.case.image.path
    sources = facts_of_sources(job.case)
    image, values, geometry = _read_case(job)
    if not are_current(sources, job.case):
        raise InputError(
            f"{source} or {job.case.label.path} changed while it was read; run the same command "
            "again when nothing writes there"
        )
    labels = map_labels(values, spec, job.label_values, job.case.label.path)
    low, high = spec.intensity.limits(image, source)
    clipped = clipped_share(image, labels, low, high)
    unit = with_channels(to_unit(image, low, high), spec.channels, source)
    bins = spec.num_classes + 1
    counts = sum(np.bincount(plane.ravel(), minlength=bins) for plane in labels)
    result = {
        "case": job.name,
        "group": job.case.group,
        "roles": list(job.roles),
        "slices": len(unit),
        "shape": list(labels.shape),
        **(asdict(geometry) if geometry else {}),
        "range": [float(image.min()), float(image.max())],
        "modality": _modality(job.case.image),
        "limits": [low, high],
        "clipped": clipped,
        "digests": slice_digests(image),
        "voxels": dict(zip(("background", *spec.class_names), counts.tolist(), strict=True)),
        "largest_label_value": int(values.max()),
        "sources": [
            f"{scan.path.parent.name}/{scan.path.name}" for scan in (job.case.image, job.case.label)
        ],
    }
    try:
        if TRAIN in job.roles:
            write_slices(job, unit, labels)
        if TEST in job.roles:
            write_test_volume(job, unit, labels, geometry)
        write_record(job, sources, result)  # last: it says that the other files are complete
    except InputError as error:
        raise NoPlaceError(str(error)) from None
    return result


def _modality(scan: ScanFile) -> str | None:
    """Return the DICOM modality of a series, e.g. CT; None if it is not known."""
    return series_tags(scan.path).get(MODALITY) if scan.suffix == DICOM else None


def _read_case(job: Job) -> tuple[np.ndarray, np.ndarray, Geometry | None]:
    """Read image and label, both turned to the orientation of the data set.

    Returns:
        Image (D, H, W) or (1, 3, H, W); label values (D, H, W); the geometry of the image before
        it was turned, None for a picture.
    """
    image, geometry = read_scan(job.case.image)
    values, label_geometry = read_label(job.case.label, job.spec.label_threshold)
    shape = (len(image), *image.shape[-2:])
    values = label_on_image_grid(job.case, shape, geometry, values, label_geometry)
    if geometry and job.spec.orientation:
        orientation = orientation_of(geometry)
        image = reorient(image, orientation, job.spec.orientation)
        values = reorient(values, orientation, job.spec.orientation)
    return image, values, geometry


def clipped_share(image: np.ndarray, labels: np.ndarray, low: float, high: float) -> float:
    """Return the share of labelled voxels outside `low`…`high`, which the network cannot see."""
    if image.shape != labels.shape or not labels.any():
        return 0.0
    labelled = image[labels > 0]
    return float(np.count_nonzero((labelled < low) | (labelled > high)) / labelled.size)


def write_slices(job: Job, unit: np.ndarray, labels: np.ndarray) -> None:
    """Write each slice with its label, zoomed if the user asked for it.

    Zoomed images may leave [0, 1] a little. They are not clipped again, as in the published
    224 × 224 training set.
    """
    images, classes = torch.from_numpy(unit), torch.from_numpy(np.ascontiguousarray(labels))
    if job.spec.size is not None:
        side = (job.spec.size, job.spec.size)
        images, classes = resize_images(images, side), resize_labels(classes, side)
    names = job.slice_names(len(unit))
    for name, image, label in zip(names, images.numpy(), classes.numpy(), strict=True):
        content = io.BytesIO()
        np.savez(content, image=image, label=label.astype(np.float32))
        write_bytes(job.slice_path(name), content.getbuffer())


def write_test_volume(
    job: Job, unit: np.ndarray, labels: np.ndarray, geometry: Geometry | None
) -> None:
    """Write image and label of a case, with the geometry of its scan.

    If the array was turned, the attribute `orientation` holds its orientation. If the scan does not
    state the size of its voxels, the attribute `size_is_stated` is False.
    """
    # HDF5 writes into memory, because it cannot close a file on a full disk.
    with h5py.File(
        job.volume_path, "w", driver="core", backing_store=False, block_size=BLOCK
    ) as file:
        file["image"], file["label"] = unit, labels
        if geometry:
            file.attrs.update(asdict(geometry))
            if job.spec.orientation:
                file.attrs["orientation"] = job.spec.orientation
            if not distances_are_known(job.case.image, len(labels), geometry):
                warn(
                    f"{job.case.image.path} does not state the size of its voxels, so test.py "
                    "gives no distances in mm for it"
                )
                file.attrs["size_is_stated"] = False
        file.flush()
        content = file.id.get_file_image()
    write_bytes(job.volume_path, memoryview(content))
