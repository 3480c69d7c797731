"""Measure a training step on a GPU: images per second, memory, share of the peak speed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from config.settings import complete
from datasets.dataset_synapse import Synapse_dataset
from trainer import StepOptions, freeze_unreached, make_optimizer, training_step
from training.batches import augmented_batch, make_loader
from training.losses import SegmentationLoss

from . import plain, scenes
from .timing import Comparison, Row, compare

BATCH = 24
BF16 = StepOptions(amp_dtype=torch.bfloat16)
# Dense bf16 operations per second, as the makers state them.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "3090": 71e12, "4090": 165e12}


def gpu_step_rows(device: torch.device) -> list[Row]:
    """Time vit_b at 512 px, batch 24, in bf16, eager and compiled, against plain float32."""
    criterion = SegmentationLoss(scenes.NUM_CLASSES + 1, 0.8)
    batch = {
        "image": torch.rand(BATCH, 1, 512, 512, device=device).expand(-1, 3, -1, -1),
        "low_res_label": torch.randint(0, scenes.NUM_CLASSES + 1, (BATCH, 128, 128), device=device),
    }
    rows = []
    for compiled in (False, True):
        model = scenes.network().to(device).train()
        freeze_unreached(model)
        slow = plain.plain_copy(model)
        operations = count_operations(slow, batch, criterion)
        network = torch.compile(model) if compiled else model
        optimizers = [make_optimizer(n, adamw=True, base_lr=1e-4) for n in (model, slow)]

        def ours(network=network, optimizer=optimizers[0]) -> torch.Tensor:
            return training_step(network, batch, criterion, optimizer, 1e-4, BF16)[0]["loss"]

        def peer(slow=slow, optimizer=optimizers[1]) -> float:
            return plain.plain_step(slow, batch, criterion, optimizer, 1e-4)["loss"]

        memory = {name: peak_memory(run, device) for name, run in (("ours", ours), ("peer", peer))}
        comparison = Comparison(
            name="training step",
            what=f"one update, vit_b, 512 px, batch {BATCH}, bf16",
            peer_name="the same network written plainly, float32",
            ours=ours,
            peer=peer,
            difference=lambda a, b: abs(float(a) - float(b)),
            tolerance=0.02,
            target=8,
            notes="torch.compile" if compiled else "eager",
        )
        row = compare(comparison, repeats=10, device=device)
        seconds = row.facts["ours_ms"] / 1e3
        peak = next((v for k, v in PEAK.items() if k in torch.cuda.get_device_name(device)), None)
        row.facts |= {
            "images_per_s": BATCH / seconds,
            "memory_gib": memory["ours"],
            "peer_memory_gib": memory["peer"],
            "share_of_bf16_peak": operations / seconds / peak if peak else None,
            "idle_share_behind_the_loader": idle_share(model, criterion, device),
        }
        rows.append(row)
        del model, slow, network, optimizers
        torch.cuda.empty_cache()
    return rows


def count_operations(
    model: nn.Module, batch: dict[str, torch.Tensor], criterion: SegmentationLoss
) -> int:
    """Count the floating-point operations of a forward and backward pass of the plain network."""
    with FlopCounterMode(display=False) as counter:
        criterion(model(batch["image"])["low_res_logits"], batch["low_res_label"])[
            "loss"
        ].backward()
    model.zero_grad()
    return counter.get_total_flops()


def peak_memory(run: Callable[[], object], device: torch.device) -> float:
    """Return the peak memory of one step in GiB, with the weights of both networks."""
    run()
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) / 2**30


def idle_share(model: nn.Module, criterion: SegmentationLoss, device: torch.device) -> float:
    """Return the share of time that training from files spends waiting for the loader."""
    folder = scenes.scratch_folder()
    paths = scenes.write_slices(folder / "train_npz", 24)
    names = [path.stem for path in paths]
    (folder / "lists").mkdir()
    (folder / "lists" / "train.txt").write_text("".join(f"{name}\n" for name in names))
    args = complete(argparse.Namespace(root_path=str(folder), num_workers=8))
    dataset = Synapse_dataset(folder, None, "train")
    dataset.paths, dataset.sample_list = dataset.paths * 40, dataset.sample_list * 40
    optimizer = make_optimizer(model, adamw=True, base_lr=1e-5)
    loader = make_loader(dataset, args, device)

    def train(batches: DataLoader | list) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for slices in batches:
            batch = augmented_batch(slices, 0, args, 128, device)
            training_step(model, batch, criterion, optimizer, 1e-5, BF16)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    train(loader)  # warm-up: starts the workers
    kept = next(iter(loader))
    from_files, in_memory = train(loader), train([kept] * len(loader))
    return max(0.0, 1 - in_memory / from_files)
