"""Scripts written against the original run on this project's names, unchanged."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_sam, write_slices
from test_datasets import write_volume_h5

import utils
from evaluation.metrics import FALSE_ORGAN, score_volume
from lora.adapter_file import read_adapter

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parent / "older_scripts"
REPOSITORY = SCRIPTS.parent.parent


def run(script: str, folder: Path, *flags: str) -> tuple[str, str]:
    """Run a copy of the script as if it lay at the top level; return stdout and plain stderr."""
    place = folder / script
    shutil.copy(SCRIPTS / script, place)
    done = subprocess.run(
        [sys.executable, str(place), *flags],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, re.sub(r"\x1b\[[\d;]*m", "", done.stderr)  # icecream prints in colours


def test_train_and_test_in_the_manner_of_the_original(tmp_path: Path):
    data = write_slices(tmp_path / "data")
    write_volume_h5(data)
    (data / "lists" / "test_vol.txt").write_text("case0001\n")
    torch.save(tiny_sam().state_dict(), tmp_path / "base.pth")
    lists = ["--list_dir", str(data / "lists")]
    base = ["--ckpt", str(tmp_path / "base.pth")]
    flags = ["--root_path", str(data / "train_npz"), "--output", str(tmp_path / "out")]
    printed, shown = run("older_train.py", tmp_path, *flags, *lists, *base, "--warmup", "--AdamW")
    assert printed.count("Training Finished!") == 3  # by trainer_synapse, and by two own loops
    assert "ic| iter_num: 2, low_res: 16" in shown
    adapter = tmp_path / "out" / "epoch_0.pth"
    tensors, settings = read_adapter(adapter)
    assert not any(key.startswith("image_encoder.") for key in tensors)  # frozen: not in the file
    assert settings["rank"] == 4
    assert read_adapter(tmp_path / "out" / "of_the_script.pth")[0].keys() == tensors.keys()

    flags = ["--volume_path", str(data / "test_vol_h5"), "--output_dir", str(tmp_path / "result")]
    printed, shown = run(
        "older_test.py", tmp_path, *flags, *lists, *base, "--lora_ckpt", str(adapter)
    )
    assert printed.startswith("case0001 20 24 ") and "class 8 mean_dice" in printed
    difference = re.search(r"ic\| case_name: 'case0001', difference: ([\d.e+-]+)", shown)
    assert float(difference[1]) < 1e-9  # the same scores as slice by slice with medpy
    names = {path.name for path in (tmp_path / "result").iterdir()}
    assert names == {f"case0001_{kind}.nii.gz" for kind in ("pred", "img", "gt", "by_slices")}


def test_torchvision_composes_the_transforms_and_draws_a_grid(tmp_path: Path):
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pytest.skip("torchvision is not installed; it comes with requirements-gpu.txt")
    except RuntimeError as error:  # its compiled part misses the operators of the CUDA build
        pytest.skip(f"torchvision cannot be imported beside this build of torch: {error}")
    data = write_slices(tmp_path / "data")
    flags = ["--root_path", str(data / "train_npz"), "--list_dir", str(data / "lists")]
    printed, _ = run("older_torchvision.py", tmp_path, *flags, "--output", str(tmp_path / "log"))
    # two by two slices with a border of two pixels around each
    assert printed == "(3, 134, 134)\n"


def test_calculate_metric_percase_follows_the_original_and_changes_nothing():
    pred, gt = np.zeros((4, 8, 8)), np.zeros((4, 8, 8))
    assert utils.calculate_metric_percase(pred, gt) == (0, 0)
    pred[1:3, 2:5, 2:5] = 3
    assert utils.calculate_metric_percase(pred, gt) == (1, 0)
    assert utils.calculate_metric_percase(gt, pred) == (0, 0)
    gt[1:3, 2:5, 3:6] = 2
    before = pred.copy(), gt.copy()
    dsc, hd95 = utils.calculate_metric_percase(pred, gt)
    assert dsc == pytest.approx(2 / 3) and hd95 == 1
    assert np.array_equal(pred, before[0]) and np.array_equal(gt, before[1])


def test_the_stricter_scores_do_not_reward_a_false_organ():
    mask, empty = np.ones((2, 3, 3)), np.zeros((2, 3, 3))
    false = score_volume(mask, empty, 1)[0]
    assert (false.outcome, false.samed_dsc, false.dsc) == (FALSE_ORGAN, 1, 0)
    assert score_volume(empty, empty, 1)[0].dsc is None
    missed = score_volume(empty, mask, 1)[0]
    assert missed.dsc == 0 and missed.hd95_voxels is None


def test_dice_loss_takes_weights_and_softmax():
    loss = utils.DiceLoss(3)
    logits, target = torch.randn(2, 3, 6, 6), torch.randint(0, 3, (2, 6, 6))
    plain = loss(logits.softmax(1), target)
    assert torch.allclose(loss(logits, target, softmax=True), plain)
    assert loss(logits, target, weight=[0, 0, 0], softmax=True) == 0
    perfect = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    assert loss(perfect, target) < 1e-5
    with pytest.raises(ValueError, match="do not fit"):
        loss(logits[:, :2], target)


def test_focal_loss_sums_or_averages():
    preds, labels = torch.randn(2, 3, 6, 6), torch.randint(0, 3, (2, 6, 6))
    mean = utils.Focal_loss(0.25, 2, 3, True)(preds, labels)
    total = utils.Focal_loss(alpha=[0.25, 0.75, 0.75], gamma=2, num_classes=3, size_average=False)
    assert total(preds, labels) == pytest.approx(mean.item() * labels.numel(), rel=1e-5)


def test_a_single_slice_can_be_scored():
    net = tiny_sam(num_classes=2).eval()
    image = np.random.default_rng(0).random((1, 1, 30, 40), dtype=np.float32)
    label = np.zeros((1, 1, 30, 40), dtype=np.uint8)
    scores = utils.test_single_volume(image, label, net, 2, True, [64, 64], [32, 32])
    assert len(scores) == 2 and all(hd95 == 0 for _, hd95 in scores)
