"""`--cuda_graph`: what it refuses, and how batches find their recording. See also `test_gpu.py`."""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model

from common.errors import InputError
from config.flags import train_parser
from config.settings import parse_args
from distributed.ranks import ALONE
from trainer import StepOptions, freeze_unreached, make_optimizer, training_step
from training import recording
from training.losses import SegmentationLoss
from training.memory import memory_of_step
from training.optimizers import parameters_of
from training.recording import UNRECORDABLE, RecordedGradients, require_recordable

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
VALUES = {"lora_dropout": ["0.1"], "prompt_prob": ["0.5"], "skip_nan": ["3"]}


def flags(*more: str) -> argparse.Namespace:
    return parse_args(train_parser(), ["--root_path", "data", "--ckpt", "none", *more])


@pytest.mark.parametrize("name", UNRECORDABLE)
def test_what_differs_between_steps_is_refused(name: str):
    words = [f"--{name}", *VALUES.get(name, [])]
    with pytest.raises(InputError, match=f"cannot record --{name}; leave out"):
        require_recordable(flags(*words, "--cuda_graph"), GPU, 1)


def test_it_is_for_one_process_and_a_gpu():
    args = flags("--cuda_graph")
    require_recordable(args, GPU, 1)
    with pytest.raises(InputError, match="needs a CUDA GPU and the device is cpu"):
        require_recordable(args, CPU, 1)
    with pytest.raises(InputError, match="a single process and 2 train"):
        require_recordable(args, GPU, 2)
    with pytest.raises(InputError, match="a single process and 2 train"):  # under torchrun
        RecordedGradients.from_flags(args, GPU, replace(ALONE, count=2), [])


@pytest.mark.parametrize("n_gpu", [1, 2])
def test_a_batch_in_parts_is_not_recorded(n_gpu: int, caplog: pytest.LogCaptureFixture):
    args = flags("--cuda_graph", "--batch_size", "6", "--n_gpu", str(n_gpu))
    args.at_once = 6 * n_gpu
    assert isinstance(RecordedGradients.from_flags(args, GPU, ALONE, []), RecordedGradients)
    args.at_once = 6 * n_gpu - 1
    with caplog.at_level(logging.WARNING):
        assert RecordedGradients.from_flags(args, GPU, ALONE, []) is None
    assert f"{args.at_once} slices of {6 * n_gpu}" in caplog.text
    assert RecordedGradients.from_flags(flags(), CPU, ALONE, []) is None


def test_its_memory_counts_twice():
    plain, recorded = (
        memory_of_step(flags("--img_size", "64", *more), tiny_model(), 4, 4)
        for more in ([], ["--cuda_graph"])
    )
    *fixed, activations = plain.values()
    assert [*recorded.values()] == [*fixed, 2 * activations]
    assert "--cuda_graph" in list(recorded)[-1]


class Replayed:
    """In place of a graph: computes again with the same inputs, and writes to the same results."""

    def __init__(self, compute: Callable, parameters: list[torch.nn.Parameter]) -> None:
        self.compute, self.parameters = compute, parameters
        self.terms, self.logits = compute()
        self.gradients = [p.grad for p in parameters]

    def replay(self) -> None:
        terms, logits = self.compute()
        self.logits.copy_(logits)
        for name, term in self.terms.items():
            term.copy_(terms[name])
        for parameter, kept in zip(self.parameters, self.gradients, strict=True):
            if kept is not None:
                kept.copy_(parameter.grad)


def test_a_replayed_step_is_the_computed_one(monkeypatch: pytest.MonkeyPatch):
    """Batches of two sizes in turns, other rates, clipped gradients: the same weights and terms."""
    models = [tiny_model().train()]
    models.append(copy.deepcopy(models[0]))
    found, recordings = [], []
    for model, records in zip(models, (False, True), strict=True):
        freeze_unreached(model)
        optimizer = make_optimizer(model, "adamw", 1e-3)
        parameters = parameters_of(optimizer)

        def captured(compute: Callable, other: object, parameters=parameters) -> tuple:
            recordings.append(Replayed(compute, parameters))
            return recordings[-1], (recordings[-1].terms, recordings[-1].logits)

        monkeypatch.setattr(recording, "captured", captured)
        recorded = RecordedGradients(parameters) if records else None
        options = StepOptions(clip_grad=0.1, recorded=recorded)
        generator = torch.Generator().manual_seed(1)
        told = []
        for step, size in enumerate((3, 3, 2, 3, 2)):
            batch = {
                "image": torch.rand(size, 1, 64, 64, generator=generator).expand(-1, 3, -1, -1),
                "low_res_label": torch.randint(0, 3, (size, 16, 16), generator=generator),
                "index": list(range(size)),
            }
            criterion = SegmentationLoss(3, 0.8)
            terms, logits = training_step(
                model, batch, criterion, optimizer, 1e-3 / (step + 1), options
            )
            told += [*terms.values(), logits.sum()]
        found.append([*told, *model.parameters()])
    assert len(recordings) == 2  # one for each size
    assert all(map(torch.equal, *found))
