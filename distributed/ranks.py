"""Several processes that train one model or share volumes, with torch.distributed.

A rank is one process with one GPU. `distributed.launch` starts ranks on this machine; `torchrun`
starts them on one machine or many.
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

from common.errors import NOTES, WARNING, InputError, first_line
from common.full_memory import is_gpu_full
from distributed.messages import pack, unpack
from distributed.signals import EXIT_INTERRUPTED, end_with_parent

EXIT_LOST_RANK = 1
# How long ranks wait for a rank that checks data or scores a volume.
LONG = timedelta(hours=12)
# How long ranks wait for all to start; then torchrun starts them again.
JOIN = timedelta(minutes=5)
# How long ranks wait for a slower rank in a training step.
STEP = timedelta(minutes=30)
# How PyTorch's watchdog of NCCL ends a rank; a variable of the user stays as it is. These are the
# defaults of PyTorch 2.11 to 2.13, but for the last: a timeout leaves no traces in /tmp, and ranks
# do not ask the store every second whether another wants some.
NCCL_VARIABLES = {
    # A collective that fails, or takes longer than `STEP`, ends the process. NCCL is not asked to
    # clean up first, because that may hang as well.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # If the watchdog itself hangs, its monitor ends the process, at the latest after three times
    # these seconds, which is before `STEP`.
    "TORCH_NCCL_ENABLE_MONITORING": "1",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "480",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
# Environment variable: the process that started this rank, if it was `distributed.launch`.
LAUNCHER = "SAMED_LAUNCHER"
# The file in the folder of notes in which the ranks of one launch meet.
STORE = "store"
# Words in the errors that follow the end of another rank.
GONE = re.compile("peer|gloo|nccl|broken pipe", re.IGNORECASE)


@dataclass(frozen=True)
class Ranks:
    """This process among all ranks. By default it is alone, and every method does nothing."""

    rank: int = 0
    count: int = 1
    # A group on the CPU, so that agreeing does not wait for a GPU.
    control: dist.ProcessGroup | None = None
    # The store of torchrun, which outlives the ranks that it starts again.
    memory: dist.Store | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, length: int) -> slice:
        """Return this rank's contiguous part of `length` items; parts differ by one item at most.

        If there are fewer items than ranks, some ranks get none.
        """
        start, end = (index * length // self.count for index in (self.rank, self.rank + 1))
        return slice(start, end)

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Return the sum of a vector over all ranks; the gradient flows to this rank's part.

        Every rank computes the same loss from the total. So the gradient of its part is its share
        of the whole gradient, and `add_gradients` only has to add.
        """
        return sums if self.count == 1 else _Total.apply(sums)

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all ranks, in one message.

        A parameter without a gradient on every rank keeps none, so that no optimiser decays it.
        """
        if self.count == 1:
            return
        reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        dist.all_reduce(reached, dist.ReduceOp.MAX, group=self.control)
        parameters = [
            p for p, anywhere in zip(parameters, reached.tolist(), strict=True) if anywhere
        ]
        for parameter in parameters:
            if parameter.grad is None:  # This rank had no slices in the step.
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
        )

    def copy_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy the values of the first rank to all ranks."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def agree(self, wish: int) -> int:
        """Return the largest wish of all ranks."""
        if self.count == 1:
            return wish
        wishes = torch.tensor([wish], dtype=torch.int32)
        dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self.control)
        return int(wishes)

    def gather(self, item: Any, kinds: Sequence[type] = ()) -> list[Any]:
        """Return the items of all ranks in their order, on every rank.

        Args:
            item: what `distributed.messages.pack` takes.
            kinds: the dataclasses that may occur in the items.
        """
        if self.count == 1:
            return [item]
        return [self._passed(item, source, kinds) for source in range(self.count)]

    def from_first(self, thing: Any) -> Any:
        """Return the thing that the first rank passes; it travels as in `gather`."""
        return thing if self.count == 1 else self._passed(thing, 0)

    def _passed(self, thing: Any, source: int, kinds: Sequence[type] = ()) -> Any:
        """Return the thing that the rank `source` passes."""
        own = self.rank == source
        message, arrays = pack(thing, kinds) if own else (b"", [])
        size = torch.tensor([len(message)])
        dist.broadcast(size, source, group=self.control)

        def receive(count: int) -> torch.Tensor:
            found = torch.empty(count, dtype=torch.uint8)
            if count:
                dist.broadcast(found, source, group=self.control)
            return found

        if not own:
            return unpack(receive(int(size)).numpy().tobytes(), receive, kinds)
        for part in (torch.frombuffer(bytearray(message), dtype=torch.uint8), *arrays):
            if len(part):
                dist.broadcast(part, source, group=self.control)
        return thing

    def remember(self, name: str, value: str) -> None:
        """Keep a value for the ranks that torchrun starts if one of these dies."""
        if self.memory is not None and self.first:
            self.memory.set(f"samed/{name}", value)

    def remembered(self, name: str) -> str | None:
        """Return the value that earlier ranks kept, the same on every rank."""
        found = None
        if self.memory is not None and self.first and self.memory.check([f"samed/{name}"]):
            found = self.memory.get(f"samed/{name}").decode()
        return self.from_first(found)


ALONE = Ranks()


class _Total(torch.autograd.Function):
    """The sum over all ranks, equal to the bit on each; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, sums: torch.Tensor) -> torch.Tensor:
        total = sums.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def is_rank() -> bool:
    """Return whether `launch` or torchrun started this process."""
    return LAUNCHER in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def ranks_here() -> int:
    """Return the number of ranks that share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_rank() else 1


def local_device(device: torch.device) -> torch.device:
    """Return this rank's GPU, and make it the current one; a CPU stays a CPU.

    Otherwise CUDA would also start on the first GPU, and take some 500 MB there.

    Raises:
        InputError: there are fewer GPUs than ranks, or CUDA cannot use this one.
    """
    if device.type == "cuda" and is_rank():
        index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if index >= count:
            raise InputError(
                f"this is process {index + 1} of this machine, which has {count} GPUs; start at "
                "most one process for each GPU"
            )
        device = torch.device("cuda", index)
    if device.index is not None:
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:
            raise InputError(
                f"{device} cannot be used ({first_line(error)}); if another program fills or "
                "reserves this GPU, end it or wait, or pass another --device"
            ) from None
    return device


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the other ranks, with NCCL on GPUs and gloo on CPUs, and leave them at the end."""
    if not is_rank() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    memory, rank, count = _meet()
    # torchrun keeps one store for all attempts, which still holds the addresses of dead ranks.
    attempt = memory.add(f"samed/starts/{rank}", 1)
    store = dist.PrefixStore(f"samed/attempt/{attempt}", memory)
    store.set_timeout(JOIN)
    on_gpu = device.type == "cuda"
    if on_gpu:
        for name, value in NCCL_VARIABLES.items():
            os.environ.setdefault(name, value)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=count,
        timeout=STEP,
        # NCCL connects at once, so that what prevents it is told at the start.
        device_id=device if on_gpu else None,
    )
    try:
        control = dist.new_group(backend="gloo", timeout=LONG)
        yield Ranks(rank, count, control, memory)
    except SystemExit as stop:
        if stop.code == EXIT_INTERRUPTED:  # All ranks end at the same step.
            dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not GONE.search(str(error)) or is_gpu_full(error):
            raise
        folder = os.environ.get(NOTES)
        # If there are notes, the other rank has reported why it ended.
        notes = Path(folder).iterdir() if folder else ()
        if all(note.suffix == WARNING or note.name == STORE for note in notes):
            why = str(error).splitlines()[0][:200]
            print(f"error: rank {rank} lost another rank and ends ({why})", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(EXIT_LOST_RANK)  # A normal exit would be aborted by the threads of gloo.
    # After a fault the group is not destroyed, because that would wait for the other ranks.
    dist.destroy_process_group()


def _meet() -> tuple[dist.Store, int, int]:
    """Return a store that all ranks share, the number of this rank, and their count."""
    if LAUNCHER not in os.environ:
        return next(dist.rendezvous("env://", timeout=JOIN))
    end_with_parent(int(os.environ[LAUNCHER]))
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return dist.FileStore(str(Path(os.environ[NOTES]) / STORE), count), rank, count
