"""A full GPU is recognised in every form, and told in a sentence that names flags that help."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_datasets import write_volume_h5
from test_predict import SPEC, make_adapter, marked, run
from test_scans import placed

import predict
import test as test_program
from common.errors import InputError, exit_on_bad_input
from common.full_memory import ENOUGH_TO_START, is_gpu_full, telling_full_memory
from datasets.dataset_synapse import Synapse_dataset
from datasets.registry import SYNAPSE
from datasets.scans.volumes import write_volume
from evaluation.predict_volume import predict_volume
from prediction import segmenting

Oom, Accelerator = torch.OutOfMemoryError, torch.AcceleratorError
Nccl = torch.distributed.DistBackendError
NOTE = "\nCUDA kernel errors might be asynchronously reported at some other API call."
# Errors that always mean a full GPU, as PyTorch words them.
FULL = [
    Oom("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.69 GiB"),
    Oom("Allocation on device 0 would exceed allowed memory."),
    Accelerator(f"CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'{NOTE}"),
    RuntimeError(f"CUDA error: out of memory{NOTE}"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    Nccl(
        "NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO "
        "for details), NCCL version 2.26.2\nncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Last error:\nCuda failure 2 'out of memory'"
    ),
]
# Errors that a full GPU explains, if it is full.
PERHAPS = [
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasSgemm(...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: No valid execution plans built."),
    Nccl("NCCL error in: NCCLUtils.hpp:181, unhandled cuda error, NCCL version 2.21.0"),
]
OTHER = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
    Nccl("NCCL error: remote process exited or there was a network error"),
    ValueError("out of memory"),  # not an error of a device
    InputError("scan.nii.gz: CUDA out of memory is its description"),
]


def first_words(error: Exception) -> str:
    return str(error)[:40]


def gpu_with(monkeypatch: pytest.MonkeyPatch, free: int, refused: int = 0) -> None:
    """Let there be a GPU with `free` bytes, whose allocator refused memory `refused` times."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_ooms": refused})


@pytest.mark.parametrize("error", FULL, ids=first_words)
def test_a_full_gpu_is_recognised(error: Exception):
    assert is_gpu_full(error)


@pytest.mark.parametrize("error", PERHAPS, ids=first_words)
def test_what_may_have_other_causes_counts_only_if_memory_ran_out(
    error: Exception, monkeypatch: pytest.MonkeyPatch
):
    assert not is_gpu_full(error)  # no GPU at all
    gpu_with(monkeypatch, free=60 * 2**30)
    assert not is_gpu_full(error)
    gpu_with(monkeypatch, free=60 * 2**30, refused=1)  # by `set_per_process_memory_fraction`
    assert is_gpu_full(error)
    gpu_with(monkeypatch, free=ENOUGH_TO_START - 1)
    assert is_gpu_full(error)

    def broken() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert not is_gpu_full(error)


@pytest.mark.parametrize("error", OTHER, ids=first_words)
def test_other_errors_are_no_full_gpu(error: Exception, monkeypatch: pytest.MonkeyPatch):
    gpu_with(monkeypatch, free=0, refused=1)
    assert not is_gpu_full(error)
    with pytest.raises(type(error)) as caught, telling_full_memory(12, use_amp=False):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("batch_size", "use_amp", "told"),
    [
        (12, False, "; pass --batch_size 6, or --use_amp, or --device cpu, which is slow"),
        (3, True, "; pass --batch_size 1, or --device cpu, which is slow"),
        (1, False, "; pass --use_amp, or --device cpu, which is slow"),
        (1, True, "; pass --device cpu, which is slow"),
    ],
)
def test_the_sentence_names_only_flags_that_help(batch_size: int, use_amp: bool, told: str):
    for error in FULL:
        with pytest.raises(InputError) as caught, telling_full_memory(batch_size, use_amp=use_amp):
            raise error
        text = str(caught.value)
        assert text.startswith("the GPU's memory was too small (") and text.endswith(told)
        assert str(error).splitlines()[0][:40] in text and "\n" not in text


def test_what_failed_holds_no_memory_any_more():
    held = []

    def fail() -> None:
        large = torch.ones(3)
        held.append(weakref.ref(large))
        raise Oom("CUDA out of memory")

    with pytest.raises(InputError) as caught, telling_full_memory():
        fail()
    assert held[0]() is None and caught.value.__cause__ is None


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), SPEC)


@pytest.mark.parametrize("error", [FULL[0], FULL[2], FULL[4], FULL[5]], ids=first_words)
def test_predict_goes_on_with_the_other_scans(
    error: Exception,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    (tmp_path / "in").mkdir()
    for name in "abc":
        write_volume(tmp_path / "in" / f"{name}.nii.gz", marked((3, 20, 20))[0], placed("LPS"))
    calls = []

    def fail_second(*args: Any, **kwargs: Any) -> np.ndarray:
        calls.append(kwargs["batch_size"])
        if len(calls) == 2:
            raise error
        return predict_volume(*args, **kwargs)

    monkeypatch.setattr(segmenting, "predict_volume", fail_second)
    flags = ["--batch_size", "4"]
    assert run(tmp_path / "in", tmp_path / "out", adapter, *flags) == predict.EXIT_SOME_FAILED
    told = capfd.readouterr().err
    assert calls == [4, 4, 4] and "Traceback" not in told and "this is a bug" not in told
    assert "error: b: the GPU's memory was too small (" in told
    assert "; pass --batch_size 2, or --use_amp, or --device cpu, which is slow\n" in told
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == [
        "a.nii.gz",
        "c.nii.gz",
    ]


@pytest.mark.parametrize("program", [test_program, predict], ids=["test", "predict"])
@pytest.mark.parametrize("error", [FULL[0], FULL[2], FULL[-1]], ids=first_words)
def test_a_full_gpu_before_the_first_scan_is_one_sentence(
    program: Any,
    error: Exception,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    name = "test" if program is test_program else "predict"
    monkeypatch.setattr(program, name, fail)
    data = {"test": ["--volume_path", str(tmp_path)], "predict": ["--input", str(tmp_path)]}[name]
    output = {"test": "--output_dir", "predict": "--output"}[name]
    argv = [*data, output, str(tmp_path / "out"), "--lora_ckpt", str(adapter), "--device", "cpu"]
    with pytest.raises(SystemExit) as ended, exit_on_bad_input():
        program.main(argv)
    told = capfd.readouterr().err
    assert ended.value.code == 2
    (line,) = [line for line in told.splitlines() if line.startswith("error:")]
    assert line.endswith("; pass --device cpu, which is slow") and "Traceback" not in told


def test_test_names_the_batch_size_that_a_volume_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise FULL[4]

    write_volume_h5(tmp_path, "case0001")
    (tmp_path / "test_vol.txt").write_text("case0001\n")
    dataset = Synapse_dataset(tmp_path, tmp_path, "test_vol", num_classes=8)
    monkeypatch.setattr(test_program, "predict_volume", fail)
    args = SimpleNamespace(
        batch_size=9,
        use_amp=False,
        input_size=64,
        img_size=64,
        input_slices=1,
        spec=SYNAPSE.to_json(),
        is_savenii=False,
    )
    with pytest.raises(InputError, match=r"ALLOC_FAILED.*; pass --batch_size 4, or --use_amp, or"):
        list(test_program.test_cases(args, tiny_model(), dataset, tmp_path))
