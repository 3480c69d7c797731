"""Training gives the same result on one process, on several, and with a batch in parts."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from conftest import TINY_FLAGS, tiny_model, tiny_sam, write_slices
from test_datasets import write_volume_h5
from test_predict import SPEC, make_adapter, marked
from test_resume import step_of, wait_for_step
from test_scans import placed

import predict
import test as test_program
from common.tensors import load_tensors
from datasets.scans.volumes import write_volume
from distributed.signals import EXIT_INTERRUPTED
from trainer import StepOptions, freeze_unreached, make_optimizer, training_step
from training.losses import SegmentationLoss

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_python")]

# 127.0.0.1, as Linux shows it, also as an address of IPv6.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven slices and base weights. With batches of 4 the last has 3 slices: uneven shares."""
    data = write_slices(tmp_path_factory.mktemp("data"), count=7)
    torch.save(tiny_sam(num_classes=8).state_dict(), data / "base.pth")
    return data


def trained(data: Path, output: Path, ranks: int, *flags: str) -> tuple[list[dict], dict]:
    """Train, and return the records of the steps and the last adapter."""
    argv = ["--root_path", str(data), "--output", str(output), *TINY_FLAGS]
    argv += ["--ckpt", str(data / "base.pth"), *flags]
    log = output.with_suffix(".log")
    assert processes.run(argv, log, ranks) == [0] * ranks, log.read_text()
    (folder,) = output.iterdir()
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    state = load_tensors(max(folder.glob("epoch_*.pth")))
    return [record for record in records if "loss" in record], state


TOLERANCE = 1e-4  # of a weight after the steps

# Ways to make updates of 4 slices: name -> number of ranks, flags.
SAME_UPDATES = {
    "one": (1, ("--batch_size", "4")),
    "two": (2, ("--batch_size", "2", "--n_gpu", "2")),
    "three": (3, ("--batch_size", "2", "--global_batch", "4")),
    "parts": (1, ("--batch_size", "3", "--global_batch", "4")),
    "both": (2, ("--batch_size", "1", "--global_batch", "4")),
}


@pytest.mark.parametrize("module", ["image_encoder", "image_encoder_mask_decoder"])
@pytest.mark.parametrize(
    "recipe",
    [
        # SGD steps are proportional to the gradient. AdamW divides by its size, even where the
        # gradient is only rounding: a ReLU that opens in one run alone then gets a full step.
        # Runs on one and on two threads differ in the same way. Hence fewer steps with AdamW.
        ("--max_iterations", "6", "--base_lr", "0.05", "--warmup", "--warmup_period", "3"),
        ("--max_iterations", "5", "--AdamW", "--warmup"),
    ],
    ids=["SGD", "AdamW"],
)
def test_ranks_and_parts_train_as_one_process(
    data: Path, tmp_path: Path, recipe: tuple[str, ...], module: str
):
    common = (*recipe, "--module", f"sam_lora_{module}")
    runs = {
        name: trained(data, tmp_path / name, ranks, *flags, *common)
        for name, (ranks, flags) in SAME_UPDATES.items()
        if "--AdamW" not in recipe or name in ("one", "two", "parts")
    }
    records, weights = runs.pop("one")
    start = load_tensors(data / "base.pth")
    moved = [(v - weights[k]).abs().max() for k, v in start.items() if k in weights]
    assert len(records) == int(recipe[1]) and max(moved) > 2 * TOLERANCE
    for name, (found, other) in runs.items():
        for record, same in zip(records, found, strict=True):
            for key in ("loss", "loss_ce", "loss_dice", "lr"):
                expected = pytest.approx(record[key], abs=1e-5)
                assert same[key] == expected, (name, record["step"], key)
        for key, value in weights.items():
            if isinstance(value, torch.Tensor):
                assert torch.allclose(value, other[key], rtol=0, atol=TOLERANCE), (name, key)


def test_ranks_without_slices_take_part(data: Path, tmp_path: Path):
    records, _ = trained(data, tmp_path / "one", 1, "--batch_size", "2", "--max_iterations", "4")
    flags = ("--batch_size", "1", "--global_batch", "2", "--max_iterations", "4")
    found, _ = trained(data, tmp_path / "three", 3, *flags)
    losses = [[record["loss"] for record in run] for run in (records, found)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_the_gradient_of_parts_is_that_of_the_whole():
    model = tiny_model()
    freeze_unreached(model)
    batch = {
        "image": torch.rand(5, 3, 64, 64),
        "low_res_label": torch.randint(0, 3, (5, 16, 16)),
    }
    gradients = []
    for at_once in (None, 5, 2, 1):
        twin = copy.deepcopy(model)
        optimizer = make_optimizer(twin, "sgd", 0)
        options = StepOptions(at_once=at_once)
        _, logits = training_step(twin, batch, SegmentationLoss(3, 0.8), optimizer, 0, options)
        assert logits.shape == (5, 3, 16, 16) and not logits.requires_grad
        gradients.append([p.grad for p in twin.parameters() if p.requires_grad])
    for other in gradients[1:]:
        for whole, same in zip(gradients[0], other, strict=True):
            atol = 1e-6 * float(whole.abs().max()) + 1e-9
            assert torch.allclose(whole, same, rtol=1e-4, atol=atol)


def killing_rank_1(tmp_path: Path) -> dict[str, str]:
    """Return environment variables that make rank 1 of the first attempt kill itself."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, threading, time, glob, signal\n"
        "def wait():\n"
        f"    while not glob.glob({str(tmp_path / 'out/*/states/step_0000003*')!r}):\n"
        "        time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "first = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0'\n"
        "if os.environ.get('RANK') == '1' and first:\n"
        "    threading.Thread(target=wait, daemon=True).start()\n"
    )
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}


def test_a_dead_rank_ends_the_others_with_a_message_and_auto_resumes(data: Path, tmp_path: Path):
    """train.py starts its ranks by itself."""
    flags = ["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS]
    flags += "--max_iterations 12 --batch_size 2 --processes 2 --save_steps 1".split()
    flags += ["--resume", "auto"]
    command = [sys.executable, str(REPOSITORY / "train.py"), *flags]
    environment = killing_rank_1(tmp_path)
    done, addresses = processes.run_watched(command, env=environment)
    assert addresses <= LOOPBACK
    assert done.returncode == 1, done.stderr
    assert "rank 1 of 2 was killed by signal 9" in done.stderr
    assert "Traceback" not in done.stderr

    # The launcher passes a signal on to the ranks, and every rank finishes its step.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    later = step_of(tmp_path / "out") + 2
    wait_for_step(tmp_path / "out", later, lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED, said
    log = tmp_path / "log"
    assert processes.run(flags, log, ranks=2) == [0, 0], log.read_text()
    (folder,) = (tmp_path / "out").iterdir()
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == list(range(12))
    assert load_tensors(max(folder.glob("epoch_*.pth")))["w_a_000"].isfinite().all()


def test_ranks_end_with_the_process_that_started_them(data: Path, tmp_path: Path):
    """Also when it is killed; training saves its state, and goes on later."""
    flags = ["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS]
    flags += "--max_iterations 100000 --batch_size 2 --processes 2 --save_steps 1".split()
    flags += ["--num_workers", "1"]
    command = [sys.executable, str(REPOSITORY / "train.py"), *flags]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for_step(tmp_path / "out", 2, lambda: process.poll() is None)
    ranks = processes.children(process.pid)
    assert len(ranks) >= 4  # two ranks and their loader processes
    assert processes.listening(process.pid) <= LOOPBACK
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while alive := [rank for rank in ranks if Path(f"/proc/{rank}/exe").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def test_torchrun_starts_dead_ranks_again_and_they_go_on(data: Path, tmp_path: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "--max_restarts", "1", str(REPOSITORY / "train.py")]
    command += ["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS]
    command += ["--max_iterations", "8", "--batch_size", "2", "--save_steps", "1"]
    environment = killing_rank_1(tmp_path)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "out").iterdir()
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in records if "loss" in record] == list(range(8))
    starts = json.loads((folder / "environment.json").read_text())
    assert len(starts) == 2 and "going on after step" in (folder / "log.txt").read_text()


def test_several_ranks_print_an_error_once(data: Path, tmp_path: Path):
    command = [sys.executable, str(REPOSITORY / "train.py"), "--root_path", str(data), *TINY_FLAGS]
    command += ["--ckpt", str(tmp_path / "nowhere.pth"), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--processes", "2"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: base weights") and str(tmp_path / "nowhere.pth") in line
    assert not (tmp_path / "out").exists()


def test_ranks_share_the_scans_and_a_bad_scan_does_not_stop_the_rest(tmp_path: Path):
    adapter = make_adapter(tmp_path, replace(SPEC, orientation=None))
    (tmp_path / "in").mkdir()
    for name in "abcd":
        write_volume(tmp_path / "in" / f"{name}.nii.gz", marked((3, 20, 24))[0], placed("LPS"))
    (tmp_path / "in" / "b.nii.gz").write_bytes(b"junk")
    flags = ["--input", str(tmp_path / "in"), "--lora_ckpt", str(adapter), "--device", "cpu"]
    log = tmp_path / "log"
    alone = processes.run([*flags, "--output", str(tmp_path / "one")], log, program=predict.main)
    command = [sys.executable, str(REPOSITORY / "predict.py"), *flags]
    command += ["--output", str(tmp_path / "two"), "--processes", "2"]
    done, addresses = processes.run_watched(command)
    assert addresses <= LOOPBACK
    for code, told in ((alone[0], log.read_text()), (done.returncode, done.stderr)):
        assert code == 3, told
        assert "error: b: " in told and "Traceback" not in told
    for name in ("a.nii.gz", "c.nii.gz", "d.nii.gz", "volumes.csv", "labels.txt"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_ranks_share_the_volumes_and_the_report_is_that_of_one_process(tmp_path: Path):
    """Three volumes on one, two and four processes; the fourth has nothing to do."""
    data = tmp_path / "data"
    cases = ["case0001", "case0002", "case0003"]
    for case in cases:
        write_volume_h5(data, case)
    (data / "lists").mkdir(exist_ok=True)
    (data / "lists" / "test_vol.txt").write_text("".join(f"{case}\n" for case in cases))
    tiny_model(num_classes=8).save_lora_parameters(
        tmp_path / "adapter.pth",
        settings={"vit_name": "vit_tiny", "img_size": 64, "num_classes": 8},
    )
    torch.save(tiny_sam(num_classes=8).state_dict(), tmp_path / "base.pth")
    reports = []
    for count in (1, 2, 4):
        output = tmp_path / str(count)
        flags = ["--volume_path", str(data), "--lora_ckpt", str(tmp_path / "adapter.pth")]
        flags += ["--ckpt", str(tmp_path / "base.pth"), "--output_dir", str(output), "--is_savenii"]
        flags += ["--device", "cpu"]
        if count == 2:  # test.py starts its ranks by itself
            command = [sys.executable, str(REPOSITORY / "test.py"), *flags, "--processes", "2"]
            done, addresses = processes.run_watched(command)
            assert done.returncode == 0, done.stderr
            assert addresses <= LOOPBACK
        else:
            log = tmp_path / f"{count}.log"
            codes = processes.run(flags, log, count, program=test_program.main)
            assert codes == [0] * count, log.read_text()
        reports.append((output / "results.csv").read_text())
        assert len(list((output / "predictions").glob("*_pred.nii.gz"))) == 3
    assert reports[0] == reports[1] == reports[2]
    assert all(case in reports[0] for case in cases)
