"""Files that version 1.0 wrote still work: prepared data, adapters, a run that was stopped.

`tests/files_of_1_0/README.md` describes the files and how they were made.
"""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_sam
from golden_rule import assert_golden

import test as test_program
import train
from common.tensors import save_tensors
from config.flags import predict_parser
from config.flags import test_parser as parser_of_test
from config.settings import class_names, parse_args
from evaluation.test_runs import read_json
from tools import adapter
from utils import build_model

pytestmark = pytest.mark.slow

FILES = Path(__file__).parent / "files_of_1_0"
MODULES = {
    "encoder": "sam_lora_image_encoder",
    "decoder": "sam_lora_image_encoder_mask_decoder",
}
ADAPTERS = ["adapter.pth", "adapter.safetensors"]
PATTERN = torch.from_numpy(np.random.default_rng(0).standard_normal(1021))


def patterned(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the values that the tensor of this name has in the files: one pattern, repeated."""
    if name.endswith("weight") and tensor.ndim == 1:  # the scale of a normalisation
        return torch.ones_like(tensor)
    repeated = PATTERN.repeat(-(-tensor.numel() // len(PATTERN)))[: tensor.numel()]
    scale = max(1, tensor[0].numel()) ** -0.5
    return (repeated * scale).to(tensor.dtype).view(tensor.shape)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files without their compression, and the base weights `base.pth`."""
    folder = tmp_path_factory.mktemp("unpacked") / "files"
    shutil.copytree(FILES, folder)
    for packed in folder.rglob("*.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    base = {name: patterned(name, value) for name, value in tiny_sam(64, 1).state_dict().items()}
    save_tensors(base, folder / "base.pth")
    return folder


@pytest.fixture
def folder(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files in the current folder, because the paths in config.json are relative."""
    shutil.copytree(unpacked, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_of(folder: Path, variant: str) -> Path:
    """Return the run folder of a variant, relative to `folder`."""
    (config,) = folder.glob(f"{variant}/*/config.json")
    return config.parent.relative_to(folder)


def losses_of(run: Path) -> list[float]:
    """Return the losses of all steps in metrics.jsonl."""
    records = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("variant", MODULES)
@pytest.mark.parametrize("file", ADAPTERS)
def test_an_adapter_gives_the_recorded_logits(unpacked: Path, variant: str, file: str):
    path = str(unpacked / variant / file)
    argv = ["--lora_ckpt", path, "--ckpt", str(unpacked / "base.pth")]
    model, _ = build_model(parse_args(parser_of_test(), argv), torch.device("cpu"))
    model.eval()
    images = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    with torch.no_grad():
        logits = model(images)["low_res_logits"]
    assert_golden(logits, np.load(FILES / variant / "logits.npy"))


@pytest.mark.parametrize("variant", MODULES)
@pytest.mark.parametrize("file", ADAPTERS)
def test_an_adapter_is_shown_with_its_settings(
    unpacked: Path, capsys: pytest.CaptureFixture[str], variant: str, file: str
):
    adapter.main(["show", str(unpacked / variant / file)])
    lines = capsys.readouterr().out.splitlines()
    assert {f"variant: {MODULES[variant]}", "rank: 2", "classes: 1: liver"} <= set(lines)


@pytest.mark.parametrize("variant", MODULES)
@pytest.mark.parametrize("file", ADAPTERS)
def test_test_and_predict_take_their_settings_from_an_adapter(
    unpacked: Path, variant: str, file: str
):
    path = ["--lora_ckpt", str(unpacked / variant / file)]
    for args in (
        parse_args(parser_of_test(), [*path, "--volume_path", str(unpacked / "data")]),
        parse_args(predict_parser(), [*path, "--input", "scan.nii.gz", "--output", "out"]),
    ):
        network = (args.vit_name, args.img_size, args.num_classes, args.rank, args.module)
        assert network == ("vit_tiny", 64, 1, 2, MODULES[variant])
        assert class_names(args) == ["liver"]
        assert args.spec["intensity"] == {"rule": "window", "low": -125.0, "high": 275.0}


@pytest.mark.parametrize("variant", MODULES)
def test_a_stopped_run_goes_on_and_its_result_can_be_tested(folder: Path, variant: str):
    run = run_of(folder, variant)
    expected = json.loads((folder / variant / "losses.json").read_text("utf-8"))
    assert losses_of(run) == expected[:2]
    train.main(["--resume", str(run), "--max_iterations", "4"])
    assert losses_of(run) == pytest.approx(expected, rel=5e-5)
    test_program.main(["--config", str(run), "--volume_path", "data"])
    (result,) = read_json(run / "test" / "results.json").results
    assert result.case == "s1"


@pytest.mark.parametrize("variant", MODULES)
def test_the_configuration_of_a_run_repeats_it(folder: Path, variant: str):
    run = run_of(folder, variant)
    train.main(["--config", str(run), "--output", "again"])
    (again,) = Path("again").iterdir()
    assert losses_of(again) == pytest.approx(losses_of(run), rel=5e-5)


def test_prepared_data_are_checked_and_tested(folder: Path, capsys: pytest.CaptureFixture[str]):
    network = ["--vit_name", "vit_tiny", "--img_size", "64", "--ckpt", "base.pth"]
    train.main(["--root_path", "data", "--check", "--device", "cpu", *network])
    page = capsys.readouterr().out
    expected = (folder / run_of(folder, "encoder") / "check.txt").read_text("utf-8")
    class_rows = [line for line in expected.splitlines() if line.startswith("    ")]
    assert len(class_rows) == 2 and all(row in page for row in class_rows)
    flags = ["--volume_path", "data", "--ckpt", "base.pth", "--device", "cpu"]
    test_program.main([*flags, "--lora_ckpt", "encoder/adapter.pth", "--output_dir", "result"])
    (result,) = read_json(Path("result") / "results.json").results
    assert result.case == "s1"
