"""Train SAMed: `python train.py --help`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError, exit_on_bad_input
from common.writing import write_json, write_text
from config.data_spec import record_training_data
from config.flags import train_parser
from config.run_folder import (
    find_run,
    fingerprint_data,
    fingerprint_weights,
    make_run_folder,
    only_writer,
    save_config,
)
from config.settings import parse_args
from config.shared_flags import AUTO, SCRATCH
from datasets.dataset_synapse import Synapse_dataset
from distributed.launch import launch, processes_here, was_restarted
from distributed.ranks import Ranks, joined, local_device
from lora import LoRAModel
from trainer import freeze_unreached, trainer_synapse
from training.batches import seen_slices
from training.data_check import Page, count_parameters, describe
from training.memory import choose_at_once, out_of_memory
from training.recording import require_recordable
from training.resuming import (
    at_once_before,
    earlier_starts,
    has_state,
    set_aside,
    unlike_before,
)
from training.validation import hold_out
from utils import (
    allow_tf32,
    build_model,
    choose_device,
    environment,
    seed_everything,
    start_logging,
)

# The key under which torchrun's store keeps the run folder for ranks that are started again.
RUN = "run"
# File in the run folder: the environments of all starts of the run.
STARTS = "environment.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Check the flags, then train on as many GPUs of the recipe as this machine has."""
    args = parse_args(train_parser(), argv)
    processes = processes_here(args.device, args.processes, args.n_gpu)
    device = choose_device(args.device)
    require_recordable(args, device, processes)
    if processes > 1 and not args.check:
        raise SystemExit(launch(__file__, sys.argv[1:] if argv is None else argv, processes))
    device = local_device(device)
    try:
        with joined(device) as ranks:
            train(args, device, ranks)
    except (RuntimeError, MemoryError, OSError) as error:
        told = out_of_memory(error, args, device)
        if told is None:
            raise
        raise InputError(told) from None


def train(args: argparse.Namespace, device: torch.device, ranks: Ranks) -> None:
    """Train one run, or the rest of it, as one of its ranks."""
    seed_everything(args.seed, deterministic=bool(args.deterministic), compiles=args.compile)
    allow_tf32(args.tf32)
    choose_resume(args, ranks)
    dataset = Synapse_dataset(args.root_path, args.list_dir, "train", num_classes=args.num_classes)
    dataset = seen_slices(dataset, args)
    left, held_out = dataset, {}
    if args.val_every:  # Refuse a wrong number of cases now.
        left, held_out = hold_out(dataset, args.val_cases, args.seed)
    facts = dataset.check() if ranks.first else []
    model, low_res = build_model(args, device, move_heads=True)
    freeze_unreached(model, args.prompt_prob)
    folder, starts, start, goes_on, page = None, [], {}, False, None
    if ranks.first:
        record_training_data(args, facts, left)
        cases = {case: part.sample_list for case, part in held_out.items()}
        args.data = fingerprint_data(facts, left.sample_list, cases)
        args.weights = fingerprint_weights(model.sam.base_fingerprint, args.lora_ckpt)
        folder = find_run(args) if args.resume else None
        goes_on = folder is not None and not args.restart and has_state(folder)
        starts = earlier_starts(folder / STARTS) if goes_on else []
        start = environment(device) | processors(ranks)
    before = ranks.from_first(at_once_before(starts, start))
    processes = ranks.count
    if args.check:  # It is one process, except under torchrun.
        processes = max(processes, processes_here(args.device, args.processes, args.n_gpu))
    memory = choose_at_once(args, model, ranks, processes=processes, before=before)
    if ranks.first:
        if not goes_on:
            page = describe(args, facts, model, processes, memory)
        if args.check:
            print(page)
        elif folder is None:
            folder = make_run_folder(args)
    folder = ranks.from_first(folder)
    if folder is None:  # --check
        return

    ranks.remember(RUN, str(folder))
    with only_writer(folder, ranks.first):
        kept = set_aside(folder) if args.restart and ranks.first else None
        start_logging(folder / "log.txt" if ranks.first else None)
        if ranks.first:
            if kept:
                logging.info("begun anew; what %s held is kept in %s", folder, kept)
            write_facts(args, folder, page, start | {"at_once": args.at_once})
            log_warnings(args, page, model)
            log_model(args, folder, model, resumed=page is None)
        multimask_output = args.num_classes > 1
        trainer_synapse(
            args, model, folder, multimask_output, low_res, dataset=dataset, ranks=ranks
        )
        logging.info("test it: python test.py --config %s --volume_path …", folder)


def processors(ranks: Ranks) -> dict[str, int]:
    """Return which processors add numbers in their order, and so round them in their way."""
    return {"processes": ranks.count, "threads": torch.get_num_threads()}


def choose_resume(args: argparse.Namespace, ranks: Ranks) -> None:
    """Set `args.resume`: ranks that torchrun started again continue the run they began."""
    if args.check:
        args.resume = None
    elif args.resume is None:
        args.resume = ranks.remembered(RUN) or (AUTO if was_restarted() else None)
    if was_restarted():  # What the ranks began anew has to go on.
        args.restart = False
    if args.resume not in (None, AUTO) and ranks.first:
        # Refuse other settings and lost states now rather than after all data were read.
        folder = find_run(args)
        if not args.restart:
            has_state(folder)


def write_facts(
    args: argparse.Namespace, folder: Path, page: Page | None, start: dict[str, Any]
) -> None:
    """Record the flags, the environment and the data of a run.

    Args:
        page: what was found in the data; None: the run goes on from a state.
        start: the environment of this start of the run.
    """
    starts_file = folder / STARTS
    starts = earlier_starts(starts_file)
    if page is not None:
        write_json(folder / "check.json", page.facts)
        write_text(folder / "check.txt", f"{page}\n")
    elif told := unlike_before(starts, start):
        logging.info(told)
    write_json(starts_file, [*starts, start])
    save_config(args, folder)  # last: a folder with this file is a run that can be continued


def log_warnings(args: argparse.Namespace, page: Page | None, model: LoRAModel) -> None:
    """Log what is odd about the data and the flags of a new run."""
    for text in page.warnings if page else []:
        logging.warning("warning: %s", text)
    untrained = fresh_heads(args, model)
    if args.train == "lora" and untrained and page:
        logging.warning(
            "warning: --train lora trains no mask head, and %s, so classes cannot be learned well; "
            "train the heads first by --train decoder, and pass that adapter by --lora_ckpt",
            untrained,
        )
    if args.max_epochs < args.stop_epoch != train_parser().get_default("stop_epoch"):
        logging.warning(
            "warning: --stop_epoch %d is beyond the schedule: --max_epochs %d is trained",
            args.stop_epoch,
            args.max_epochs,
        )
    if args.ckpt == SCRATCH and args.base_lr >= 1e-3 and args.clip_grad is None:
        logging.warning(
            "warning: training every weight with --base_lr %g has been seen to collapse to "
            "background; 3e-4 to 1e-3 with --warmup --AdamW --clip_grad 0.5 learns",
            args.base_lr,
        )


def fresh_heads(args: argparse.Namespace, model: LoRAModel) -> str | None:
    """Say which mask heads start at random; None: base weights or an adapter gave all of them."""
    if args.lora_ckpt:
        fresh = model.moved_heads[1] if model.moved_heads else []
        return f"those of {', '.join(fresh)} start at random" if fresh else None
    start = model.sam.head_start or ""
    return None if start.endswith("fresh: none") else f"some start at random ({start})"


def log_model(args: argparse.Namespace, folder: Path, model: LoRAModel, *, resumed: bool) -> None:
    """Log the size of the network, and which heads base weights or an adapter gave it."""
    if model.moved_heads:
        moved, fresh = (", ".join(names) or "none" for names in model.moved_heads)
        logging.info("heads of %s: moved %s; fresh %s", args.lora_ckpt, moved, fresh)
    if model.sam.head_start and not args.lora_ckpt and not resumed:
        logging.info("heads: %s", model.sam.head_start)
    count = count_parameters(model)
    logging.info("%s: %s parameters, %s train", folder, f"{count['all']:,}", f"{count['train']:,}")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
