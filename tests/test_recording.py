"""`--cuda_graph`: what it refuses, and how batches find their recording. See also `test_gpu.py`."""

from __future__ import annotations

import logging

import pytest
import torch

from common.errors import InputError
from config.flags import train_parser
from config.settings import parse_args
from training.recording import UNRECORDABLE, RecordedGradients, require_recordable

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
VALUES = {"lora_dropout": ["0.1"], "prompt_prob": ["0.5"], "skip_nan": ["3"]}


def flags(*more: str):
    return parse_args(train_parser(), ["--root_path", "data", "--ckpt", "none", *more])


@pytest.mark.parametrize("name", UNRECORDABLE)
def test_what_differs_between_steps_is_refused(name: str):
    words = [f"--{name}", *VALUES.get(name, [])]
    require_recordable(flags(*words), GPU, 2)
    with pytest.raises(InputError, match=f"cannot record --{name}; leave out"):
        require_recordable(flags(*words, "--cuda_graph"), GPU, 1)


def test_it_is_for_one_process_and_a_gpu():
    args = flags("--cuda_graph")
    require_recordable(args, GPU, 1)
    with pytest.raises(InputError, match="needs a CUDA GPU and the device is cpu"):
        require_recordable(args, CPU, 1)
    with pytest.raises(InputError, match="a single process and 2 train"):
        require_recordable(args, GPU, 2)


def test_a_batch_in_parts_is_not_recorded(caplog: pytest.LogCaptureFixture):
    args = flags("--cuda_graph", "--batch_size", "6")
    args.at_once = 6
    assert isinstance(RecordedGradients.from_flags(args, []), RecordedGradients)
    args.at_once = 4
    with caplog.at_level(logging.WARNING):
        assert RecordedGradients.from_flags(args, []) is None
    assert "4 slices of 6" in caplog.text
    assert RecordedGradients.from_flags(flags(), []) is None
