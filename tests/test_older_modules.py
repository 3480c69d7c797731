"""A LoRA module in the original's style runs through the programs, and equals the one here."""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, randomise_updates, tiny_sam, write_slices
from test_datasets import change_slice, write_volume_h5

import sam_lora_image_encoder
import test as test_program
import train
from common.errors import InputError
from lora.adapter_file import read_adapter
from lora.older_module import OlderModule, as_lora_model
from trainer import trainer_synapse
from training.losses import SegmentationLoss

SCRIPTS = Path(__file__).parent / "older_scripts"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch):
    """Make the module importable, as if it lay at the top level."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr("lora.variants.FOLDERS", (SCRIPTS.parent.parent, SCRIPTS))
    yield
    sys.modules.pop("older_lora", None)


def older_model(rank: int = 2, **kwargs: int) -> OlderModule:
    import older_lora

    return as_lora_model(older_lora.LoRA_Sam(tiny_sam(**kwargs), rank), rank)


def randomise_older(model: OlderModule) -> None:
    for layer in model.older.w_Bs:
        torch.nn.init.normal_(layer.weight, std=0.2)


@pytest.mark.parametrize("image_size", [64, 240])  # 240: windows
def test_it_computes_what_the_variant_here_computes(tmp_path: Path, image_size: int):
    sam = tiny_sam(image_size=image_size)
    ours = sam_lora_image_encoder.LoRA_Sam(copy.deepcopy(sam), 2).eval()
    randomise_updates(ours)
    ours.save_lora_parameters(tmp_path / "adapter.pth")
    import older_lora

    older = as_lora_model(older_lora.LoRA_Sam(sam, 2), 2).eval()
    older.load_lora_parameters(tmp_path / "adapter.pth")
    images = torch.rand(2, 3, image_size, image_size)
    expected, found = ours(images), older(images, full_size_masks=False)
    assert torch.allclose(found["low_res_logits"], expected["low_res_logits"], atol=1e-5)

    labels = torch.randint(0, 3, (2, image_size // 4, image_size // 4))
    for model in (ours, older):
        SegmentationLoss(3, 0.8)(model(images)["low_res_logits"], labels)["loss"].backward()
    for name in ("w_As", "w_Bs"):
        pairs = zip(getattr(ours, name), getattr(older.older, name), strict=True)
        for one, other in pairs:
            assert torch.allclose(one.weight.grad, other.weight.grad, atol=1e-6)


def test_the_file_holds_the_settings_and_comes_back(tmp_path: Path):
    model = older_model()
    randomise_older(model)
    digest = model.save_lora_parameters(tmp_path / "a.pth", settings={"num_classes": 2})
    assert re.fullmatch("[0-9a-f]{64}", digest)
    tensors, settings = read_adapter(tmp_path / "a.pth")
    assert settings["module"] == "older_lora" and settings["rank"] == 2
    other = older_model()
    assert other.load_lora_parameters(tmp_path / "a.pth")["num_classes"] == 2
    found = other._adapter_tensors()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in found.items())


@pytest.mark.parametrize(
    ("build", "cause"),
    [
        (lambda: older_model(rank=3), r"LoRA rank 2.*--rank 2"),
        (lambda: older_model(num_classes=5), r"number of classes 2.*--num_classes 2"),
        (
            lambda: sam_lora_image_encoder.LoRA_Sam(tiny_sam(), 2),
            r"variant older_lora.*--module older_lora",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(build, cause: str, tmp_path: Path):
    older_model().save_lora_parameters(tmp_path / "a.pth", settings={})
    with pytest.raises(InputError, match=cause):
        build().load_lora_parameters(tmp_path / "a.pth")


def test_what_such_a_module_cannot_do_is_said():
    model = older_model()
    with pytest.raises(InputError, match=r"needs base weights; pass --ckpt FILE"):
        model.train_all_weights()
    with pytest.raises(InputError, match="cannot be merged"):
        model.plain_state()
    for parameter in model.sam.image_encoder.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(InputError, match=r"trains [\d,]+ values, but its save_lora_parameters"):
        model.require_trained_is_saved()
    with pytest.raises(InputError, match="has no save_lora_parameters, load_lora_parameters, sam"):
        as_lora_model(torch.nn.Linear(2, 2), 2)


def test_the_trainer_takes_it_from_an_older_script(tmp_path: Path):
    """`max_iterations` has no effect there, and intensities up to 3 are trained on."""
    import older_lora

    data = write_slices(tmp_path / "data", count=4)
    change_slice(data, image=np.full((40, 40), 3.0, "f4"))
    net = older_lora.LoRA_Sam(tiny_sam(num_classes=8), 2)
    args = argparse.Namespace(root_path=str(data), list_dir=str(data / "lists"), num_classes=8)
    args.max_iterations, args.max_epochs, args.stop_epoch = 1, 2, 2
    args.batch_size, args.n_gpu, args.base_lr, args.AdamW = 2, 1, 0.001, True
    args.img_size, args.vit_name, args.module, args.rank = 64, "vit_tiny", "older_lora", 2
    folder = tmp_path / "run"
    folder.mkdir()
    assert trainer_synapse(args, net, str(folder), True, 16) == "Training Finished!"
    tensors, settings = read_adapter(folder / "epoch_1.pth")
    assert settings["module"] == "older_lora" and tensors["w_b_007"].abs().max() > 0
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line).get("step", 0) for line in lines) == 3  # 2 epochs of 2 steps


@pytest.mark.slow
def test_train_resume_test_and_tune_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = write_slices(tmp_path / "data", count=4)
    write_volume_h5(data)
    (data / "lists" / "test_vol.txt").write_text("case0001\n")
    torch.save(tiny_sam(num_classes=3).state_dict(), tmp_path / "base.pth")
    flags = ["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS]
    flags += ["--ckpt", str(tmp_path / "base.pth"), "--module", "older_lora", "--batch_size", "2"]
    flags += ["--AdamW", "--base_lr", "0.01", "--max_epochs", "2"]
    train.main(flags)
    (run,) = (tmp_path / "out").iterdir()
    assert "older_lora" in run.name
    whole = read_adapter(run / "epoch_1.pth")[0]
    assert all(whole[f"w_b_{index:03d}"].abs().max() > 0 for index in range(8))

    train.main([*flags, "--max_iterations", "1"])
    (part,) = {*(tmp_path / "out").iterdir()} - {run}
    train.main(["--resume", str(part), "--max_iterations", "9"])
    resumed = read_adapter(part / "epoch_1.pth")[0]
    assert all(torch.equal(value, whole[key]) for key, value in resumed.items())

    volumes = ["--volume_path", str(data), "--device", "cpu"]
    test_program.main(["--config", str(run), *volumes])
    assert (run / "test" / "report.html").is_file()

    tuned = ["--lora_ckpt", str(run / "epoch_1.pth"), "--output", str(tmp_path / "tuned")]
    train.main([*flags, *tuned, "--max_iterations", "1"])
    (again,) = (tmp_path / "tuned").iterdir()
    change = (read_adapter(again / "epoch_0.pth")[0]["w_b_000"] - whole["w_b_000"]).abs().max()
    assert 0 < change <= 0.02  # one step of AdamW
