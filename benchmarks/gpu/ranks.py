"""One update of a batch on one process, in parts, and on two processes, by gloo and NCCL."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import scenes
from distributed.ranks import ALONE, Ranks
from distributed.signals import end_with_parent
from trainer import StepOptions, make_optimizer, training_step
from training.losses import SegmentationLoss

from .rows import Row, Setting, at_least, at_most, holds, not_run
from .running import ROOT
from .training import CLASSES, Case, Way

# Those of tests/test_ranks.py: of a weight and of the loss.
TOLERANCE, LOSS_TOLERANCE = 1e-4, 1e-5
# By SGD a weight moves by the gradient times this rate. AdamW would divide by the gradient's size,
# also where the gradient is only rounding.
LR = 10.0

Update = dict[str, torch.Tensor]  # weights after an update by their names, and "loss"


def ranks(setting: Setting) -> Iterator[Row]:
    """Compare one update of a batch in all the ways in which processes can share it."""
    device = setting.device
    on_gpu = device.type == "cuda"
    case = Case.of(setting)
    start = trained_weights(case.network(torch.device("cpu")))
    whole = update(case, device, ALONE)
    moved = max(float((whole[name] - value).abs().max()) for name, value in start.items())
    what = f"largest change of a weight by the update ({case})"
    yield at_least(what, moved, 2 * TOLERANCE, note="else the rows below would say nothing")
    half = case.batch // 2
    yield from same(whole, update(case, device, ALONE, at_once=half), f"{half} + {half} in parts")
    folder = scenes.scratch_folder()
    pairs = {"gloo": [device, device]}
    if torch.cuda.device_count() > 1 and on_gpu:
        pairs["nccl"] = [torch.device("cuda", index) for index in range(2)]
    for backend, devices in pairs.items():
        where = "two cards" if devices[0] != devices[1] else "one device"
        shared = in_processes(setting, backend, devices, folder / backend)
        yield from same(whole, shared, f"2 × {half} on two processes, {backend}, {where}")
    if "nccl" not in pairs:
        why = "there is one card" if on_gpu else "needs two GPUs"
        yield not_run(f"2 × {half} on two processes, NCCL, two cards", why)
    # It comes last: where a library fails to start, it may never end.
    yield nccl_alone(device) if on_gpu else not_run("NCCL, one process: a sum")


def nccl_alone(device: torch.device) -> Row:
    """Sum over the only process of a group by NCCL."""
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # There may be no network.
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    ones = torch.ones(1 << 20, device=device)
    dist.all_reduce(ones)
    right = bool((ones == 1).all())
    dist.destroy_process_group()
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return holds("NCCL, one process: a sum", right, f"NCCL {version}")


def update(case: Case, device: torch.device, ranks: Ranks, at_once: int | None = None) -> Update:
    """Make one update of this rank's share of the batch in full precision."""
    Way("fp32").choose()
    network = case.network(device)
    share = ranks.share(case.batch)
    batch = {name: values[share] for name, values in case.slices(case.batch, device).items()}
    criterion = SegmentationLoss(CLASSES, 0.8, ranks.total)
    optimizer = make_optimizer(network, "sgd", LR)
    options = StepOptions(at_once=at_once, ranks=ranks)
    terms, _ = training_step(network, batch, criterion, optimizer, LR, options)
    return trained_weights(network) | {"loss": terms["loss"].cpu()}


def trained_weights(network: torch.nn.Module) -> Update:
    """Return copies of the weights that train, on the CPU."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


def same(whole: Update, other: Update, how: str) -> Iterator[Row]:
    """Compare two updates."""
    differences = {name: float((whole[name] - other[name]).abs().max()) for name in whole}
    loss = differences.pop("loss")
    yield at_most(f"{how}: difference of the loss from the whole", loss, LOSS_TOLERANCE)
    worst = max(differences, key=lambda name: differences[name])
    yield at_most(f"{how}: of a weight", differences[worst], TOLERANCE, note=worst)


def in_processes(
    setting: Setting, backend: str, devices: list[torch.device], folder: Path
) -> Update:
    """Make the update on one process for each device, and return what the first has.

    Raises:
        RuntimeError: a process failed; its last line is on stderr.
    """
    folder.mkdir()
    torch.cuda.empty_cache()  # The processes need the memory.
    command = [sys.executable, "-m", "benchmarks.gpu.ranks", backend, str(folder)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(len(devices)), str(device), str(int(setting.small))],
            cwd=ROOT,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"},
        )
        for rank, device in enumerate(devices)
    ]
    while not any(codes := [process.poll() for process in processes]) and None in codes:
        time.sleep(0.1)
    for process in processes:  # one whose partner has failed would wait for it
        process.kill()
        process.wait()
    if any(codes):
        raise RuntimeError(f"the processes of {backend} ended with codes {codes}")
    return torch.load(folder / "update.pt", weights_only=True)


def run_rank(arguments: list[str]) -> None:
    """Join the other process, make the update, and write what came out."""
    end_with_parent(os.getppid())
    backend, folder, rank, count, name, small = arguments
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(str(Path(folder) / "store"), int(count))
    dist.init_process_group(backend, store=store, rank=int(rank), world_size=int(count))
    control = dist.new_group(backend="gloo")
    ranks = Ranks(int(rank), int(count), control)
    found = update(Case.of(Setting(device, bool(int(small)))), device, ranks)
    if ranks.first:
        torch.save(found, Path(folder) / "update.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(sys.argv[1:])
