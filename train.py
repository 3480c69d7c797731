"""Train SAMed: `python train.py --help`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from common.errors import InputError, exit_on_bad_input
from common.files import atomic_path, write_json
from config.flags import train_parser
from config.run_folder import (
    AUTO,
    SCRATCH,
    find_run,
    fingerprint_data,
    fingerprint_weights,
    make_run_folder,
    only_writer,
    save_config,
)
from config.settings import parse_args
from datasets.dataset_synapse import Synapse_dataset
from distributed.launch import launch, processes_here, was_restarted
from distributed.ranks import Ranks, joined, local_device
from trainer import freeze_unreached, trainer_synapse
from training.data_check import Page, describe
from training.memory import out_of_memory
from training.validation import hold_out
from utils import (
    allow_tf32,
    build_model,
    choose_device,
    environment,
    seed_everything,
    start_logging,
)

RUN = "run"  # the name under which torchrun's store holds the run's folder


def main(argv: Sequence[str] | None = None) -> None:
    """Check everything that was given, then train, on every GPU of the recipe that is here."""
    args = parse_args(train_parser(), argv)
    processes = 1 if args.check else processes_here(args.device, args.processes, args.n_gpu)
    if processes > 1:
        raise SystemExit(launch(__file__, sys.argv[1:] if argv is None else argv, processes))
    device = local_device(choose_device(args.device))
    with joined(device) as ranks:
        try:
            train(args, device, ranks)
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            if "out of memory" not in str(error):
                raise
            raise InputError(out_of_memory(error, args)) from None


def train(args: argparse.Namespace, device: torch.device, ranks: Ranks) -> None:
    """One run, or what is left of it, as one of its ranks."""
    seed_everything(args.seed, deterministic=bool(args.deterministic))
    allow_tf32(args.tf32)
    if args.check:
        args.resume = None
    elif args.resume is None:  # ranks that torchrun started again go on with what they began
        args.resume = ranks.remembered(RUN) or (AUTO if was_restarted() else None)
    if args.resume not in (None, AUTO) and ranks.first:
        find_run(args)  # other settings are refused now rather than after the check

    dataset = Synapse_dataset(args.root_path, args.list_dir, "train", num_classes=args.num_classes)
    if args.val_every:
        hold_out(dataset, args.val_cases, args.seed)  # refused now as well
    facts = dataset.check() if ranks.first else []
    model, low_res = build_model(args, device, move_heads=True)
    freeze_unreached(model)
    folder = page = None
    if ranks.first:
        args.data = fingerprint_data(facts)
        args.weights = fingerprint_weights(model.sam.base_fingerprint, args.lora_ckpt)
        folder = find_run(args) if args.resume else None
        page = None if folder else describe(args, facts, model, device)
        if args.check:
            print(page)
        elif folder is None:
            folder = make_run_folder(args)
    folder = ranks.from_first(folder)
    if folder is None:  # --check
        return

    ranks.remember(RUN, str(folder))
    with only_writer(folder, ranks.first):
        start_logging(folder / "log.txt" if ranks.first else None)
        if ranks.first:
            write_facts(args, folder, page, device, ranks)
            warn(args, page)
            total = sum(parameter.numel() for parameter in model.parameters())
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            if model.moved_heads:
                moved, fresh = (", ".join(names) or "none" for names in model.moved_heads)
                logging.info("heads of %s: moved %s; fresh %s", args.lora_ckpt, moved, fresh)
            logging.info("%s: %s parameters, %s train", folder, f"{total:,}", f"{trainable:,}")
        trainer_synapse(
            *(args, model, folder, args.num_classes > 1, low_res), dataset=dataset, ranks=ranks
        )
        logging.info("test it: python test.py --config %s --volume_path …", folder)


def write_facts(
    args: argparse.Namespace, folder: Path, page: Page | None, device: torch.device, ranks: Ranks
) -> None:
    """What tells afterwards what was run: flags, environment, data. Only a new run has a page."""
    starts_file = folder / "environment.json"
    starts = json.loads(starts_file.read_text("utf-8")) if starts_file.is_file() else []
    starts.append(environment(device) | {"processes": ranks.count})
    save_config(args, folder)
    write_json(starts_file, starts)
    if page is not None:
        write_json(folder / "check.json", page.facts)
        with atomic_path(folder / "check.txt") as temporary:
            temporary.write_text(f"{page}\n", encoding="utf-8")


def warn(args: argparse.Namespace, page: Page | None) -> None:
    """Say what is odd about a new run."""
    for text in page.warnings if page else []:
        logging.warning("warning: %s", text)
    if args.max_epochs < args.stop_epoch != train_parser().get_default("stop_epoch"):
        logging.warning(
            "warning: --stop_epoch %d is beyond the schedule: --max_epochs %d is trained",
            *(args.stop_epoch, args.max_epochs),
        )
    if args.ckpt == SCRATCH and args.base_lr >= 1e-3 and args.clip_grad is None:
        logging.warning(
            "from scratch, --base_lr %g has been seen to collapse to background; "
            "3e-4 to 1e-3 with --warmup --AdamW --clip_grad 0.5 learns",
            args.base_lr,
        )


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
