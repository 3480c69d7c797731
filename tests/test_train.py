"""`train.py` with a small network: the files it writes, its flags, refused input."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, write_slices

import train
from common.errors import InputError
from config.flags import test_parser as parser_of_test
from config.flags import train_parser
from config.run_folder import CONTENT
from config.settings import parse_args
from lora.adapter_file import read_adapter
from utils import build_model, environment

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five slices, so that the last batch of 2 holds a single slice."""
    return write_slices(tmp_path / "data")


def run(data: Path, output: Path, *flags: str) -> Path:
    """Train a tiny network and return the run folder."""
    train.main(["--root_path", str(data), "--output", str(output), *TINY_FLAGS, *flags])
    return max(output.iterdir(), key=lambda path: path.stat().st_mtime_ns)


SHORT = ["--batch_size", "2", "--max_epochs", "2", "--stop_epoch", "2", "--base_lr", "1e-3"]


def lines(run_folder: Path, key: str) -> list[dict]:
    """Return the records of metrics.jsonl that hold `key`."""
    records = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if key in record]


def test_a_run_writes_everything_needed_to_repeat_and_test_it(data: Path, tmp_path: Path):
    folder = run(data, tmp_path / "out", *SHORT, "--warmup", "--warmup_period", "3", "--AdamW")
    steps = lines(folder, "loss")
    assert [record["step"] for record in steps] == list(range(6))  # 3 in each epoch
    assert [record["epoch"] for record in steps] == [0, 0, 0, 1, 1, 1]
    assert all(np.isfinite(record["loss"]) for record in steps)
    assert {"log.txt", "config.json", "environment.json", "epoch_1.pth", "log"} <= {
        path.name for path in folder.iterdir()
    }
    assert list((folder / "log").glob("events*"))

    config = json.loads((folder / "config.json").read_text())
    assert config["img_size"] == 64 and config["base_lr"] == 1e-3 and config["optimizer"] == "adamw"
    again = parse_args(train_parser(), ["--config", str(folder / "config.json")])
    once = ("at_once", "config", "resume", "restart", "check", "same_code", "code", "trained_on")
    flags = {k: v for k, v in config.items() if k not in CONTENT}
    assert {k: v for k, v in vars(again).items() if k not in once} == flags
    assert config["data"]["slices"].startswith("5 slices ")
    assert config["weights"] == "none"

    repeated = tmp_path / "again"
    train.main(["--config", str(folder / "config.json"), "--output", str(repeated)])
    assert lines(next(repeated.iterdir()), "loss") == steps


def test_runs_do_not_overwrite_each_other(data: Path, tmp_path: Path):
    short = [*SHORT, "--max_iterations", "1"]
    folders = {run(data, tmp_path / "out", *short).name for _ in range(2)}
    folders.add(run(data, tmp_path / "out", *short, "--AdamW").name)
    folders.add(run(data, tmp_path / "out", *short, "--dice_param", "0.5").name)
    assert len(folders) == 4


def test_training_learns(tmp_path: Path):
    data = write_slices(tmp_path / "data", count=60)  # twelve steps between two saves
    flags = ["--batch_size", "5", "--max_epochs", "5", "--stop_epoch", "5", "--base_lr", "1e-3"]
    folder = run(data, tmp_path / "out", *flags, "--AdamW", "--no_augment")
    losses = [record["loss"] for record in lines(folder, "loss")]
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])


def test_batch_of_one_and_max_iterations(data: Path, tmp_path: Path):
    flags = ["--batch_size", "1", "--max_iterations", "3"]
    folder = run(data, tmp_path, *flags)
    assert len(lines(folder, "loss")) == 3
    assert (folder / "epoch_0.pth").is_file()


def test_stop_epoch_ends_before_the_schedule(data: Path, tmp_path: Path):
    long = run(data, tmp_path, "--batch_size", "5", "--max_epochs", "9", "--stop_epoch", "2")
    rates = [record["lr"] for record in lines(long, "lr")]
    assert len(rates) == 2 and rates == pytest.approx([0.005, 0.005], rel=1e-9)
    assert (long / "epoch_1.pth").is_file()


@pytest.mark.parametrize(
    ("flags", "warned"),
    [(["--max_epochs", "1", "--stop_epoch", "5"], True), (["--max_epochs", "1"], False)],
)
def test_a_stop_epoch_beyond_the_schedule_is_reported(
    flags: list[str], warned: bool, data: Path, tmp_path: Path
):
    folder = run(data, tmp_path, "--batch_size", "5", *flags)
    log = (folder / "log.txt").read_text()
    assert ("--stop_epoch 5 is beyond the schedule: --max_epochs 1 is trained" in log) == warned


def test_the_environment_names_versions_command_and_the_device_in_use(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", "train.py", "--output", "my runs"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    found = environment(torch.device("cuda", 1))
    assert found["command"] == "python train.py --output 'my runs'"
    assert found["gpu"] == "GPU cuda:1"
    assert environment()["gpu"] == "GPU None"  # the current device
    assert environment(torch.device("cpu"))["gpu"] is None
    for package in ("torch", "numpy", "scipy", "h5py", "SimpleITK", "nibabel"):
        assert found[package] == version(package)


def test_a_constant_slice_can_be_drawn(data: Path, tmp_path: Path):
    for path in (data / "train_npz").iterdir():
        np.savez(path, image=np.full((40, 40), 0.5, "f4"), label=np.zeros((40, 40), "f4"))
    folder = run(data, tmp_path / "out", "--batch_size", "5", "--max_iterations", "1")
    assert np.isfinite(lines(folder, "loss")[0]["loss"])


@pytest.mark.parametrize("module", ["image_encoder", "image_encoder_mask_decoder"])
def test_a_network_trained_from_scratch_needs_only_its_adapter_file(
    data: Path, tmp_path: Path, module: str
):
    flags = ["--batch_size", "5", "--max_iterations", "2", "--AdamW"]
    folder = run(data, tmp_path / "out", *flags, "--module", f"sam_lora_{module}")
    adapter = str(folder / "epoch_1.pth")
    args = parse_args(parser_of_test(), ["--lora_ckpt", adapter, "--volume_path", "x"])
    assert (args.vit_name, args.img_size, args.rank, args.num_classes) == ("vit_tiny", 64, 2, 8)
    torch.manual_seed(5)
    first, _ = build_model(args, torch.device("cpu"))
    torch.manual_seed(6)
    second, _ = build_model(args, torch.device("cpu"))
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(first.eval()(images)["masks"], second.eval()(images)["masks"])
    assert read_adapter(adapter)[1]["class_names"][4] == "liver"

    flags = ["--batch_size", "5", "--max_iterations", "1", "--lora_ckpt", adapter]
    tuned = run(data, tmp_path / "tuned", *flags, "--module", f"sam_lora_{module}")
    assert "tuned" in tuned.name


@pytest.mark.parametrize("flag", ["--use_amp", "--tf32"])
def test_speed_flags_run_on_a_cpu(flag: str, data: Path, tmp_path: Path):
    folder = run(data, tmp_path, "--batch_size", "5", "--max_iterations", "2", flag)
    assert all(np.isfinite(record["loss"]) for record in lines(folder, "loss"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--root_path", "nowhere"], "nowhere does not exist"),
        (["--list_dir", "nowhere"], "nowhere/train.txt does not exist"),
        (["--vit_name", "vit_b", "--ckpt", "no.pth"], "SHA-256 ec2df627"),
        (["--lora_ckpt", "no.pth"], "no.pth does not exist"),
        (["--config", "no.json"], "no.json does not exist"),
        (["--img_size", "100"], "multiple of 16"),
        (["--rank", "0"], "--rank is 0"),
        (["--batch_size", "0"], "--batch_size is 0"),
        (["--dice_param", "1.5"], "--dice_param is 1.5"),
        (["--base_lr", "-1"], "--base_lr is -1"),
        (["--base_lr", "nan"], "--base_lr is nan"),
        (["--lr_exp", "inf"], "--lr_exp is inf"),
        (["--dice_param", "nan"], "--dice_param is nan"),
        (["--save_minutes", "inf"], "--save_minutes is inf"),
        (["--clip_grad", "-1"], "--clip_grad is -1"),
        (["--clip_grad", "0"], "--clip_grad is 0"),
        (["--clip_grad", "nan"], "--clip_grad is nan"),
        (["--clip_grad", "inf"], "--clip_grad is inf"),
        (["--num_classes", "0"], "--num_classes is 0"),
        (["--num_classes", "4"], "label values"),
        (["--dataset", "Unknown"], "unknown data set 'Unknown'"),
        (["--module", "nothing_here"], "--module nothing_here"),
        (["--module", "utils"], "no class LoRA_Sam"),
        (["--device", "cuda:99"], "--device"),
        (["--device", "toaster"], "--device"),
        (["--seed", "-1"], "--seed"),
        (["--num_workers", "-1"], "--num_workers"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(
    flags: list[str], message: str, data: Path, tmp_path: Path
):
    with pytest.raises(InputError) as caught:
        run(data, tmp_path / "out", *SHORT, *flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


class Exploit:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("flag", ["--ckpt", "--lora_ckpt"])
def test_a_pickle_is_refused_and_not_executed(flag: str, data: Path, tmp_path: Path):
    torch.save({"w_a_000": Exploit(tmp_path / "executed")}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="more than plain tensors"):
        run(data, tmp_path / "out", *SHORT, flag, str(tmp_path / "evil.pth"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"rank": "4"}', '{"AdamW": 1}', '{"vit_name": "v"}']
)
def test_a_bad_config_is_refused(content: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="config"):
        parse_args(train_parser(), ["--config", str(tmp_path / "config.json"), "--root_path", "x"])


def test_the_command_line_wins_over_the_config(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"rank": 6, "base_lr": 1, "img_size": 320, "new": 1}')
    argv = ["--config", str(tmp_path / "config.json"), "--root_path", "x", "--rank", "5"]
    args = parse_args(train_parser(), argv)
    assert (args.rank, args.base_lr, args.img_size, args.warmup_period) == (5, 1, 320, 250)


def test_speed_flags_of_training_do_not_apply_to_testing(data: Path, tmp_path: Path):
    folder = run(data, tmp_path, "--batch_size", "5", "--max_iterations", "1", "--use_amp")
    args = parse_args(parser_of_test(), ["--config", str(folder)])
    assert args.img_size == 64 and args.batch_size is None and args.use_amp is False


def test_the_program_exits_with_2_and_one_line(tmp_path: Path):
    command = [sys.executable, str(REPOSITORY / "train.py"), "--root_path", str(tmp_path / "no")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
