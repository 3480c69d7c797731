"""Test SAMed on volumes: `python test.py --help`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from common.errors import exit_on_bad_input, warn
from common.files import make_folder
from common.full_memory import telling_full_memory
from common.written import Written
from config.flags import test_parser
from config.settings import class_names, dataset_spec, parse_args, recorded_values
from datasets.dataset_synapse import Synapse_dataset
from datasets.neighbours import network_slices, refuse_colour
from datasets.registry import stored_spec
from datasets.scans.errors import require_scan_packages
from datasets.trained_on import TrainedOn, check_test_data
from distributed.launch import launch, processes_here
from distributed.ranks import Ranks, joined, local_device
from distributed.signals import ended_by_signals
from evaluation.cpu_speed import pack_encoder
from evaluation.figures import remove_rows, write_pages
from evaluation.groups import with_groups
from evaluation.held_out import held_out_warning, trained_cases
from evaluation.medpy_check import (
    EXIT_MEDPY_DIFFERS,
    CheckedPair,
    MedpyCheck,
    report_check,
    require_medpy,
)
from evaluation.metrics import ClassScore
from evaluation.page import write_page
from evaluation.predict_volume import default_batch_size, predict_volume
from evaluation.tables import (
    CaseResult,
    WorstSlice,
    format_table,
    nsd_caveat,
    write_csv,
    write_json,
)
from evaluation.test_folder import refuse_foreign, remove_earlier
from evaluation.test_runs import read_json
from evaluation.viewer import PAGE, ViewedCase, write_viewer
from evaluation.volume_results import read_case, score_case, view_part, write_case
from training.model_card import add_test_scores
from utils import (
    allow_tf32,
    amp_dtype,
    build_model,
    choose_device,
    environment,
    seed_everything,
    start_logging,
)

WAITING = 4  # volumes that may wait in memory to be scored and written


def main(argv: Sequence[str] | None = None) -> None:
    """Check the input, then segment, score and report on all GPUs of this machine."""
    args = parse_args(test_parser(), argv)
    if args.check_with_medpy:
        require_medpy()
    if args.is_savenii:
        require_scan_packages()
    processes = processes_here(args.device, args.processes)
    if processes > 1:
        raise SystemExit(launch(__file__, sys.argv[1:] if argv is None else argv, processes))
    device = local_device(choose_device(args.device))
    with telling_full_memory(), joined(device) as ranks:
        test(args, device, ranks)


def test(args: argparse.Namespace, device: torch.device, ranks: Ranks) -> None:
    """Test this rank's share of the volumes; the first rank writes the report.

    Raises:
        SystemExit: `EXIT_MEDPY_DIFFERS` if --check_with_medpy found a difference.
    """
    seed_everything(args.seed, deterministic=bool(args.deterministic))
    allow_tf32(args.tf32)
    dataset = Synapse_dataset(
        args.volume_path, args.list_dir, "test_vol", num_classes=args.num_classes
    )
    written = Written(args.output_dir)
    if ranks.first:
        if not args.overwrite:
            refuse_foreign(written, dataset.sample_list, volumes=bool(args.is_savenii))
        facts = dataset.check(workers=2)  # two at once, because volumes are large
        refuse_colour(facts, args.input_slices)
        trained = TrainedOn.from_json(args.trained_on)
        for text in check_test_data(facts, trained, class_names(args)):
            warn(text)
    model, _ = build_model(args, device)
    model.eval()
    model.merge()
    if not args.use_amp:
        pack_encoder(model)

    folder = make_folder(args.output_dir, flag="--output_dir")
    if ranks.first:
        remove_earlier(written, volumes=bool(args.is_savenii))
    ranks.agree(0)  # No rank writes before the first has looked at what is there.
    start_logging(written.log_file("log.txt") if ranks.first else None)
    logging.info(
        "%d volumes of %s, on %d × %s", len(dataset), dataset.list_path, ranks.count, device
    )
    rank_cases = dataset.subset(range(ranks.rank, len(dataset), ranks.count))
    with written.noting():
        finished, checked = test_with_bars(args, model, rank_cases, folder, ranks)
    gathered = ranks.gather(finished, (CaseResult, ClassScore, WorstSlice))
    by_case = {result.case: result for part in gathered for result in part}
    pairs = [pair for part in ranks.gather(checked, (CheckedPair,)) for pair in part]
    if not ranks.first:
        return
    results = [by_case[case] for case in dataset.sample_list]
    with written.noting():
        report(args, folder, with_groups(results, dataset.data_dir))
    if args.check_with_medpy and not report_check(pairs, class_names(args)):
        raise SystemExit(EXIT_MEDPY_DIFFERS)


def test_with_bars(
    args: argparse.Namespace,
    model: torch.nn.Module,
    dataset: Synapse_dataset,
    folder: Path,
    ranks: Ranks,
) -> tuple[list[CaseResult], list[CheckedPair]]:
    """Test the volumes of this rank with a progress bar, and a second bar for medpy if asked."""
    share = "" if ranks.count == 1 else ", share of one process"
    hidden = None if ranks.first else True  # None: hidden unless the output is a terminal
    with (
        tqdm(
            total=dataset.count_slices(), desc=f"testing{share}", unit="slice", disable=hidden
        ) as slices_bar,
        tqdm(
            total=len(dataset) * args.num_classes,
            desc=f"checking with medpy{share}",
            unit="organ",
            disable=hidden if args.check_with_medpy else True,
        ) as check_bar,
    ):
        check = MedpyCheck(check_bar.update) if args.check_with_medpy else None
        finished = list(
            test_cases(args, model, dataset, folder, progress=slices_bar.update, check=check)
        )
    return finished, check.pairs if check else []


def report(args: argparse.Namespace, folder: Path, results: Sequence[CaseResult]) -> None:
    """Write the pictures, tables and page of all cases."""
    names = class_names(args)
    tested = {"tested": f"{datetime.now():%Y-%m-%d %H:%M}"}
    seen = trained_cases({r.case: r.independent for r in results}, training_cases(args))
    settings = {
        "trained_on_cases": seen,
        "flags": recorded_values(args),
        "environment": tested | environment(),
    }
    pages = write_pages(folder, results, names)
    viewer = write_page_of_volumes(args, folder, results)
    remove_rows(folder)
    write_csv(folder / "results.csv", results, names)
    # This file makes the folder a tested run, so it follows what it names.
    write_json(folder / "results.json", results, names, settings, args.nsd_tolerance)
    write_page(folder / "report.html", [read_json(folder / "results.json")])
    add_test_scores(folder)
    logging.info("\n%s", format_table(results, names))
    for caveat in (
        nsd_caveat(results, args.nsd_tolerance),
        held_out_warning(seen, len(results)),
    ):
        if caveat:
            logging.warning("warning: %s", caveat)
    written = ", ".join(
        ["report.html", "results.csv", "results.json", *(page.name for page in pages)]
    )
    logging.info("written in %s: %s", folder, written)
    for line in viewer:
        logging.info("%s", line)


def write_page_of_volumes(
    args: argparse.Namespace, folder: Path, results: Sequence[CaseResult]
) -> list[str]:
    """Write `viewer.html` if it is wanted; return lines that say so, or why not."""
    if args.no_viewer:
        return []
    cases = [ViewedCase(result.case, view_part(folder, result.case)) for result in results]
    title = f"Segmentation test: {dataset_spec(args).name}"
    return write_viewer(folder / PAGE, cases, class_names(args), title)


def training_cases(args: argparse.Namespace) -> Sequence[str] | None:
    """Return the cases that the adapter was trained on; None if they are unknown.

    The published adapters record none; they were trained on the published cases of Synapse.
    """
    trained = dataset_spec(args)
    tested = stored_spec(args.volume_path)
    if tested is not None and tested.name != trained.name:
        return None  # Other data may use the same names for other cases.
    recorded = getattr(args, "trained_on", None)
    return recorded["cases"] if recorded else trained.train_cases or None


def test_cases(
    args: argparse.Namespace,
    model: torch.nn.Module,
    dataset: Synapse_dataset,
    folder: Path,
    *,
    progress: Callable[[int], object] | None = None,
    check: MedpyCheck | None = None,
) -> Iterator[CaseResult]:
    """Segment each volume while the next one is read and earlier ones are scored and written.

    At most `WAITING` volumes wait in memory, however many there are.

    Args:
        progress: called with the number of slices just segmented.
        check: also scores each volume with medpy.

    Yields:
        The result of each volume, in order.
    """
    if not len(dataset):  # more ranks than volumes
        return
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, amp_dtype(device), enabled=args.use_amp)
    batch_size = args.batch_size or default_batch_size(device)
    spec = dataset_spec(args)
    saved = folder / "predictions" if args.is_savenii else None
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(os.cpu_count()) as finishers:
        waiting: deque[tuple[Future[CaseResult], Future[None]]] = deque()
        coming = reader.submit(read_case, dataset, 0)
        for index in range(len(dataset)):
            case = coming.result()
            if index + 1 < len(dataset):
                coming = reader.submit(read_case, dataset, index + 1)
            with telling_full_memory(batch_size, use_amp=args.use_amp), autocast:
                prediction = predict_volume(
                    model,
                    network_slices(case.image, args.input_slices, case.name),
                    input_size=(args.input_size, args.input_size),
                    image_size=(args.img_size, args.img_size),
                    batch_size=batch_size,
                    progress=progress,
                )
            scoring = finishers.submit(score_case, case, prediction, args, folder, check)
            writing = finishers.submit(write_case, case, prediction, saved, spec)
            waiting.append((scoring, writing))
            while len(waiting) > (WAITING if index + 1 < len(dataset) else 0):
                scoring, writing = waiting.popleft()
                writing.result()
                yield scoring.result()


if __name__ == "__main__":
    with exit_on_bad_input(), ended_by_signals():
        main()
