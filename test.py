"""Test SAMed on volumes: `python test.py --help`."""

from __future__ import annotations

import argparse
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from config import class_names, parse_args, test_parser
from datasets.dataset_synapse import Synapse_dataset
from figures import CasePanel, case_panel, write_pages
from inference import predict_volume
from metrics import score_volume
from report import CaseResult, format_table, write_csv, write_json
from run_log import start_logging
from safe_io import exit_on_bad_input, make_folder
from utils import (
    allow_tf32,
    amp_dtype,
    build_model,
    choose_device,
    environment,
    seed_everything,
)
from volumes import Geometry, write_volume

FINISHERS = min(4, os.cpu_count() or 1)  # volumes that are scored and written at a time


def main(argv: Sequence[str] | None = None) -> None:
    """Check everything that was given, then segment, score and report."""
    args = parse_args(test_parser(), argv)
    device = choose_device(args.device)
    seed_everything(args.seed, deterministic=bool(args.deterministic))
    allow_tf32(args.tf32)

    dataset = Synapse_dataset(
        args.volume_path, args.list_dir, "test_vol", num_classes=args.num_classes
    )
    dataset.check(workers=2)  # volumes are large: few at once
    model, _ = build_model(args, device)
    model.eval()
    model.merge()

    folder = make_folder(args.output_dir, flag="--output_dir")
    start_logging(folder / "log.txt")
    logging.info("%d volumes of %s, on %s", len(dataset), dataset.list_path, device)
    with tqdm(total=dataset.count_slices(), desc="testing", unit="slice", disable=None) as bar:
        finished = list(test_cases(args, model, dataset, folder, progress=bar.update))
    results, panels = [result for result, _ in finished], [panel for _, panel in finished]

    names = class_names(args)
    settings = {"flags": vars(args), "environment": environment()}
    write_csv(folder / "results.csv", results, names)
    write_json(folder / "results.json", results, names, settings)
    pages = write_pages(folder, panels, results, names)
    logging.info("\n%s", format_table(results, names))
    written = ", ".join(["results.csv", "results.json", *(page.name for page in pages)])
    logging.info("written in %s: %s", folder, written)


def test_cases(
    args: argparse.Namespace,
    model: torch.nn.Module,
    dataset: Synapse_dataset,
    folder: Path,
    *,
    progress: Callable[[int], object] | None = None,
) -> Iterator[tuple[CaseResult, CasePanel]]:
    """Segment one volume while the next is read and earlier ones are scored and written.

    At most `FINISHERS` volumes wait, so that memory does not grow with their number.
    """
    dtype = amp_dtype(next(model.parameters()).device) if args.use_amp else None
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(FINISHERS) as finishers:
        waiting: deque[Future[tuple[CaseResult, CasePanel]]] = deque()
        coming = reader.submit(dataset.__getitem__, 0)
        for index in range(len(dataset)):
            sample = coming.result()
            if index + 1 < len(dataset):
                coming = reader.submit(dataset.__getitem__, index + 1)
            prediction = predict_volume(
                model,
                sample["image"],
                input_size=(args.input_size, args.input_size),
                image_size=(args.img_size, args.img_size),
                batch_size=args.batch_size,
                amp_dtype=dtype,
                progress=progress,
            )
            geometry = dataset.geometry(index)
            waiting.append(
                finishers.submit(finish_case, args, sample, prediction, geometry, folder)
            )
            if len(waiting) > FINISHERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def finish_case(
    args: argparse.Namespace,
    sample: dict[str, Any],
    prediction: np.ndarray,
    geometry: dict[str, tuple[float, ...]] | None,
    folder: Path,
) -> tuple[CaseResult, CasePanel]:
    """Score one segmented volume (D, H, W), and write it as NIfTI if asked."""
    case, image, label = sample["case_name"], sample["image"], sample["label"]  # (D, H, W)
    if image.shape[1] != image.shape[2]:
        logging.info("%s: slices of %d×%d are squashed to a square", case, *image.shape[1:])
    if not label.any():
        logging.info("%s: the label has no foreground", case)
    placed = Geometry(**geometry) if geometry else None
    spacing = placed.voxel_spacing if placed else None
    if args.is_savenii:
        if placed is None:
            logging.info("%s: no geometry is stored; its NIfTI get 1 mm voxels", case)
        for suffix, array in (("pred", prediction), ("img", image), ("gt", label)):
            path = folder / "predictions" / f"{case}_{suffix}.nii.gz"
            write_volume(path, array, placed or Geometry.unknown())
    result = CaseResult(case, score_volume(prediction, label, args.num_classes, spacing))
    panel = case_panel(
        *(case, image, label, prediction, args.num_classes),
        spacing=spacing,
        direction=placed.direction if placed else None,
    )
    return result, panel


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
