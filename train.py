"""Train SAMed: `python train.py --help`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from config import parse_args, train_parser
from datasets.dataset_synapse import Synapse_dataset
from run_folder import SCRATCH, make_run_folder, save_config
from run_log import start_logging
from safe_io import atomic_path, exit_on_bad_input
from trainer import trainer_synapse
from utils import allow_tf32, build_model, choose_device, environment, seed_everything


def main(argv: Sequence[str] | None = None) -> None:
    """Check everything that was given, then train."""
    args = parse_args(train_parser(), argv)
    device = choose_device(args.device)
    seed_everything(args.seed, deterministic=bool(args.deterministic))
    allow_tf32(args.tf32)

    dataset = Synapse_dataset(args.root_path, args.list_dir, "train", num_classes=args.num_classes)
    dataset.check()
    model, low_res = build_model(args, device)

    folder = make_run_folder(args)
    start_logging(folder / "log.txt")
    save_config(args, folder)
    with atomic_path(folder / "environment.json") as temporary:
        temporary.write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logging.info("%s: %s parameters, %s of them train", folder, f"{total:,}", f"{trainable:,}")

    if args.ckpt == SCRATCH and args.base_lr >= 1e-3 and args.clip_grad is None:
        logging.warning(
            "from scratch, --base_lr %g has been seen to collapse to background; "
            "3e-4 to 1e-3 with --warmup --AdamW --clip_grad 0.5 learns",
            args.base_lr,
        )

    trainer_synapse(args, model, folder, args.num_classes > 1, low_res, dataset=dataset)
    logging.info("test it: python test.py --config %s --volume_path …", folder / "config.json")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
