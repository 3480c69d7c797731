"""The running average of the weights: its values, what is saved and validated, and going on."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import processes
import pytest
import torch
from conftest import TINY_FLAGS, tiny_model, tiny_sam, write_slices

import train
import trainer
from common.errors import InputError
from common.files import sha256_of
from common.tensors import load_tensors
from config.settings import complete
from lora.older_module import as_lora_model
from trainer import StepOptions, freeze_unreached, make_optimizer, training_step
from training.average import WeightAverage
from training.checkpoint import newest_state, saved_states
from training.losses import SegmentationLoss
from training.memory import memory_of_step
from training.trained import Trained

DECAY = 0.8
OLDER = Path(__file__).parent / "older_scripts"


def trained_model() -> tuple[torch.nn.Module, torch.optim.Optimizer, dict[str, torch.Tensor]]:
    model = tiny_model()
    freeze_unreached(model)
    batch = {
        "image": torch.rand(2, 3, 64, 64),
        "low_res_label": torch.randint(0, 3, (2, 16, 16)),
    }
    return model.train(), make_optimizer(model, "sgd", 0.1), batch


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_the_average_is_that_of_the_weights_after_every_update():
    model, optimizer, batch = trained_model()
    average = WeightAverage(model, optimizer, DECAY)
    history = [weights_of(model)]
    for _ in range(5):
        training_step(model, batch, SegmentationLoss(3, 0.8), optimizer, 0.1)
        history.append(weights_of(model))
    shares = [DECAY**5, *(0.2 * DECAY ** (5 - step) for step in range(1, 6))]
    assert sum(shares) == pytest.approx(1)
    assert average.values.keys() == history[0].keys()
    for name, value in average.values.items():
        parts = [
            share * weights[name].double() for share, weights in zip(shares, history, strict=True)
        ]
        torch.testing.assert_close(value.double(), sum(parts), rtol=1e-5, atol=1e-6)
    moved = [(history[0][n] - history[5][n]).abs().max() for n in history[0]]
    assert max(moved) > 1e-3


def test_weights_and_average_change_places_and_come_back_to_the_bit():
    model, optimizer, batch = trained_model()
    average = WeightAverage(model, optimizer, DECAY)
    training_step(model, batch, SegmentationLoss(3, 0.8), optimizer, 0.1)
    raw, kept = weights_of(model), {n: v.clone() for n, v in average.values.items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(KeyboardInterrupt), average.in_use():
        assert all(torch.equal(value, kept[n]) for n, value in weights_of(model).items())
        state = model.adapter_state()
        assert torch.equal(state["w_b_000"], kept[name_of(model, model.w_Bs[0].weight)])
        raise KeyboardInterrupt
    assert all(torch.equal(value, raw[n]) for n, value in weights_of(model).items())
    assert all(torch.equal(value, kept[n]) for n, value in average.values.items())
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]


def name_of(model: torch.nn.Module, wanted: torch.Tensor) -> str:
    return next(name for name, value in model.named_parameters() if value is wanted)


@pytest.mark.parametrize("how", ["--skip_nan", "a scaler"])
def test_an_update_that_is_left_out_moves_nothing(how: str):
    model, optimizer, batch = trained_model()
    average = WeightAverage(model, optimizer, DECAY)
    training_step(model, batch, SegmentationLoss(3, 0.8), optimizer, 0.1)
    before = {n: v.clone() for n, v in average.values.items()}
    options = StepOptions(skip_not_finite=True)
    if how == "a scaler":
        options = StepOptions(scaler=torch.amp.GradScaler("cpu"))
    batch["image"][0] = torch.nan
    training_step(model, batch, SegmentationLoss(3, 0.8), optimizer, 0.1, options)
    assert all(torch.equal(value, before[n]) for n, value in average.values.items())


def test_without_it_nothing_is_kept_or_hooked():
    model, optimizer, _ = trained_model()
    trained = Trained(model, optimizer, torch.amp.GradScaler(enabled=False))
    assert trained.average.values == {} and not optimizer._optimizer_step_post_hooks
    assert trained.state().keys() == {"model", "optimizer", "scaler"}


def test_a_state_of_a_run_without_it_is_refused():
    model, optimizer, _ = trained_model()
    scaler = torch.amp.GradScaler(enabled=False)
    state = Trained(model, optimizer, scaler).state()
    with pytest.raises(ValueError, match="other weights"):
        Trained(model, optimizer, scaler, DECAY).restore(state)


def test_the_memory_of_a_step_has_room_for_it():
    model, _, _ = trained_model()
    args = complete(argparse.Namespace(root_path="x", num_classes=2, img_size=64))
    plain = memory_of_step(args, model, 2, 2)
    args.ema = DECAY
    more = memory_of_step(args, model, 2, 2)
    trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    found = more["gradients and optimiser"] - plain["gradients and optimiser"]
    assert found * 2**30 == pytest.approx(trainable)


def test_a_module_in_the_originals_style_saves_the_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(OLDER))
    import older_lora

    model = as_lora_model(older_lora.LoRA_Sam(tiny_sam(), 2), 2)
    average = WeightAverage(model, torch.optim.SGD(model.parameters(), 0.1), DECAY)
    with torch.no_grad():
        model.older.w_Bs[0].weight.fill_(1.0)
        average.values[name_of(model, model.older.w_Bs[0].weight)].fill_(2.0)
    for used, expected in ((True, 2.0), (False, 1.0)):
        path = tmp_path / f"{expected}.pth"
        if used:
            with average.in_use():
                model.save_lora_parameters(path)
        else:
            model.save_lora_parameters(path)
        assert (load_tensors(path)["w_b_000"] == expected).all()
    sys.modules.pop("older_lora", None)


# --- runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    torch.save(tiny_sam(num_classes=8).state_dict(), folder / "base.pth")
    return write_slices(folder, count=3, cases=3)


def flags_of(data: Path, output: Path, *more: str) -> list[str]:
    flags = [*TINY_FLAGS, "--ckpt", str(data / "base.pth"), "--root_path", str(data)]
    flags += "--batch_size 2 --max_epochs 20 --base_lr 0.05 --val_every 1 --log_every 3".split()
    return [*flags, "--save_steps", "1", "--output", str(output), *more]


def folder_of(output: Path) -> Path:
    (folder,) = output.iterdir()
    return folder


def records_of(folder: Path) -> list[dict]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def test_adapters_and_validations_use_it_and_training_does_not(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen, validate = [], trainer.validate

    def watch(model: torch.nn.Module, *args: object, **kwargs: object) -> object:
        seen.append(model.w_Bs[0].weight.detach().clone())
        return validate(model, *args, **kwargs)

    monkeypatch.setattr(trainer, "validate", watch)
    for name, more in (("plain", ()), ("ema", ("--ema", "0.8"))):
        train.main(flags_of(data, tmp_path / name, "--stop_epoch", "2", *more))
    plain, ema = (folder_of(tmp_path / name) for name in ("plain", "ema"))
    assert "ema0.8" in ema.name
    losses = [[r["loss"] for r in records_of(folder) if "lr" in r] for folder in (plain, ema)]
    assert losses[0] == losses[1]  # the raw weights train on
    states = [newest_state(folder) for folder in (plain, ema)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name])
    average = states[1]["average"]
    (key,) = (name for name in average if name.endswith("blocks.0.attn.qkv.updates.0.up.weight"))
    assert torch.equal(load_tensors(plain / "epoch_1.pth")["w_b_000"], states[1]["model"][key])
    assert torch.equal(load_tensors(ema / "epoch_1.pth")["w_b_000"], average[key])
    assert torch.equal(seen[-1], average[key])
    assert not torch.equal(average[key], states[1]["model"][key])


@pytest.mark.slow
def test_a_run_goes_on_as_if_never_stopped(data: Path, tmp_path: Path):
    argv = flags_of(data, tmp_path / "whole", "--stop_epoch", "3", "--ema", "0.8")
    train.main([*argv, "--keep_states", "100"])
    whole = folder_of(tmp_path / "whole")
    adapters = {path.name: sha256_of(path) for path in whole.glob("*.pth")}
    assert adapters.keys() == {"best.pth", "epoch_2.pth"}
    for step in (2, 5):
        again = Path(shutil.copytree(whole, tmp_path / str(step) / whole.name))
        for state in saved_states(again):
            if int(state.name.split("-")[0].removeprefix("step_")) > step:
                state.unlink()
        for path in again.glob("*.pth"):
            path.unlink()
        train.main(["--resume", str(again)])
        assert records_of(again) == records_of(whole)
        found = {path.name: sha256_of(path) for path in again.glob("*.pth")}
        assert found.items() <= adapters.items() and "epoch_2.pth" in found


@pytest.mark.slow
def test_two_ranks_have_the_average_of_one_process(data: Path, tmp_path: Path):
    found = []
    for ranks, split in ((1, ("--batch_size", "2")), (2, ("--batch_size", "1", "--n_gpu", "2"))):
        output, log = tmp_path / str(ranks), tmp_path / f"{ranks}.log"
        argv = flags_of(data, output, "--max_iterations", "4", "--ema", "0.8", *split)
        assert processes.run(argv, log, ranks) == [0] * ranks, log.read_text()
        found.append(newest_state(folder_of(output))["average"])
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-4)


def test_a_slow_average_is_told(data: Path, tmp_path: Path):
    train.main(flags_of(data, tmp_path, "--max_iterations", "2", "--ema", "0.99"))
    told = (folder_of(tmp_path) / "log.txt").read_text()
    assert "--ema 0.99 is slow for 2 steps: 98 % of the last average are the weights at" in told


@pytest.mark.parametrize("value", ["0", "1", "-0.5", "nan"])
def test_a_decay_that_is_none_is_refused(value: str, data: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"--ema is .*, expected a number above 0, at most 0.99"):
        train.main(flags_of(data, tmp_path, "--ema", value))
