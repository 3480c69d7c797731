"""Faults during training: a single error line, and everything saved before stays intact."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import processes
import pytest
import torch
from test_gpu_memory import FULL
from test_resume import assert_equal_runs, folder_of, small_flags_of, wait_for_step, write_data

import train
import trainer
from common.errors import InputError
from common.tensors import _HashingFile, load_tensors
from distributed.signals import EXIT_INTERRUPTED
from training import checkpoint as training_state
from training.batches import loader_workers, read_batches
from training.checkpoint import newest_state, saved_states
from training.losses import SegmentationLoss

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs without any fault."""
    output = tmp_path_factory.mktemp("whole")
    log = output.with_suffix(".log")
    assert processes.run(small_flags_of(data, output, "--stop_epoch", "3"), log) == [0]
    return output


def test_a_full_disk_stops_with_a_message_and_the_run_resumes_later(
    data: Path, whole: Path, tmp_path: Path
):
    output, log = tmp_path / "out", tmp_path / "log"
    argv = small_flags_of(data, output, "--stop_epoch", "3")
    (process,) = processes.start(argv, log)
    wait_for_step(output, 3, process.is_alive)
    size = saved_states(folder_of(output))[0].stat().st_size
    # From now on, no file of this process may grow beyond half a state.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
    process.join(timeout=60)
    assert process.exitcode == 2
    assert "error: cannot write" in log.read_text() and "File too large" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert newest_state(folder_of(output))["progress"]["step"] >= 3
    assert processes.run([*argv, "--resume", "auto"], log) == [0]
    assert_equal_runs(output, whole)


def test_a_disk_too_full_for_the_logs_stops_with_a_message(data: Path, whole: Path, tmp_path: Path):
    output, log = tmp_path / "out", tmp_path / "log"
    argv = small_flags_of(data, output, "--stop_epoch", "3")
    (process,) = processes.start([*argv, "--log_every", "1"], log)
    wait_for_step(output, 3, process.is_alive)
    (events,) = folder_of(output).glob("log/events*")
    size = events.stat().st_size + 100
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    process.join(timeout=60)
    assert process.exitcode == 2, log.read_text()
    assert "error: cannot write" in log.read_text() and "Traceback" not in log.read_text()
    assert newest_state(folder_of(output))["progress"]["step"] >= 3
    assert processes.run([*argv, "--resume", "auto"], log) == [0]
    assert_equal_runs(output, whole)


@pytest.mark.parametrize("what", ["killed", "slice gone"])
def test_a_fault_in_a_loader_worker_ends_the_run_with_an_error_line(
    what: str, data: Path, tmp_path: Path
):
    copied = Path(shutil.copytree(data, tmp_path / "data"))
    output, log = tmp_path / "out", tmp_path / "log"
    (process,) = processes.start(small_flags_of(copied, output, "--num_workers", "2"), log)
    wait_for_step(output, 3, process.is_alive)
    if what == "killed":
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
    else:
        for path in (copied / "train_npz").iterdir():
            path.unlink()
    process.join(timeout=60)
    assert process.exitcode == 2, log.read_text()
    said = {"killed": "a loader process was killed", "slice gone": "does not exist"}
    errors = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and said[what] in errors[0]
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), EOFError()])
def test_a_loader_worker_that_is_killed_while_it_hands_over_a_batch_is_told(error: Exception):
    class Loader:
        num_workers = 2

        def __iter__(self):
            yield {"index": [0]}
            raise error

    batches = read_batches(Loader())
    assert next(batches) == {"index": [0]}
    with pytest.raises(InputError, match="a loader process was killed"):
        next(batches)


def test_a_container_with_too_little_shared_memory_is_told():
    loader = torch.utils.data.DataLoader([0], num_workers=2)
    told = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that …"
    with pytest.raises(InputError, match="--shm-size 4g"), loader_workers(loader):
        raise RuntimeError(told)


@pytest.fixture(scope="module")
def three_steps(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended after three steps."""
    output = tmp_path_factory.mktemp("three_steps")
    train.main(small_flags_of(data, output, "--max_iterations", "3"))
    return folder_of(output)


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOTCONN]
)
def test_the_older_state_survives_any_disk_error(
    number: int, three_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = Path(shutil.copytree(three_steps, tmp_path / three_steps.name))
    before = {path: path.read_bytes() for path in saved_states(folder)}

    def refuse(file: _HashingFile, data: bytes) -> int:
        file.error = OSError(number, os.strerror(number))
        return len(data)

    monkeypatch.setattr(_HashingFile, "write", refuse)
    with pytest.raises(InputError, match=os.strerror(number)) as caught:
        train.main(["--resume", str(folder), "--max_iterations", "9"])
    assert "cannot write" in str(caught.value)
    assert {path: path.read_bytes() for path in saved_states(folder)} == before
    assert not list(folder.rglob(".*.partial.*"))


@pytest.mark.parametrize("what", ["output", "run folder", "states and log"])
def test_a_folder_deleted_during_training_ends_the_run_with_an_error_line(
    what: str, data: Path, tmp_path: Path
):
    output, log = tmp_path / "out", tmp_path / "log"
    (process,) = processes.start(small_flags_of(data, output), log)
    wait_for_step(output, 2, process.is_alive)
    folder = folder_of(output)
    moved = {"output": output, "run folder": folder, "states and log": folder / "metrics.jsonl"}
    moved[what].rename(tmp_path / "moved")  # at once, as unmounting does
    process.join(timeout=60)
    assert process.exitcode == 2, log.read_text()
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert str(folder) in line and "Traceback" not in log.read_text()
    assert what == "states and log" or not folder.exists()


def test_killed_between_writing_and_naming_a_state(data: Path, whole: Path, tmp_path: Path):
    output, log = tmp_path / "out", tmp_path / "log"
    argv = small_flags_of(data, output, "--stop_epoch", "3")
    (process,) = processes.start(argv, log, before=processes.killed_while_saving)
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert list(folder_of(output).rglob(".*.partial.*"))
    assert newest_state(folder_of(output))["progress"]["step"] == 3
    assert processes.run([*argv, "--resume", "auto"], log) == [0]
    assert_equal_runs(output, whole)


def test_a_signal_during_a_save_lets_it_finish(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save = training_state.save_tensors
    saves = []

    def asked(*args: object, **kwargs: object) -> object:
        saves.append(args)
        if len(saves) == 5:  # step 4
            os.kill(os.getpid(), signal.SIGTERM)
        return save(*args, **kwargs)

    monkeypatch.setattr(training_state, "save_tensors", asked)
    argv = small_flags_of(data, tmp_path / "out", "--stop_epoch", "3")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the run to compare with had a single thread
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    torch.set_num_threads(threads)
    assert stopped.value.code == EXIT_INTERRUPTED
    folder = folder_of(tmp_path / "out")
    assert newest_state(folder)["progress"]["step"] == 5  # the step in progress was finished
    monkeypatch.undo()
    assert processes.run(["--resume", str(folder)], tmp_path / "log") == [0]
    assert_equal_runs(tmp_path / "out", whole)


class NotFiniteAt(SegmentationLoss):
    """A loss that is NaN in some steps."""

    calls = 0
    steps: tuple[int, ...] = ()

    def forward(self, *args: torch.Tensor) -> dict[str, torch.Tensor]:
        terms = super().forward(*args)
        type(self).calls += 1
        factor = math.nan if self.calls - 1 in self.steps else 1
        return terms | {"loss": terms["loss"] * factor}


@pytest.fixture
def not_finite(monkeypatch: pytest.MonkeyPatch) -> type[NotFiniteAt]:
    """The loss is NaN in steps 3 and 6."""
    monkeypatch.setattr(NotFiniteAt, "calls", 0)
    monkeypatch.setattr(NotFiniteAt, "steps", (3, 6))
    monkeypatch.setattr(trainer, "SegmentationLoss", NotFiniteAt)
    return NotFiniteAt


def test_a_loss_that_is_not_finite_stops_and_names_the_slices(
    not_finite: type[NotFiniteAt], data: Path, tmp_path: Path
):
    with pytest.raises(
        InputError, match=r"the loss is nan at step 3 \(slices case\d{4}_"
    ) as caught:
        train.main(small_flags_of(data, tmp_path, "--max_iterations", "9"))
    assert str(caught.value).count("_slice") == 2
    state = newest_state(folder_of(tmp_path))
    assert state["progress"]["step"] <= 3
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_skip_nan_leaves_out_some_updates(
    not_finite: type[NotFiniteAt],
    data: Path,
    tmp_path: Path,
):
    flags = ["--max_iterations", "9", "--skip_nan"]
    with pytest.raises(InputError, match="at step 6"):
        train.main(small_flags_of(data, tmp_path / "one", *flags, "1"))
    not_finite.calls = 0
    train.main(small_flags_of(data, tmp_path / "two", *flags, "2", "--clip_grad", "1"))
    lines = (folder_of(tmp_path / "two") / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "lr" in record]
    assert [record["step"] for record in records if "skipped" in record] == [3, 6]
    assert len(records) == 9
    assert all(math.isfinite(r["loss"]) for r in records if "skipped" not in r)


def test_weights_that_are_not_finite_are_never_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class NaNGradientAt(NotFiniteAt):
        def forward(self, *args: torch.Tensor) -> dict[str, torch.Tensor]:
            terms = SegmentationLoss.forward(self, *args)
            type(self).calls += 1
            if self.calls == 4:  # only the gradient is NaN, the loss is finite
                terms["loss"].register_hook(lambda gradient: gradient * math.nan)
            return terms

    monkeypatch.setattr(trainer, "SegmentationLoss", NaNGradientAt)
    with pytest.raises(InputError, match=r"weights are NaN or infinite after step 3, first \w+"):
        train.main(small_flags_of(data, tmp_path / "stops", "--max_iterations", "9"))
    state = newest_state(folder_of(tmp_path / "stops"))
    assert state["progress"]["step"] == 3
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert not list(folder_of(tmp_path / "stops").glob("*.pth"))

    NaNGradientAt.calls = 0
    flags = small_flags_of(data, tmp_path / "skips", "--max_iterations", "6", "--skip_nan", "1")
    train.main(flags)
    lines = (folder_of(tmp_path / "skips") / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "lr" in record]
    assert [record["step"] for record in records if "skipped" in record] == [3]
    adapter = load_tensors(folder_of(tmp_path / "skips") / "epoch_1.pth")
    assert all(value.isfinite().all() for value in adapter.values() if torch.is_tensor(value))


CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.69 GiB of "
    "which 512.00 MiB is free. Of the allocated memory 20.00 GiB is allocated by PyTorch"
)


def exhausted(*args: object, **kwargs: object) -> None:
    raise torch.OutOfMemoryError(CUDA_SAYS)


def raising(error: Exception) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("place", "name", "error"),
    [
        (trainer, "training_step", exhausted),
        (trainer, "validate", exhausted),
        (train, "build_model", exhausted),
        *[(train, "build_model", raising(error)) for error in FULL[1:]],
        *[(trainer, "training_step", raising(error)) for error in FULL[4:]],
        (train, "joined", raising(FULL[-1])),  # NCCL finds no room for its buffers.
    ],
)
def test_too_little_gpu_memory_is_reported_wherever_it_happens(
    place: ModuleType,
    name: str,
    error: Callable,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(place, name, error)
    flags = ("--batch_size", "5", "--n_gpu", "2", "--val_every", "1", "--stop_epoch", "1")
    with pytest.raises(InputError) as caught:
        train.main(small_flags_of(data, tmp_path, *flags))
    text = str(caught.value)
    assert ("too small by 2.00 GiB" in text) == (error is exhausted)
    # If the network itself does not fit, smaller parts of a batch would not help.
    parts_help = place is trainer
    assert ("pass --at_once 2 (the same recipe), or pass --checkpoint_blocks" in text) == parts_help
    assert ("end other programs on this GPU" in text) != parts_help and "\n" not in text


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(data: Path, tmp_path: Path):
    locked, log = tmp_path / "locked", tmp_path / "log"
    locked.mkdir(mode=0o500)
    argv = small_flags_of(data, locked)
    (process,) = processes.start(argv, log, before=processes.bound_by_permissions)
    process.join(timeout=60)
    assert process.exitcode == 2, log.read_text()
    (line,) = [line for line in log.read_text().splitlines() if "error" in line]
    assert "cannot make the folder" in line and "Permission denied" in line
    assert not list(locked.iterdir())


def test_a_folder_that_becomes_read_only_loses_nothing(data: Path, whole: Path, tmp_path: Path):
    output, log = tmp_path / "out", tmp_path / "log"
    argv = small_flags_of(data, output, "--stop_epoch", "3")
    (process,) = processes.start(argv, log, before=processes.bound_by_permissions)
    wait_for_step(output, 3, process.is_alive)
    states = saved_states(folder_of(output))[0].parent
    states.chmod(0o500)
    process.join(timeout=60)
    assert process.exitcode == 2, log.read_text()
    assert "error: cannot write" in log.read_text() and "Permission denied" in log.read_text()
    assert "Traceback" not in log.read_text()
    states.chmod(0o700)
    assert newest_state(folder_of(output))["progress"]["step"] >= 3
    assert processes.run([*argv, "--resume", "auto"], log) == [0]
    assert_equal_runs(output, whole)
