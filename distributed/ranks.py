"""Several processes train one model or share out the volumes: torch.distributed and torchrun.

A rank is one process with one GPU. `torchrun` starts them on one or many machines; `launch` starts
them on this machine through torchrun's own agent.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from common.errors import NOTES, InputError
from distributed.signals import EXIT_INTERRUPTED

EXIT_LOST_RANK = 1
LONG = timedelta(hours=12)  # one rank may check data or score a volume while the others wait
JOIN = timedelta(minutes=5)  # all are there by then, or torchrun shall start them again
STEP = timedelta(minutes=30)  # that one rank may be behind the others in a training step
SAVED = "saved"  # a rank's word that it was asked to stop, and that its state is saved
GONE = re.compile("peer|gloo|nccl|broken pipe", re.IGNORECASE)  # in errors of a rank that is gone


@dataclass(frozen=True)
class Ranks:
    """This process among all; the default is a process alone, for which everything is a no-op."""

    rank: int = 0
    count: int = 1
    control: dist.ProcessGroup | None = None  # on the CPU, so that agreeing waits for no GPU
    memory: dist.Store | None = None  # torchrun's, which outlives ranks that it starts again

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, length: int) -> slice:
        """The contiguous part of `length` items that is this rank's; parts differ by one at most.

        Where there are fewer items than ranks, some ranks get none.
        """
        start, end = (index * length // self.count for index in (self.rank, self.rank + 1))
        return slice(start, end)

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a vector; the gradient flows to this rank's own part.

        Every rank computes the same loss from the total, so the gradient of its own part is its
        share of the whole gradient, and `add_gradients` only has to add.
        """
        return sums if self.count == 1 else _Total.apply(sums)

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks, in one message.

        A parameter that no rank's loss reaches keeps no gradient, so that no optimiser decays it.
        """
        if self.count == 1:
            return
        reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        dist.all_reduce(reached, dist.ReduceOp.MAX, group=self.control)
        parameters = [
            p for p, anywhere in zip(parameters, reached.tolist(), strict=True) if anywhere
        ]
        for parameter in parameters:
            if parameter.grad is None:  # this rank had no slices in the step
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
        )

    def copy_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every rank the first one's values."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def agree(self, wish: int) -> int:
        """The largest wish of all ranks."""
        if self.count == 1:
            return wish
        wishes = torch.tensor([wish], dtype=torch.int32)
        dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self.control)
        return int(wishes)

    def gather(self, own: Any) -> list[Any]:
        """What every rank brought, in the order of ranks, on every rank."""
        if self.count == 1:
            return [own]
        everything: list[Any] = [None] * self.count
        dist.all_gather_object(everything, own, group=self.control)
        return everything

    def from_first(self, thing: Any) -> Any:
        """What the first rank has."""
        if self.count == 1:
            return thing
        holder = [thing]
        dist.broadcast_object_list(holder, src=0, group=self.control)
        return holder[0]

    def remember(self, name: str, value: str) -> None:
        """Leave word for the ranks that torchrun starts should one of these die."""
        if self.memory is not None and self.first:
            self.memory.set(f"samed/{name}", value)

    def remembered(self, name: str) -> str | None:
        """What the ranks before these left, the same on every rank."""
        found = None
        if self.memory is not None and self.first and self.memory.check([f"samed/{name}"]):
            found = self.memory.get(f"samed/{name}").decode()
        return self.from_first(found)


ALONE = Ranks()


class _Total(torch.autograd.Function):
    """The sum over ranks, the same to the bit on each; the gradient is the own part's."""

    @staticmethod
    def forward(ctx: Any, sums: torch.Tensor) -> torch.Tensor:
        total = sums.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def under_torchrun() -> bool:
    """Whether torchrun (or `launch`) started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_device(device: torch.device) -> torch.device:
    """This rank's own GPU of its machine."""
    if device.type == "cuda" and under_torchrun():
        own, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= count:
            raise InputError(
                f"this is process {own + 1} of this machine, which has {count} GPUs; start one "
                "process for each GPU at most"
            )
        return torch.device("cuda", own)
    return device


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the other ranks, NCCL among GPUs and gloo among CPUs; leave them at the end."""
    if not under_torchrun() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    memory, rank, count = next(dist.rendezvous("env://", timeout=JOIN))
    # torchrun keeps one store for all attempts; in it ranks would find the addresses of dead ones
    attempt = memory.add(f"samed/starts/{rank}", 1)
    store = dist.PrefixStore(f"samed/attempt/{attempt}", memory)
    store.set_timeout(JOIN)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=STEP)
    try:
        control = dist.new_group(backend="gloo", timeout=LONG)
        yield Ranks(rank, count, control, memory)
    except SystemExit as stop:
        if stop.code == EXIT_INTERRUPTED:  # as all ranks do at the same step
            dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not GONE.search(str(error)):
            raise
        folder = os.environ.get(NOTES)
        if not (folder and any(Path(folder).iterdir())):  # else that rank has said why
            why = str(error).splitlines()[0][:200]
            print(f"error: rank {rank} lost another rank and ends ({why})", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(EXIT_LOST_RANK)  # at an ordinary exit the threads of gloo abort the process
    # after a fault the group is not destroyed: that would wait for ranks that are elsewhere
    dist.destroy_process_group()


def note_for_launcher(word: str) -> None:
    """Leave word for `launch`, if it started this rank."""
    if folder := os.environ.get(NOTES):
        (Path(folder) / word).touch()
