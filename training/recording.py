"""A training step's kernels, recorded once and then replayed: `python train.py --cuda_graph`.

In half precision a GPU is faster than the Python program that launches its kernels one by one. A
CUDA graph launches all of them together.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common.errors import InputError
from common.full_memory import is_gpu_full
from distributed.ranks import Ranks
from training.memory import slices_of_process

WARM_UP = 3  # passes before the recording, which compile, and choose kernels and their workspaces
# What a graph would repeat as it was in the recording, or what makes the host wait for the GPU.
UNRECORDABLE = ("lora_dropout", "prompt_prob", "skip_nan", "checkpoint_blocks")

Terms = dict[str, torch.Tensor]
Compute = Callable[[dict[str, Any]], tuple[Terms, torch.Tensor]]


def require_recordable(args: argparse.Namespace, device: torch.device, processes: int) -> None:
    """Raise an `InputError` if the flags ask for a recording that is not possible.

    Args:
        device: on which the processes train.
        processes: number of those that train together.
    """
    if not args.cuda_graph:
        return
    for name in UNRECORDABLE:
        if getattr(args, name):
            raise InputError(f"--cuda_graph cannot record --{name}; leave out one of them")
    if device.type != "cuda":
        raise InputError(f"--cuda_graph needs a CUDA GPU and the device is {device}; leave it out")
    if processes > 1:
        raise InputError(
            f"--cuda_graph records the step of a single process and {processes} train; leave it "
            "out, or pass --processes 1"
        )


@dataclass(frozen=True)
class Recording:
    """A graph, what it reads, and what it writes anew in every replay."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, torch.Tensor]
    gradients: list[torch.Tensor | None]  # of the parameters
    terms: Terms
    logits: torch.Tensor


class RecordedGradients:
    """Computes the loss and the gradients of batches, each shape by a graph of its own.

    The graphs share their memory, and keep it. Beside it the passes that warm up for another shape
    need the memory of a step once more (`training.memory.memory_of_step`).

    Args:
        parameters: those that are trained.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.of_kind: dict[tuple, Recording] = {}

    @classmethod
    def from_flags(
        cls,
        args: argparse.Namespace,
        device: torch.device,
        ranks: Ranks,
        parameters: Sequence[nn.Parameter],
    ) -> RecordedGradients | None:
        """Return what `--cuda_graph` asks for; None if it is not set, or the memory is too small.

        A batch in parts is not recorded, because the program looks at random states between them.

        Raises:
            InputError: a recording is not possible.
        """
        require_recordable(args, device, ranks.count)
        if not args.cuda_graph:
            return None
        slices = slices_of_process(args, ranks.count)
        if args.at_once < slices:
            logging.warning(
                "--cuda_graph has no effect: %d slices of %d are computed at once, and only whole "
                "batches can be recorded",
                args.at_once,
                slices,
            )
            return None
        return cls(parameters)

    def __call__(self, compute: Compute, batch: dict[str, Any]) -> tuple[Terms, torch.Tensor]:
        """Return what `compute` returns for a batch, and set the gradients.

        Args:
            compute: from a batch to the terms of the loss and the logits; it sets the gradients of
                the parameters. It must do the same in every call.
            batch: its tensors are what differs between calls.

        Returns:
            The terms of the loss; and the logits, which the next call overwrites.

        Raises:
            InputError: the network does what a graph cannot hold.
        """
        tensors = {name: x for name, x in batch.items() if isinstance(x, torch.Tensor)}
        kind = tuple((name, x.shape, x.dtype) for name, x in tensors.items())
        if kind not in self.of_kind:
            with torch.cuda.device_of(batch["image"]):
                self.of_kind[kind] = self._record(compute, batch, tensors)
        recording = self.of_kind[kind]
        for name, tensor in recording.inputs.items():
            tensor.copy_(tensors[name], non_blocking=True)
        recording.graph.replay()
        self._set_gradients(recording.gradients)
        return {name: term.clone() for name, term in recording.terms.items()}, recording.logits

    def _record(self, compute: Compute, batch: dict[str, Any], tensors: Terms) -> Recording:
        inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        recorded = next(iter(self.of_kind.values()), None)

        def computed() -> tuple[Terms, torch.Tensor]:
            self._set_gradients([None] * len(self.parameters))
            return compute(batch | inputs)

        graph, (terms, logits) = captured(computed, recorded and recorded.graph)
        gradients = [parameter.grad for parameter in self.parameters]
        return Recording(graph, inputs, gradients, terms, logits)

    def _set_gradients(self, gradients: Sequence[torch.Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


def captured(
    compute: Callable[[], tuple[Terms, torch.Tensor]], other: torch.cuda.CUDAGraph | None
) -> tuple[torch.cuda.CUDAGraph, tuple[Terms, torch.Tensor]]:
    """Return the graph of a computation, and its results, which every replay overwrites.

    Args:
        other: a graph whose memory this one may use too.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # What the network draws in these passes does not count.
    with torch.random.fork_rng([torch.cuda.current_device()]), torch.cuda.stream(side):
        for _ in range(WARM_UP):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # The thread that reads the next slices into pinned memory may call CUDA meanwhile.
        with torch.cuda.graph(graph, other and other.pool(), capture_error_mode="thread_local"):
            found = compute()
    except RuntimeError as error:
        # To end the recording fails too, after what broke it.
        cause = error.__context__ or error
        if is_gpu_full(cause):
            raise cause from None
        reason = str(cause).splitlines()[0]
        raise InputError(
            f"--cuda_graph cannot record this network ({reason}); leave it out"
        ) from error
    return graph, found
