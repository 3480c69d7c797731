"""A training step's kernels, recorded once and then replayed: `python train.py --cuda_graph`.

In half precision a GPU is faster than the Python program that launches its kernels one by one. A
CUDA graph launches all of them together, and they compute the same bits.
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
            "out, or pass --n_gpu 1"
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

    The graphs share their memory, so the last and smaller batch of an epoch needs no more.

    Args:
        parameters: those that are trained.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.of_shape: dict[torch.Size, Recording] = {}

    @classmethod
    def from_flags(
        cls, args: argparse.Namespace, parameters: Sequence[nn.Parameter]
    ) -> RecordedGradients | None:
        """Return what `--cuda_graph` asks for; None if it is not set, or the memory is too small.

        A batch in parts is not recorded, because the program looks at random states between them.
        """
        if not getattr(args, "cuda_graph", False):
            return None
        if args.at_once < args.batch_size:
            logging.warning(
                "--cuda_graph has no effect: %d slices of %d are computed at once, and only whole "
                "batches can be recorded",
                args.at_once,
                args.batch_size,
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
        """
        shape = batch["image"].shape
        if shape not in self.of_shape:
            self.of_shape[shape] = self._record(compute, batch)
        recording = self.of_shape[shape]
        for name, tensor in recording.inputs.items():
            tensor.copy_(batch[name], non_blocking=True)
        recording.graph.replay()
        self._set_gradients(recording.gradients)
        return {name: term.clone() for name, term in recording.terms.items()}, recording.logits

    def _record(self, compute: Compute, batch: dict[str, Any]) -> Recording:
        tensors = {name: x.clone() for name, x in batch.items() if isinstance(x, torch.Tensor)}
        inputs = batch | tensors
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._set_gradients([None] * len(self.parameters))
                compute(inputs)
            self._set_gradients([None] * len(self.parameters))
        torch.cuda.current_stream().wait_stream(side)
        pool = next((other.graph.pool() for other in self.of_shape.values()), None)
        graph = torch.cuda.CUDAGraph()
        # The thread that reads the next slices into pinned memory may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
            terms, logits = compute(inputs)
        gradients = [parameter.grad for parameter in self.parameters]
        return Recording(graph, tensors, gradients, terms, logits)

    def _set_gradients(self, gradients: Sequence[torch.Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
