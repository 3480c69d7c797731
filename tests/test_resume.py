"""A run that was killed, stopped or damaged resumes and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import TINY_FLAGS, tiny_sam, write_slices

import train
from common.errors import InputError
from common.files import sha256_of
from common.tensors import save_tensors
from distributed.signals import EXIT_INTERRUPTED, ONE_REQUEST
from training.checkpoint import STATES, newest_state, saved_states

pytestmark = pytest.mark.slow

MEASURED = ("seconds", "peak_memory")  # of each epoch; no two runs have the same
FLAGS = [
    *TINY_FLAGS,
    *"--batch_size 2 --max_epochs 20 --AdamW --warmup --warmup_period 5".split(),
    *"--base_lr 1e-3 --log_every 3 --save_steps 1".split(),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def write_data(folder: Path) -> Path:
    """Write nine slices of three cases, and base weights; return `folder`."""
    torch.save(tiny_sam(num_classes=8).state_dict(), folder / "base.pth")
    return write_slices(folder, count=3, cases=3)


def flags_of(data: Path, output: Path, *more: str) -> list[str]:
    """Return flags that train every weight; a state has 86 MB, and a signal often meets a save."""
    return ["--root_path", str(data), "--output", str(output), *FLAGS, *more]


def small_flags_of(data: Path, output: Path, *more: str) -> list[str]:
    """Return flags that train only low-rank updates; a state has 5 MB."""
    small = ["--ckpt", str(data / "base.pth"), "--module", "sam_lora_image_encoder_mask_decoder"]
    return flags_of(data, output, *small, *more)


def step_of(output: Path) -> int:
    """Return the last step that a run has saved; 0 before the first."""
    names = [path.name for path in output.glob(f"*/{STATES}/step_*.pth")]
    return max((int(name.split("-")[0].removeprefix("step_")) for name in names), default=0)


def folder_of(output: Path) -> Path:
    (folder,) = output.iterdir()
    return folder


def wait_for_step(output: Path, step: int, alive: Callable[[], bool]) -> None:
    started = time.monotonic()
    while step_of(output) < step and alive():
        assert time.monotonic() - started < 60, "no progress"
        time.sleep(0.002)


def what_it_left(output: Path) -> tuple[dict[str, str], list[dict]]:
    """Return the hashes of the adapters, and all records of metrics.jsonl without the times."""
    folder = folder_of(output)
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    measured = [{k: v for k, v in record.items() if k not in MEASURED} for record in records]
    return {path.name: sha256_of(path) for path in folder.glob("*.pth")}, measured


def assert_equal_runs(found: Path, expected: Path) -> None:
    hashes, measured = what_it_left(found)
    other_hashes, other_measured = what_it_left(expected)
    assert measured == other_measured
    assert hashes == other_hashes and hashes
    assert not list(folder_of(found).rglob(".*.partial.*"))


@pytest.mark.parametrize(
    ("kills", "ranks", "flags", "more"),
    [
        # test_power_cut.py ends runs at chosen calls of the disk, these at any other moment.
        (7, 1, flags_of, ("--stop_epoch", "4", "--val_every", "2")),
        (3, 1, small_flags_of, ("--stop_epoch", "3", "--num_workers", "2")),
        (3, 2, small_flags_of, ("--stop_epoch", "3")),
    ],
    ids=["alone", "with workers", "two processes"],
)
def test_a_run_killed_at_random_steps_ends_as_if_never_killed(
    kills: int,
    ranks: int,
    flags: Callable[..., list[str]],
    more: tuple[str, ...],
    data: Path,
    tmp_path: Path,
):
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    again = flags(data, killed, *more, "--resume", "auto")
    assert processes.run(flags(data, whole, *more), log, ranks) == [0] * ranks
    rng = random.Random(0)
    target = 0
    for _ in range(kills):
        started = processes.start(again, log, ranks)
        target += rng.choice([1, 1, 2])
        wait_for_step(killed, target, started[0].is_alive)
        time.sleep(rng.random() * 0.05)
        victim = rng.choice(started)
        assert victim.is_alive(), "it ended before it was killed: too few steps for so many kills"
        victim.kill()
        for process in started:  # the other ranks notice the loss and end
            process.join(timeout=60)
            assert process.exitcode not in (None, 0)
        target = max(target, step_of(killed))
    assert processes.run(again, log, ranks) == [0] * ranks, log.read_text()
    assert_equal_runs(killed, whole)
    # Another start finds nothing to do and changes nothing.
    assert processes.run(again, log, ranks)[0] == 0
    assert_equal_runs(killed, whole)


SELDOM_SAVED = ("--stop_epoch", "2", "--save_steps", "1000")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that gets no signal."""
    output = tmp_path_factory.mktemp("whole")
    log = output.with_suffix(".log")
    assert processes.run(small_flags_of(data, output, *SELDOM_SAVED), log) == [0]
    return output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_and_a_resumed_run_equals_an_uninterrupted_one(
    number: signal.Signals, data: Path, whole: Path, tmp_path: Path
):
    stopped, log = tmp_path / "stopped", tmp_path / "log"
    (process,) = processes.start(small_flags_of(data, stopped, *SELDOM_SAVED), log)
    wait_for_step(stopped, 5, process.is_alive)  # the epoch ends here
    os.kill(process.pid, number)
    process.join(timeout=60)
    assert process.exitcode == EXIT_INTERRUPTED, log.read_text()
    assert "finishing the step and saving" in log.read_text()
    assert processes.run(["--resume", str(folder_of(stopped))], log) == [0]
    assert_equal_runs(stopped, whole)


def test_a_second_signal_ends_at_once(data: Path, tmp_path: Path):
    log = tmp_path / "log"
    argv = flags_of(data, tmp_path / "out", "--stop_epoch", "20")
    (process,) = processes.start(argv, log, before=processes.slow_to_save_when_asked)
    wait_for_step(tmp_path / "out", 2, process.is_alive)
    os.kill(process.pid, signal.SIGTERM)
    # Two signals at the same moment would count once.
    while "again to end at once" not in log.read_text():
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)
    # A signal that follows at once is the same request, passed on by another process.
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=ONE_REQUEST + 1)
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGTERM
    assert newest_state(folder_of(tmp_path / "out"))["progress"]["step"] >= 2


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, five steps each."""
    output = tmp_path_factory.mktemp("finished")
    train.main(small_flags_of(data, output, "--stop_epoch", "2"))
    return output


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    return Path(shutil.copytree(folder_of(finished), tmp_path / "out" / folder_of(finished).name))


@pytest.mark.parametrize("how", ["truncated", "bit flipped", "empty"])
def test_a_damaged_state_is_skipped_for_an_older_state(
    how: str, run_folder: Path, finished: Path, capsys: pytest.CaptureFixture
):
    newest = saved_states(run_folder)[0]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    damaged = {
        "truncated": content[: len(content) // 3],
        "bit flipped": content,
        "empty": b"",
    }
    newest.write_bytes(damaged[how])
    train.main(["--resume", str(run_folder)])
    assert_equal_runs(run_folder.parent, finished)


def test_a_run_whose_states_are_all_damaged_is_refused_every_time(run_folder: Path):
    for path in saved_states(run_folder):
        path.write_bytes(b"")
    measured = (run_folder / "metrics.jsonl").read_bytes()
    for _ in range(2):  # torchrun and SLURM try again automatically
        with pytest.raises(InputError, match="every saved state"):
            train.main(["--resume", str(run_folder)])
    assert (run_folder / "metrics.jsonl").read_bytes() == measured


def test_only_the_newest_states_are_kept(run_folder: Path):
    assert [path.name[:12] for path in saved_states(run_folder)] == ["step_0000010", "step_0000009"]


def test_a_raised_stop_epoch_gives_the_same_as_one_raised_from_the_start(
    run_folder: Path, data: Path, tmp_path: Path
):
    train.main(["--resume", str(run_folder), "--stop_epoch", "3"])
    train.main(small_flags_of(data, tmp_path / "whole", "--stop_epoch", "3"))
    hashes, measured = what_it_left(run_folder.parent)
    whole_hashes, whole_measured = what_it_left(tmp_path / "whole")
    assert measured == whole_measured
    assert hashes["epoch_2.pth"] == whole_hashes["epoch_2.pth"]


def test_best_is_the_same_after_a_raised_stop_epoch(data: Path, tmp_path: Path):
    more = ("--val_every", "2")
    train.main(small_flags_of(data, tmp_path / "part", *more, "--stop_epoch", "3"))
    folder = folder_of(tmp_path / "part")
    train.main(["--resume", str(folder), "--stop_epoch", "5"])
    train.main(small_flags_of(data, tmp_path / "whole", *more, "--stop_epoch", "5"))
    hashes, measured = what_it_left(tmp_path / "part")
    whole_hashes, whole_measured = what_it_left(tmp_path / "whole")
    assert measured == whole_measured
    assert hashes["best.pth"] == whole_hashes["best.pth"]


def test_raised_iterations_resume_in_the_middle_of_an_epoch(data: Path, tmp_path: Path):
    train.main(small_flags_of(data, tmp_path / "part", "--max_iterations", "7"))
    train.main(["--resume", str(folder_of(tmp_path / "part")), "--max_iterations", "12"])
    train.main(small_flags_of(data, tmp_path / "whole", "--max_iterations", "12"))
    hashes, measured = what_it_left(tmp_path / "part")
    whole_hashes, whole_measured = what_it_left(tmp_path / "whole")
    assert measured == whole_measured
    assert hashes["epoch_2.pth"] == whole_hashes["epoch_2.pth"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base_lr", "0.1"], "--base_lr 0.001 → 0.1"),
        (["--max_epochs", "30"], "schedule depends on --max_epochs"),
        (["--batch_size", "3"], "--global_batch 2 → 3"),
        (["--seed", "1", "--rank", "3"], "--rank 2 → 3, --seed 1234 → 1"),
        (["--no_augment"], "--augment samed → none"),
    ],
)
def test_other_settings_are_refused(flags: list[str], message: str, run_folder: Path):
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    with pytest.raises(InputError) as caught:
        train.main(["--resume", str(run_folder), *flags])
    assert message in str(caught.value)
    assert before == {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}


def test_other_data_under_the_same_flags_are_another_run(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    flags = small_flags_of(moved, run_folder.parent, "--stop_epoch", "2", "--resume", "auto")
    train.main(flags)
    assert len(list(run_folder.parent.iterdir())) == 1  # the same slices in another folder
    names = (moved / "lists" / "train.txt").read_text().splitlines()
    (moved / "lists" / "train.txt").write_text("\n".join(names[:-3]))
    with pytest.raises(InputError, match=r"data 9 slices \w+ → 6 slices"):
        train.main(["--resume", str(run_folder), "--root_path", str(moved)])
    train.main([*flags, "--stop_epoch", "1"])
    assert len(list(run_folder.parent.iterdir())) == 2
    assert "differs in data 9 slices" in capsys.readouterr().err


def test_base_weights_may_move_but_not_change(data: Path, tmp_path: Path):
    for name, seed in (("base", 0), ("other", 1)):
        torch.manual_seed(seed)
        torch.save(tiny_sam(num_classes=8).state_dict(), tmp_path / f"{name}.pth")
    output = tmp_path / "out"
    flags = [*small_flags_of(data, output, "--max_iterations", "2"), "--ckpt"]
    train.main([*flags, str(tmp_path / "base.pth")])
    (tmp_path / "base.pth").rename(tmp_path / "moved.pth")
    for resume in ("auto", str(folder_of(output))):
        train.main([*flags, str(tmp_path / "moved.pth"), "--resume", resume])
    with pytest.raises(InputError, match="weights "):
        train.main([*flags, str(tmp_path / "other.pth"), "--resume", str(folder_of(output))])


def change_labels(data: Path) -> None:
    """Mirror the label of a slice; the number of pixels of each class stays."""
    path = sorted((data / "train_npz").iterdir())[0]
    with np.load(path) as arrays:
        np.savez(path, image=arrays["image"], label=arrays["label"][::-1])


def change_order(data: Path) -> None:
    path = data / "lists" / "train.txt"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))


def change_a_block(data: Path) -> None:
    """Change base weights outside the neck, which is all that version 1.0 looked at."""
    state = torch.load(data / "base.pth", weights_only=True)
    state["image_encoder.blocks.0.mlp.lin1.weight"] += 1
    torch.save(state, data / "base.pth")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_labels, r"data \(labels\) \w+ → \w+"),
        (change_order, r"data \(order\) \w+ → \w+"),
        (change_a_block, r"weights \w+ → \w+"),
    ],
)
def test_what_decides_the_numbers_cannot_change_unseen(
    change: Callable[[Path], None], told: str, run_folder: Path, data: Path, tmp_path: Path
):
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    change(moved)
    before = files_of(run_folder)
    flags = small_flags_of(moved, run_folder.parent, "--stop_epoch", "2")
    with pytest.raises(InputError, match=told):
        train.main([*flags, "--resume", str(run_folder)])
    assert files_of(run_folder) == before
    train.main([*flags, "--max_iterations", "1", "--resume", "auto"])
    assert files_of(run_folder) == before and len(list(run_folder.parent.iterdir())) == 2


def files_of(folder: Path) -> dict[Path, bytes]:
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_finished_run_whose_states_are_gone_keeps_its_results(
    run_folder: Path, data: Path, finished: Path
):
    shutil.rmtree(run_folder / STATES)
    before = files_of(run_folder)
    auto = small_flags_of(data, run_folder.parent, "--stop_epoch", "2", "--resume", "auto")
    for argv in (["--resume", str(run_folder)], auto):
        with pytest.raises(
            InputError, match=r"holds results \(epoch_1.pth, metrics.jsonl\) but no"
        ):
            train.main(argv)
        assert files_of(run_folder) == before
    train.main(["--resume", str(run_folder), "--restart"])
    assert_equal_runs(run_folder.parent, finished)
    kept = files_of(run_folder / "before-1")
    assert all(kept[path] == content for path, content in before.items() if path.name != "lock")
    with pytest.raises(InputError, match="--restart needs"):
        train.main([*auto, "--restart"])


def test_restart_begins_an_intact_run_anew_and_can_be_interrupted(run_folder: Path, finished: Path):
    train.main(["--resume", str(run_folder), "--restart", "--max_iterations", "3"])
    assert saved_states(run_folder / "before-1") and step_of(run_folder.parent) == 3
    train.main(["--resume", str(run_folder), "--max_iterations", "10"])
    (run_folder / "epoch_0.pth").unlink()  # of the stop after step 3
    assert_equal_runs(run_folder.parent, finished)


def test_a_run_that_died_before_its_first_state_begins_again(run_folder: Path, finished: Path):
    for path in run_folder.iterdir():
        if path.name not in ("config.json", "log.txt", "lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run_folder / "metrics.jsonl").touch()
    train.main(["--resume", str(run_folder)])
    assert_equal_runs(run_folder.parent, finished)
    assert (run_folder / "check.json").is_file()


@pytest.mark.parametrize("content", [b"", b"\0\0", b"{}", b'[{"a": ' + b"9" * 5000 + b"}]"])
def test_damaged_files_beside_the_states_do_not_stop_a_run(
    content: bytes, run_folder: Path, finished: Path
):
    for name in ("environment.json", "check.json", "check.txt", "curves.png"):
        (run_folder / name).write_bytes(content)
    (run_folder / "epoch_1.pth").unlink()
    train.main(["--resume", str(run_folder)])
    assert (run_folder / "environment.json.damaged").read_bytes() == content
    assert len(json.loads((run_folder / "environment.json").read_text())) == 1
    assert_equal_runs(run_folder.parent, finished)


@pytest.mark.parametrize("how", ["gone", "emptied", "not JSON"])
def test_a_damaged_log_is_told_and_the_run_goes_on(how: str, run_folder: Path, capsys):
    log = run_folder / "metrics.jsonl"
    if how == "gone":
        log.unlink()
    else:
        log.write_bytes(b"" if how == "emptied" else b"\0" * log.stat().st_size)
    train.main(["--resume", str(run_folder), "--stop_epoch", "3"])
    assert "metrics.jsonl was shortened or edited" in capsys.readouterr().err
    lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
    steps = [record["step"] for record in map(json.loads, lines) if "loss" in record]
    assert steps == list(range(10, 15))
    assert (run_folder / "epoch_2.pth").is_file()


def test_a_lost_best_adapter_is_told(data: Path, tmp_path: Path, capsys):
    train.main(small_flags_of(data, tmp_path, "--stop_epoch", "2", "--val_every", "1"))
    folder = folder_of(tmp_path)
    (folder / "best.pth").unlink()
    train.main(["--resume", str(folder)])
    assert "best.pth of epoch 0 is gone" in capsys.readouterr().err


@pytest.mark.parametrize("content", [{"progress": {"step": 99}}, {"model": {}}, [1, 2]])
def test_a_state_of_another_program_is_refused(content: object, run_folder: Path):
    save_tensors(content, run_folder / STATES / "step_0000099.pth", hash_in_name=True)
    with pytest.raises(InputError, match="belongs to another network or program"):
        train.main(["--resume", str(run_folder)])


@pytest.mark.parametrize(
    ("before", "after"), [((2, 1), (1, 1)), ((1, 1), (2, 1)), ((1, 1), (1, 2))]
)
def test_a_run_goes_on_with_other_numbers_of_processes_or_threads(
    before: tuple[int, int], after: tuple[int, int], data: Path, tmp_path: Path
):
    argv = ["--base_lr", "1e-4", "--max_iterations"]
    losses = {}
    for name, first in (("mixed", before), ("whole", after)):
        output, log = tmp_path / name, tmp_path / f"{name}.log"
        for (ranks, threads), steps in ((first, "3"), (after, "6")):
            flags = [*small_flags_of(data, output, *argv, steps), "--resume", "auto"]
            how = processes.on_two_threads if threads == 2 else None
            started = processes.start(flags, log, ranks, before=how)
            for process in started:
                process.join(timeout=120)
            assert [process.exitcode for process in started] == [0] * ranks, log.read_text()
        _, records = what_it_left(output)
        losses[name] = [record["loss"] for record in records if "loss" in record]
        told = "equal up to rounding" in log.read_text()
        assert told == (name == "mixed")
    assert len(losses["mixed"]) == 6
    assert losses["mixed"] == pytest.approx(losses["whole"], rel=1e-3)


def test_auto_starts_afresh_where_nothing_fits(run_folder: Path, data: Path):
    output = run_folder.parent
    train.main(small_flags_of(data, output, "--stop_epoch", "1", "--seed", "7", "--resume", "auto"))
    assert len(list(output.iterdir())) == 2


def test_two_runs_cannot_write_into_one_folder(run_folder: Path, tmp_path: Path):
    (process,) = processes.start(
        ["--resume", str(run_folder), "--stop_epoch", "20"], tmp_path / "log"
    )
    wait_for_step(run_folder.parent, 12, process.is_alive)
    with pytest.raises(InputError, match="another process is training"):
        train.main(["--resume", str(run_folder), "--stop_epoch", "20"])
    process.kill()
    process.join()
    torch.manual_seed(0)
    train.main(["--resume", str(run_folder), "--stop_epoch", "4"])  # a dead process holds no lock


@pytest.mark.parametrize("what", ["nowhere", "file"])
def test_no_run_to_resume(what: str, tmp_path: Path):
    (tmp_path / "file").write_text("{}")
    with pytest.raises(InputError):
        train.main(["--resume", str(tmp_path / what)])
