"""Segment scans without labels: `python predict.py --help`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

from common.errors import EXIT_BAD_INPUT, InputError, exit_code_of, exit_on_bad_input, first_few
from common.full_memory import telling_full_memory
from common.written import Written
from config.flags import predict_parser
from config.settings import dataset_spec, parse_args, prediction_key, recorded_values
from datasets.registry import DatasetSpec
from datasets.scans.files import ScanFile, search, select_channel, warn_of_unused
from datasets.scans.isolated import IsolatedReader
from datasets.scans.unused import OTHER_CHANNEL, Unused, path_below
from distributed.launch import launch, processes_here
from distributed.ranks import Ranks, joined, local_device
from distributed.signals import ended_by_signals
from evaluation.cases import Case, read_case
from evaluation.cpu_speed import pack_encoder
from evaluation.output_folder import look_into_folder, open_folder, refuse_folder_of
from evaluation.predict_volume import default_batch_size, predict_volume
from evaluation.records import recorded, remove_earlier, require_output
from evaluation.scan_results import scratch_array, write_case
from evaluation.scan_summary import SUMMARY, volume_table, what_to_open, write_summary
from utils import (
    allow_tf32,
    amp_dtype,
    build_model,
    choose_device,
    environment,
    seed_everything,
    start_logging,
)

EXIT_SOME_FAILED = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Check the input, then segment the scans on all GPUs of this machine."""
    args = parse_args(predict_parser(), argv)
    processes = processes_here(args.device, args.processes)
    if processes > 1:
        raise SystemExit(launch(__file__, sys.argv[1:] if argv is None else argv, processes))
    device = local_device(choose_device(args.device))
    with telling_full_memory(), joined(device) as ranks:
        try:
            predict(args, device, ranks)
        except KeyboardInterrupt as stop:
            if ranks.first:
                print("\ninterrupted; run the same command again to go on", file=sys.stderr)
            raise SystemExit(exit_code_of(stop)) from None


def predict(args: argparse.Namespace, device: torch.device, ranks: Ranks) -> None:
    """Segment this rank's share of the scans; the first rank writes the summary.

    Raises:
        SystemExit: `EXIT_SOME_FAILED`, or `EXIT_BAD_INPUT` if no scan could be segmented.
    """
    seed_everything(args.seed, deterministic=bool(args.deterministic))
    allow_tf32(args.tf32)
    spec = dataset_spec(args)
    written = Written(args.output)
    scans, unused = choose_scans(args, spec)
    key = prediction_key(args)
    # Only the first rank looks: a late rank would also see files that others have just written.
    done = look_into_folder(args, spec, scans, key, written) if ranks.first else {}
    done = ranks.from_first(done)
    model, _ = build_model(args, device)
    model.eval()
    model.merge()
    if not args.use_amp:
        pack_encoder(model)

    with written.noting():
        start_logging(open_folder(written, first=ranks.first))
        logging.info(
            "%d scans, %d of them done before, %d files not used, on %d × %s",
            len(scans),
            len(done),
            len(unused),
            ranks.count,
            device,
        )
        if spec.orientation is None and not spec.is_pictures:
            logging.info("the adapter stores no orientation, so scans are not turned")
        rank_scans = [scan for scan in scans if scan.name not in done][ranks.rank :: ranks.count]
        with tqdm(
            total=len(rank_scans),
            desc="segmenting",
            bar_format="{desc}: {percentage:3.0f}% |{bar}| {n:.1f} of {total} scans, "
            "{remaining} left",
            disable=None if ranks.first else True,
        ) as bar:
            found = dict(segment_all(args, spec, model, rank_scans, key, written, bar.update))
        outcomes: dict[str, dict[str, Any] | str] = dict(done)  # a result, or why it failed
        for part in ranks.gather(found):
            outcomes |= part
        if ranks.first:
            outcomes = {scan.name: outcomes[scan.name] for scan in scans}
            finish(args, spec, outcomes, unused, key, written)


def finish(
    args: argparse.Namespace,
    spec: DatasetSpec,
    outcomes: dict[str, dict[str, Any] | str],
    unused: list[Unused],
    key: dict[str, Any],
    written: Written,
) -> None:
    """Write and print what is known of all cases, also of earlier runs with the same settings.

    Args:
        outcomes: the result of each scan or, if it failed, a message.
    """
    folder = written.folder
    require_output(folder)
    failures = {name: text for name, text in outcomes.items() if isinstance(text, str)}
    records = recorded(folder, key, spec.num_classes)
    gone = "its files were removed or replaced while predict.py ran; run the same command again"
    failures |= dict.fromkeys(outcomes.keys() - failures.keys() - records.keys(), gone)
    results = {s: outcome for s, outcome in outcomes.items() if s not in failures}
    earlier = {s: record.result for s, record in records.items() if s not in outcomes}
    in_series = [Unused(**one) for result in results.values() for one in result["not_used"]]
    warn_of_unused(in_series, args.input, "predictions.json")
    settings = {"flags": recorded_values(args), "environment": environment()}
    if not args.overwrite:
        written.refuse_foreign(SUMMARY, flag="--output")
    everything = earlier | results
    write_summary(spec, folder, everything, failures, unused + in_series, settings=settings)
    report(spec, folder, [results[name] for name in outcomes if name in results])
    _exit_if_failed(failures, len(outcomes))


def choose_scans(
    args: argparse.Namespace, spec: DatasetSpec
) -> tuple[list[ScanFile], list[Unused]]:
    """Return the scans to segment, and what else is in the input; warn about the latter."""
    source, folder = Path(args.input), Path(args.output)
    found, unused = search(source, keep_names=args.keep_names)
    refuse_folder_of(found, source, folder)
    scans = select_channel(found, spec.channel if args.channel is None else args.channel)
    chosen = {scan.path for scan in scans}
    results = folder.resolve()  # of earlier runs, if they lie in the input
    unused = [one for one in unused if not (source / one.path).resolve().is_relative_to(results)]
    warn_of_unused(unused, source, "predictions.json")  # other channels have a warning already
    unused += [
        Unused(path_below(scan.path, source), OTHER_CHANNEL)
        for scan in found
        if scan.path not in chosen
    ]
    return scans, unused


def report(spec: DatasetSpec, folder: Path, results: Sequence[dict[str, Any]]) -> None:
    """Log the volumes, which cases to be careful with, and which files to open."""
    if not results:
        return
    lines = volume_table(spec, results)
    if doubtful := [result["case"] for result in results if result["warnings"]]:
        lines.append(f"read the warnings in predictions.json on {first_few(doubtful)}")
    lines.append(f"{len(results)} segmentations in {folder}")
    for line in [*lines, *what_to_open(folder, results)]:
        logging.info("%s", line)


def segment_all(
    args: argparse.Namespace,
    spec: DatasetSpec,
    model: torch.nn.Module,
    scans: Sequence[ScanFile],
    key: dict[str, Any],
    written: Written,
    progress: Callable[[float], object],
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Segment each scan while the next one is read and the previous one is written.

    A scan that fails does not stop the others, even if it ends the process that reads it.

    Yields:
        The name of each scan and its result or, if it failed, a message.
    """
    ahead = iter(scans)

    def read_next() -> Future[Case] | None:
        scan = next(ahead, None)
        return None if scan is None else reader.submit(read_case, spec, scan)

    # At most three scans are in memory: the one read, the one segmented, the one written.
    with IsolatedReader() as reader, ThreadPoolExecutor(1) as writer:
        coming, writing = read_next(), None
        for scan in scans:
            reading, coming = coming, read_next()
            try:
                require_output(written.folder)
                case = _read(reading, spec, scan, written)
                write = segment(args, spec, model, case, progress)
            except Exception as error:  # the other scans still have to be segmented
                progress(1)
                yield scan.name, _message(error)
                continue
            if writing is not None:
                yield _written(*writing)
            writing = scan.name, writer.submit(write, key=key, written=written)
            del reading, case, write  # else they would keep the scan in memory after it is written
        if writing is not None:
            yield _written(*writing)


def _read(reading: Future[Case], spec: DatasetSpec, scan: ScanFile, written: Written) -> Case:
    """Wait for a scan; if it cannot be read, no result of other settings may stand for it."""
    try:
        return reading.result()
    except Exception:
        remove_earlier(written, scan.name, spec.num_classes)
        raise


def _written(name: str, writing: Future[dict[str, Any]]) -> tuple[str, dict[str, Any] | str]:
    """Wait until a scan is written; return its name and its result or message."""
    try:
        return name, writing.result()
    except Exception as error:
        return name, _message(error)


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
            case.slices,
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


def _exit_if_failed(failures: dict[str, str], total: int) -> None:
    """Report the scans that failed and exit; do nothing if none failed."""
    for name, reason in failures.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    if failures:
        rest = "; the others are done" if len(failures) < total else ""
        names = first_few(sorted(failures))
        print(f"{len(failures)} of {total} scans failed: {names}{rest}", file=sys.stderr)
        raise SystemExit(EXIT_SOME_FAILED if rest else EXIT_BAD_INPUT)


def _message(error: Exception) -> str:
    """Return the message for an error in a scan; a bug is also logged in full."""
    if isinstance(error, InputError):
        return str(error)
    if not isinstance(error, (OSError, MemoryError)):
        logging.error("this is a bug in the program:", exc_info=error)
    return f"{type(error).__name__} {error}"


if __name__ == "__main__":
    with exit_on_bad_input(), ended_by_signals():
        main()
