"""Segment scans one after the other: one is read and one is written meanwhile."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from common.errors import InputError
from common.full_memory import telling_full_memory
from common.precision import amp_dtype
from common.written import Written
from datasets.neighbours import network_slices
from datasets.registry import DatasetSpec
from datasets.scans.files import ScanFile
from datasets.scans.isolated import IsolatedReader
from evaluation.predict_volume import default_batch_size, predict_volume
from prediction.cases import Case, read_case
from prediction.claims import Claims
from prediction.records import remove_earlier, require_output
from prediction.results import scratch_array, write_case


def segment_all(
    args: argparse.Namespace,
    spec: DatasetSpec,
    model: torch.nn.Module,
    claims: Claims,
    written: Written,
) -> None:
    """Segment the scans that this process gets, until all are settled.

    One scan is segmented while the next is read and the previous one is written. A scan that fails
    does not stop the others, even if it ends the process that reads it.
    """
    # At most three scans are in memory: the one read, the one segmented, the one written.
    with IsolatedReader() as reader, ThreadPoolExecutor(1) as writer:

        def read(scan: ScanFile | None) -> tuple[ScanFile, Future[Case]] | None:
            return None if scan is None else (scan, reader.submit(read_case, spec, scan))

        coming, writing = None, None
        while True:
            if coming is None:
                if writing is not None:
                    writing.result()
                if (coming := read(claims.take(idle=True))) is None:
                    return
            scan, reading = coming
            coming = None if claims.alone else read(claims.take())
            try:
                require_output(written.folder)
                case = _read(reading, spec, scan, written)
                write = segment(args, spec, model, case, claims.progress)
            except Exception as error:  # the other scans still have to be segmented
                claims.progress(1)
                claims.settle(scan.name, _message(error))
                continue
            if writing is not None:
                writing.result()
            writing = writer.submit(_write, write, claims, scan.name, written)
            del reading, case, write  # else they would keep the scan in memory after it is written


def _read(reading: Future[Case], spec: DatasetSpec, scan: ScanFile, written: Written) -> Case:
    """Wait for a scan; if it cannot be read, no result of other settings may stand for it."""
    try:
        return reading.result()
    except Exception:
        remove_earlier(written, scan.name, spec.num_classes)
        raise


def _write(
    write: Callable[..., dict[str, Any]], claims: Claims, name: str, written: Written
) -> None:
    """Write the files of a scan, and settle its claim."""
    try:
        outcome: dict[str, Any] | str = write(key=claims.key, written=written)
    except Exception as error:
        outcome = _message(error)
    claims.settle(name, outcome)


def segment(
    args: argparse.Namespace,
    spec: DatasetSpec,
    model: torch.nn.Module,
    case: Case,
    progress: Callable[[float], object],
) -> Callable[..., dict[str, Any]]:
    """Label the slices of a scan; return a function that writes its files."""
    depth, (height, width) = case.slices.shape[0], case.slices.shape[-2:]
    volumes = None  # (C, D, H, W) float16 probabilities
    if args.probabilities:  # on disk, because a volume for each class may not fit into memory
        volumes = scratch_array(Path(args.output), (args.num_classes + 1, depth, height, width))

    def keep(start: int, part: torch.Tensor) -> None:  # (B, C, H, W)
        volumes[:, start : start + len(part)] = part.transpose(0, 1).half().cpu().numpy()

    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, amp_dtype(device), enabled=args.use_amp)
    batch_size = args.batch_size or default_batch_size(device)
    with telling_full_memory(batch_size, use_amp=args.use_amp), autocast:
        labels = predict_volume(
            model,
            network_slices(case.slices, args.input_slices, case.scan.name),
            input_size=(args.input_size, args.input_size),
            image_size=(args.img_size, args.img_size),
            batch_size=batch_size,
            progress=lambda slices: progress(slices / depth),
            flips=[("rows", "columns").index(name) for name in args.flips],
            on_probabilities=None if volumes is None else keep,
        )
    if args.largest_component:
        keep_largest(labels)
    return partial(write_case, args, spec, case, labels, volumes)


def keep_largest(labels: np.ndarray) -> None:
    """Keep the largest piece of each class in labels (D, H, W), in place.

    Voxels that touch at a corner belong to the same piece.
    """
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            mask = labels[box] == index
            pieces, _ = ndimage.label(mask, np.ones((3, 3, 3)))
            sizes = np.bincount(pieces.ravel())[1:]
            labels[box][mask & (pieces != 1 + sizes.argmax())] = 0


def _message(error: Exception) -> str:
    """Return the message for an error in a scan; a bug is also logged in full."""
    if isinstance(error, InputError):
        return str(error)
    if not isinstance(error, (OSError, MemoryError)):
        logging.error("this is a bug in the program:", exc_info=error)
    return f"{type(error).__name__} {error}"
