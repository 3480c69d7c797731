"""Segment scans without labels: `python predict.py --help`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.arguments import share_of
from common.errors import (
    EXIT_BAD_INPUT,
    EXIT_SOME_FAILED,
    exit_code_of,
    exit_on_bad_input,
    first_few,
)
from common.full_memory import telling_full_memory
from common.written import Written
from config.flags import predict_parser
from config.settings import dataset_spec, parse_args, prediction_key, recorded_values
from datasets.neighbours import refuse_pictures
from datasets.registry import DatasetSpec
from datasets.scans.files import ScanFile, search, select_channel, warn_of_unused
from datasets.scans.manifest import is_manifest, listed_scans
from datasets.scans.unused import OTHER_CHANNEL, Unused, path_below
from distributed.launch import launch, processes_here
from distributed.ranks import Ranks, joined, local_device
from distributed.signals import ended_by_signals
from evaluation.cpu_speed import pack_encoder
from evaluation.onnx_network import OnnxNetwork
from prediction.claims import Claims, failures, forget, only_writer_of_summary, states
from prediction.dicom_seg import refuse_dicom_seg
from prediction.folder import look_into_folder, open_folder, refuse_folder_of
from prediction.records import recorded, require_output
from prediction.segmenting import segment_all
from prediction.summary import SUMMARY, volume_table, what_to_open, write_summary
from prediction.viewing import write_page
from utils import (
    allow_tf32,
    build_model,
    choose_device,
    environment,
    seed_everything,
    start_logging,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Check the input, then segment the scans on all GPUs of this machine."""
    args = parse_args(predict_parser(), argv)
    processes = processes_here(args.device, args.processes)
    if processes > 1:
        words = sys.argv[1:] if argv is None else argv
        raise SystemExit(launch(__file__, words, processes, go_on=True))
    device = local_device(choose_device(args.device))
    # On the CPU: ranks only talk at the start, and none may fail because another died.
    with telling_full_memory(), joined(torch.device("cpu")) as ranks:
        try:
            predict(args, device, ranks)
        except KeyboardInterrupt as stop:
            if ranks.first:
                print("\ninterrupted; run the same command again to go on", file=sys.stderr)
            raise SystemExit(exit_code_of(stop)) from None


def predict(
    args: argparse.Namespace,
    device: torch.device,
    ranks: Ranks,
    *,
    model: torch.nn.Module | None = None,
    progress: Callable[[float], object] | None = None,
) -> None:
    """Segment scans until all of the call are done, by whatever process; write the summary.

    Args:
        model: that of `merged_network`; None: one is built after the input was checked.
        progress: called with the number of scans done since the last call, as 0.1; None: a bar.

    Raises:
        SystemExit: `EXIT_SOME_FAILED`, or `EXIT_BAD_INPUT` if no scan could be segmented.
    """
    seed_everything(args.seed, deterministic=bool(args.deterministic))
    allow_tf32(args.tf32)
    spec = dataset_spec(args)
    written = Written(args.output)
    found, unused = choose_scans(args, spec)
    scans = share_of(found, args.part)
    refuse_pictures([scan.name for scan in scans if scan.is_picture], args.input_slices)
    key = prediction_key(args)
    # Only the first rank looks: a late rank would also see files that others have just written.
    done, before = {}, {}
    if ranks.first:
        # First, so that a scan that another process ends during the look differs from it.
        before = states(written.folder, scans, retry=args.retry)
        done = look_into_folder(args, spec, scans, key, written)
    done, before = ranks.from_first([done, before])
    refuse_dicom_seg(args, found)
    model = model or chosen_network(args, device)
    with written.noting():
        start_logging(open_folder(written, first=ranks.first))
        forget(written.folder, done)
        logging.info(
            "%s%d scans, %d of them done before, %d files not used, on %d × %s",
            f"part {args.part} of {len(found)} scans: " if args.part else "",
            len(scans),
            len(done),
            len(unused),
            ranks.count,
            device,
        )
        if spec.orientation is None and not spec.is_pictures:
            logging.info("the adapter stores no orientation, so scans are not turned")
        left = [scan for scan in scans if scan.name not in done]
        with (
            progress_bar(len(left), shown=ranks.first and progress is None) as bar,
            Claims(left, written, key, spec.num_classes, before, progress or bar.update) as claims,
        ):
            segment_all(args, spec, model, claims, written)
        if claims.waited_s > 1:
            logging.info("%.0f s with nothing to do but wait for the others", claims.waited_s)
        if ranks.first:
            outcomes = done | claims.outcomes
            outcomes = {scan.name: outcomes[scan.name] for scan in scans}
            finish(args, spec, outcomes, found, unused, key, written)


def progress_bar(total: int, *, shown: bool) -> tqdm:
    """Return a bar on the terminal that counts scans."""
    return tqdm(
        total=total,
        desc="segmenting",
        bar_format="{desc}: {percentage:3.0f}% |{bar}| {n:.1f} of {total} scans, {remaining} left",
        disable=None if shown else True,
    )


def chosen_network(args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """Return the network of the ONNX file or of the adapter."""
    return OnnxNetwork(args.onnx, device) if args.onnx else merged_network(args, device)


def merged_network(args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """Build the network with its updates merged, in the layout that the device multiplies best."""
    model, _ = build_model(args, device)
    model.eval()
    model.merge()
    if not args.use_amp:
        pack_encoder(model)
    return model


def finish(
    args: argparse.Namespace,
    spec: DatasetSpec,
    outcomes: dict[str, dict[str, Any] | str],
    found: Sequence[ScanFile],
    unused: list[Unused],
    key: dict[str, Any],
    written: Written,
) -> None:
    """Write and print what is known of all cases, also of other calls with the same settings.

    Args:
        outcomes: the result of each scan of this call or, if it failed, a message.
        found: the scans of the input, also of other parts.
    """
    folder = written.folder
    require_output(folder)
    with only_writer_of_summary(folder):  # so the last to write has seen all
        written.read()  # what other processes have written meanwhile
        records = recorded(written, key, spec.num_classes)
        gone = "its files were removed or replaced while predict.py ran; run the same command again"
        own = {name: text for name, text in outcomes.items() if isinstance(text, str)}
        own |= dict.fromkeys(outcomes.keys() - own.keys() - records.keys(), gone)
        results = {name: record.result for name, record in records.items() if name not in own}
        # `done` may add a warning to what is recorded.
        results |= {name: outcome for name, outcome in outcomes.items() if name not in own}
        others = [scan.name for scan in found if scan.name not in own.keys() | results.keys()]
        failed = failures(folder, key, others) | own
        settings = {"flags": recorded_values(args), "environment": environment()}
        if not args.overwrite:
            written.refuse_foreign(SUMMARY, flag="--output")
        unused = unused + _unused_in(results.values())
        write_summary(spec, folder, results, failed, unused, settings=settings)
        page_lines = write_page(args.no_viewer, spec, written, records, failed)
    own_results = [results[name] for name in outcomes if name in results]
    warn_of_unused(_unused_in(own_results), args.input, "predictions.json")
    report(spec, folder, own_results)
    for line in page_lines:
        logging.info("%s", line)
    if missing := [name for name in others if name not in failed]:
        logging.info(
            "%d of %d scans of the input are left to other parts: %s; the last part that ends "
            "writes the tables of all",
            len(missing),
            len(found),
            first_few(missing),
        )
    _exit_if_failed(own, len(outcomes))


def _unused_in(results: Iterable[dict[str, Any]]) -> list[Unused]:
    """Return the files beside the slices of DICOM series that are not read."""
    return [Unused(**one) for result in results for one in result["not_used"]]


def choose_scans(
    args: argparse.Namespace, spec: DatasetSpec
) -> tuple[list[ScanFile], list[Unused]]:
    """Return the scans to segment, and what else is in the input; warn about the latter."""
    source, folder = Path(args.input), Path(args.output)
    channel = spec.channel if args.channel is None else args.channel
    if is_manifest(source):
        scans = listed_scans(source, keep_names=args.keep_names)
        refuse_folder_of(scans, source, folder)
        return [replace(scan, channel=channel) for scan in scans], []
    found, unused = search(source, keep_names=args.keep_names)
    refuse_folder_of(found, source, folder)
    scans = select_channel(found, channel)
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


def _exit_if_failed(failures: dict[str, str], total: int) -> None:
    """Report the scans that failed and exit; do nothing if none failed."""
    for name, reason in failures.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    if failures:
        rest = "; the others are done" if len(failures) < total else ""
        names = first_few(sorted(failures))
        print(f"{len(failures)} of {total} scans failed: {names}{rest}", file=sys.stderr)
        raise SystemExit(EXIT_SOME_FAILED if rest else EXIT_BAD_INPUT)


if __name__ == "__main__":
    with exit_on_bad_input(), ended_by_signals():
        main()
