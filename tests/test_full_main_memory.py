"""A full main memory is one sentence in train.py, test.py and predict.py, with flags that help."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, tiny_model, write_slices
from test_datasets import write_volume_h5

import test as test_program
import train
import trainer
from common.errors import InputError, exit_on_bad_input
from common.full_memory import is_gpu_full, is_main_full, telling_full_memory
from config.flags import train_parser
from datasets.dataset_synapse import Synapse_dataset
from datasets.registry import SYNAPSE
from training.memory import out_of_memory

TOO_MUCH = 1 << 50  # bytes that no machine has
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def by_torch(*_: Any, **__: Any) -> None:
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def by_numpy(*_: Any, **__: Any) -> None:
    np.zeros(TOO_MUCH, dtype=np.uint8)


def by_python(*_: Any, **__: Any) -> None:
    bytearray(TOO_MUCH)


def by_fork(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def in_a_process(*_: Any, **__: Any) -> None:
    """As `in_processes` passes on what a function raised in another process."""
    raise RuntimeError(
        'Traceback (most recent call last):\n  File "a.py", line 1, in read\n    np.zeros(n)\n'
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 1.00 PiB for an array\n"
    )


WAYS = [by_torch, by_numpy, by_python, by_fork, in_a_process]


def error_of(fail: Callable[[], None]) -> Exception:
    with pytest.raises((RuntimeError, MemoryError, OSError)) as caught:
        fail()
    return caught.value


@pytest.mark.parametrize("fail", WAYS)
def test_it_is_recognised_in_every_form_and_is_no_full_gpu(fail: Callable[[], None]):
    error = error_of(fail)
    assert is_main_full(error) and not is_gpu_full(error)
    with pytest.raises(InputError) as caught, telling_full_memory(6, use_amp=False):
        raise error
    told = str(caught.value)
    assert told.startswith("the main memory was too small (")
    assert told.endswith("; pass --batch_size 3, or end other programs on this machine")
    assert "Traceback" not in told and "GPU" not in told


def test_other_errors_are_no_full_memory():
    for error in (RuntimeError("sizes differ"), OSError(errno.ENOSPC, "full"), ValueError("bad")):
        assert not is_main_full(error)
        with pytest.raises(type(error)) as caught, telling_full_memory(6):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("device", "flags", "at_once", "told"),
    [
        (CPU, (), 12, "; pass --at_once 6 (the same recipe), or pass --checkpoint_blocks (the sa"),
        (
            CPU,
            ("--checkpoint_blocks", "--use_amp"),
            1,
            "; end other programs on this machine, or p",
        ),
        (CPU, (), None, "; end other programs on this machine, or pass a smaller --vit_name"),
        # The network and its activations lie on the GPU.
        (GPU, (), 12, "; end other programs on this machine, or pass a smaller --num_workers"),
    ],
)
def test_training_names_the_flags_that_help_there(
    device: torch.device, flags: tuple[str, ...], at_once: int | None, told: str
):
    args = train_parser().parse_args(flags)
    args.at_once = at_once
    text = out_of_memory(error_of(by_torch), args, device)
    assert text.startswith("the main memory was too small (") and told in text
    assert "DefaultCPUAllocator" in text and f"{TOO_MUCH}" in text and "\n" not in text
    assert out_of_memory(ValueError("other"), args, device) is None


@pytest.mark.parametrize(
    ("place", "name"), [(train, "build_model"), (trainer, "training_step"), (trainer, "validate")]
)
@pytest.mark.parametrize("fail", [by_torch, by_numpy])
def test_training_ends_with_one_sentence_wherever_it_happens(
    place: Any,
    name: str,
    fail: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    data = write_slices(tmp_path / "data", cases=2)
    monkeypatch.setattr(place, name, fail)
    flags = ["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS]
    flags += ["--batch_size", "5", "--val_every", "1", "--stop_epoch", "1"]
    with pytest.raises(SystemExit) as ended, exit_on_bad_input():
        train.main(flags)
    told = capfd.readouterr().err
    (line,) = [line for line in told.splitlines() if line.startswith("error:")]
    assert ended.value.code == 2 and "Traceback" not in told
    assert line.startswith("error: the main memory was too small (")
    assert ("pass --at_once 2 (the same recipe)" in line) == (place is trainer)


@pytest.mark.parametrize("name", ["read_case", "score_case", "predict_volume"])
def test_a_volume_that_does_not_fit_is_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the thread that reads, in one that scores, and in the network."""
    for case in ("case0001", "case0002"):
        write_volume_h5(tmp_path, case)
    (tmp_path / "test_vol.txt").write_text("case0001\ncase0002\n")
    dataset = Synapse_dataset(tmp_path, tmp_path, "test_vol", num_classes=8)
    monkeypatch.setattr(test_program, name, by_numpy)
    args = SimpleNamespace(
        batch_size=9,
        use_amp=False,
        input_size=64,
        img_size=64,
        input_slices=1,
        is_savenii=False,
        num_classes=8,
        no_viewer=True,
        spec=SYNAPSE.to_json(),
    )
    model = tiny_model(num_classes=8)
    with pytest.raises(InputError, match=r"^the main memory was") as caught, telling_full_memory():
        list(test_program.test_cases(args, model, dataset, tmp_path))
    assert ("pass --batch_size 4" in str(caught.value)) == (name == "predict_volume")
