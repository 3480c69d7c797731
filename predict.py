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

from common.errors import EXIT_BAD_INPUT, EXIT_KEYBOARD, InputError, exit_on_bad_input, first_few
from common.files import make_folder
from config.flags import predict_parser
from config.settings import dataset_spec, parse_args, prediction_key, recorded_values
from datasets.registry import DatasetSpec
from datasets.scans.files import DICOM, ScanFile, find_scans, of_channel
from distributed.launch import launch, processes_here
from distributed.ranks import Ranks, joined, local_device
from evaluation.cpu_speed import pack_encoder
from evaluation.predict_volume import predict_volume
from evaluation.scan_results import (
    Case,
    finished,
    read_case,
    refuse_foreign,
    remove_earlier,
    scratch_array,
    write_case,
    write_summary,
)
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
    """Check everything that was given, then segment, on every GPU here."""
    args = parse_args(predict_parser(), argv)
    processes = processes_here(args.device, args.processes)
    if processes > 1:
        raise SystemExit(launch(__file__, sys.argv[1:] if argv is None else argv, processes))
    device = local_device(choose_device(args.device))
    with joined(device) as ranks:
        try:
            predict(args, device, ranks)
        except KeyboardInterrupt:
            if ranks.first:
                print("\ninterrupted; run the same command again to go on", file=sys.stderr)
            raise SystemExit(EXIT_KEYBOARD) from None


def predict(args: argparse.Namespace, device: torch.device, ranks: Ranks) -> None:
    """Segment this rank's share of the scans; the first rank writes what sums up all.

    Raises:
        SystemExit: `EXIT_SOME_FAILED`, or `EXIT_BAD_INPUT` where no scan could be segmented.
    """
    seed_everything(args.seed, deterministic=bool(args.deterministic))
    allow_tf32(args.tf32)
    spec = dataset_spec(args)
    scans = find_scans(args.input)
    folder = Path(args.output)
    refuse_folder_of(scans, Path(args.input), folder)
    scans = of_channel(scans, spec.channel if args.channel is None else args.channel)
    key = prediction_key(args)
    # the first rank looks for all: one that came late would see what others have written since
    look = ranks.first and not args.overwrite
    if look:
        refuse_foreign(scans, folder, args.format)
    done = ranks.from_first(finished(scans, folder, key, args.format) if look else {})
    model, _ = build_model(args, device)
    model.eval()
    model.merge()
    if not args.use_amp:
        pack_encoder(model)

    make_folder(folder, flag="--output")
    start_logging(folder / "log.txt" if ranks.first else None)
    logging.info("%d scans, %d of them done before, on %d × %s", len(scans), len(done),
                 ranks.count, device)  # fmt: skip
    if spec.orientation is None and not spec.is_pictures:
        logging.info("the adapter does not say how its scans lay: these are taken as they lie")
    unlike = [scan.path.name for scan in scans if scan.is_picture != spec.is_pictures]
    if unlike:
        kinds = ("pictures", "scans") if spec.is_pictures else ("scans", "pictures")
        logging.warning("the adapter was trained on %s, these are %s: %s", *kinds,
                        first_few(unlike))  # fmt: skip
    own = [scan for scan in scans if scan.name not in done][ranks.rank :: ranks.count]
    with tqdm(
        total=len(own),
        desc="segmenting",
        bar_format="{desc}: {percentage:3.0f}% |{bar}| {n:.1f} of {total} scans, {remaining} left",
        disable=None if ranks.first else True,
    ) as bar:
        outcomes = dict(segment_all(args, spec, model, own, key, progress=bar.update))
    everything = done | {name: one for part in ranks.gather(outcomes) for name, one in part.items()}
    if not ranks.first:
        return
    results = {s.name: everything[s.name] for s in scans if isinstance(everything[s.name], dict)}
    failures = {name: one for name, one in everything.items() if isinstance(one, str)}
    write_summary(
        spec,
        folder,
        results,
        failures,
        key=key,
        settings={"flags": recorded_values(args), "environment": environment()},
    )
    _exit_if_failed(failures, len(scans))


def segment_all(
    args: argparse.Namespace,
    spec: DatasetSpec,
    model: torch.nn.Module,
    scans: Sequence[ScanFile],
    key: dict[str, Any],
    *,
    progress: Callable[[float], object],
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Segment one scan while the next is read and earlier ones are written.

    Yields:
        The name of each scan and its result, or what is wrong with it: one stops no other.
    """
    ahead = iter(scans)

    def read_next() -> Future[Case] | None:
        scan = next(ahead, None)
        return None if scan is None else reader.submit(read_case, spec, scan)

    # three scans are held at most: one that is read, one that is segmented, one that is written
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        coming, writing = read_next(), None
        for scan in scans:
            reading, coming = coming, read_next()
            try:
                remove_earlier(Path(args.output), scan.name)
                write = segment(args, spec, model, reading.result(), progress)
            except Exception as error:  # whatever is wrong with one scan stops no other
                progress(1)
                yield scan.name, _told(error)
                continue
            if writing is not None:
                yield _written(*writing)
            writing = scan.name, writer.submit(write, key=key)
            del reading, write  # they hold the scan, which its writing lets go of
        if writing is not None:
            yield _written(*writing)


def _written(name: str, writing: Future[dict[str, Any]]) -> tuple[str, dict[str, Any] | str]:
    try:
        return name, writing.result()
    except Exception as error:
        return name, _told(error)


def segment(
    args: argparse.Namespace,
    spec: DatasetSpec,
    model: torch.nn.Module,
    case: Case,
    progress: Callable[[float], object],
) -> Callable[..., dict[str, Any]]:
    """Label the slices of a scan; returns what writes its files."""
    depth, (height, width) = case.slices.shape[0], case.slices.shape[-2:]
    likely = None
    if args.probabilities:  # on disk: a volume for every class may not fit into memory
        likely = scratch_array(Path(args.output), (args.num_classes + 1, depth, height, width))

    def keep(start: int, part: torch.Tensor) -> None:  # (B, C, H, W)
        likely[:, start : start + len(part)] = part.transpose(0, 1).half().cpu().numpy()

    device = next(model.parameters()).device
    with torch.autocast(device.type, amp_dtype(device), enabled=args.use_amp):
        labels = predict_volume(
            model,
            case.slices,
            input_size=(args.input_size, args.input_size),
            image_size=(args.img_size, args.img_size),
            batch_size=args.batch_size,
            progress=lambda slices: progress(slices / depth),
            flips=[("rows", "columns").index(name) for name in args.flips],
            on_probabilities=None if likely is None else keep,
        )
    if args.largest_component:
        keep_largest(labels)
    return partial(write_case, args, spec, case, labels, likely)


def keep_largest(labels: np.ndarray) -> None:
    """Leave of every class of (D, H, W) only its largest piece, corners touching; in place."""
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            mask = labels[box] == index
            pieces, _ = ndimage.label(mask, np.ones((3, 3, 3)))
            sizes = np.bincount(pieces.ravel())[1:]
            labels[box][mask & (pieces != 1 + sizes.argmax())] = 0


def refuse_folder_of(scans: Sequence[ScanFile], source: Path, folder: Path) -> None:
    """Raise an `InputError` where results would lie among the scans, or replace them."""
    taken = {scan.path.resolve() if scan.suffix == DICOM else scan.path.resolve().parent
             for scan in scans}  # fmt: skip
    if folder.resolve() in {*taken, source.resolve()}:
        raise InputError(f"--output {folder} is a folder of scans that are read; choose another")


def _exit_if_failed(failures: dict[str, str], total: int) -> None:
    for name, reason in failures.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    if failures:
        rest = "; the others are done" if len(failures) < total else ""
        told = f"{len(failures)} of {total} scans failed: {first_few(sorted(failures))}"
        print(told + rest, file=sys.stderr)
        raise SystemExit(EXIT_SOME_FAILED if rest else EXIT_BAD_INPUT)


def _told(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return f"out of GPU memory ({str(error).splitlines()[0]:.200}); lower --batch_size"
    if not isinstance(error, (OSError, MemoryError)):
        logging.error("a fault of this program:", exc_info=error)
    return f"{type(error).__name__} {error}"


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
