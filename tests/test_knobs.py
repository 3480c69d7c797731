"""What every knob of an ablation must do: rebuild its network, resume, and not depend on ranks.

That a knob does what its name says is tested beside its code: `test_lora_places.py`,
`test_lora_forms.py`, `test_loss_terms.py`, `test_augmentations.py`, …
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import TINY_FLAGS, tiny_sam, write_slices
from knobs import EACH, GROUPS, KNOBS, TOGETHER

import train
import utils
from common.files import sha256_of
from common.tensors import load_tensors
from config.flags import predict_parser, train_parser
from config.flags import test_parser as parser_of_test
from config.network_flags import INPUT_AND_DECODER, LORA
from config.recipe_flags import RECIPE
from config.run_folder import run_name
from config.settings import parse_args
from datasets.neighbours import network_slices
from evaluation.predict_volume import predict_volume
from utils import build_model

pytestmark = pytest.mark.slow

STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven slices of one case and base weights. Epochs have a batch of 4 and one of 3."""
    data = write_slices(tmp_path_factory.mktemp("data"), count=7)
    torch.save(tiny_sam(num_classes=8).state_dict(), data / "base.pth")
    return data


def flags_of(data: Path, output: Path, *more: str) -> list[str]:
    # The schedule ends with the run, so that its decay counts in these few steps.
    recipe = ["--base_lr", "0.01", "--warmup", "--warmup_period", "1"]
    recipe += ["--max_epochs", "2", "--stop_epoch", "2"]
    base = ["--root_path", str(data), "--output", str(output), *TINY_FLAGS, "--name", "run"]
    return [*base, *recipe, "--batch_size", "4", "--ckpt", str(data / "base.pth"), *more]


def trained(data: Path, output: Path, *more: str) -> Path:
    train.main(flags_of(data, output, *more))
    return output / "run"


def left_by(run: Path) -> tuple[dict[str, str], list[dict]]:
    """Return the hashes of the adapters, and the records of the run without times."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    measured = ("seconds", "memory")
    kept = [{k: v for k, v in record.items() if k not in measured} for record in records]
    return {path.name: sha256_of(path) for path in run.glob("*.pth")}, kept


def noting_labels(noted: list[np.ndarray]) -> Callable[..., np.ndarray]:
    """Return `predict_volume`, which also keeps what it returns."""

    def noting(*args: object, **kwargs: object) -> np.ndarray:
        noted.append(predict_volume(*args, **kwargs))
        return noted[-1]

    return noting


def losses_of(run: Path) -> list[float]:
    return [record["loss"] for record in left_by(run)[1] if "loss" in record]


@pytest.fixture(scope="module")
def default(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(data, tmp_path_factory.mktemp("default"))


def test_the_table_holds_every_knob_and_value():
    rows = {flag.name: flag for flag in (*LORA, *INPUT_AND_DECODER, *RECIPE)}
    knobs = {
        name
        for name, flag in rows.items()
        if flag in (*LORA, *INPUT_AND_DECODER) or (flag.choices and flag.type is str)
    }
    assert knobs <= KNOBS.keys() <= rows.keys()
    for name, values in KNOBS.items():
        choices = {str(choice) for choice in rows[name].choices or ()}
        used = {word for value in values for word in value.split()}
        default = rows[name].default
        defaults = {str(word) for word in (default if isinstance(default, list) else [default])}
        assert used >= choices - defaults, name
    for words in TOGETHER.values():
        train_parser().parse_args(words.split())
    grouped = [f" {words} --" for words in GROUPS.values()]
    for name, value in EACH:
        assert sum(f" --{name} {value} --" in words for words in grouped) == 1, (name, value)


@pytest.mark.parametrize(("name", "value"), EACH)
def test_a_knob_has_its_place_in_name_and_settings(name: str, value: str, data: Path):
    plain, other = (
        parse_args(train_parser(), [*flags_of(data, data), "--root_path", str(data), *more])
        for more in ([], [f"--{name}", *value.split()])
    )
    plain.name = other.name = None
    assert run_name(plain) != run_name(other)


@pytest.mark.parametrize(("name", "value"), EACH)
def test_a_knob_trains_otherwise(name: str, value: str, data: Path, default: Path, tmp_path: Path):
    run = trained(data, tmp_path, f"--{name}", *value.split())
    assert left_by(run)[0] != left_by(default)[0]


@pytest.mark.parametrize("words", GROUPS.values(), ids=GROUPS)
def test_a_run_with_knobs_resumes_and_is_rebuilt(
    words: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    knobs, models = words.split(), []

    def noting(make: Callable) -> Callable:
        def made(*args: object, **kwargs: object) -> tuple[object, int]:
            models.append(make(*args, **kwargs))
            return models[-1]

        return made

    monkeypatch.setattr(train, "build_model", noting(train.build_model))
    run = trained(data, tmp_path / "whole", *knobs)
    model, side = models[0]

    # Stopped after 3 of 4 steps, in the middle of an epoch, and continued without naming the knobs.
    trained(data, tmp_path / "halves", *knobs, "--max_iterations", "3")
    train.main(["--resume", str(tmp_path / "halves" / "run"), "--max_iterations", str(STEPS)])
    hashes, records = left_by(tmp_path / "halves" / "run")
    other_hashes, other_records = left_by(run)
    assert hashes["epoch_1.pth"] == other_hashes["epoch_1.pth"]
    assert [r for r in records if "loss" in r] == [r for r in other_records if "loss" in r]

    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    volume = np.random.default_rng(1).random((5, 40, 40), dtype=np.float32)
    rebuilt = [
        parse_args(parser, ["--lora_ckpt", str(run / "epoch_1.pth"), *more])
        for parser, more in (
            (parser_of_test(), ["--config", str(run)]),
            (parser_of_test(), ["--ckpt", str(data / "base.pth")]),
            (predict_parser(), ["--config", str(run), "--input", "x", "--output", "y"]),
        )
    ]
    found, volumes = [], []
    for args in rebuilt:
        network, other_side = build_model(args, torch.device("cpu"))
        network.eval()
        assert other_side == side
        with torch.inference_mode():
            found.append(network(images)["low_res_logits"])
        sizes = {"input_size": (40, 40), "image_size": (64, 64)}
        seen = network_slices(volume, args.input_slices, "a volume")
        volumes.append(predict_volume(network, seen, **sizes))
    model.eval()
    with torch.inference_mode():
        expected = model(images)["low_res_logits"]
    assert expected.shape[-1] == side
    if "--ema" not in knobs:  # The adapter holds the average, not the last weights.
        assert torch.equal(found[0], expected)
    # The original's function of a script sees what the network was trained on.
    with monkeypatch.context() as patched:
        labels = []
        patched.setattr(utils, "predict_volume", noting_labels(labels))
        label = np.zeros(volume.shape, np.uint8)
        utils.test_single_volume(volume, label, network, 8, True, (64, 64), (40, 40))
    volumes.append(labels[0])
    found.append(found[0])
    for logits, labels in zip(found, volumes, strict=True):
        assert torch.equal(logits, found[0]) and np.array_equal(labels, volumes[0])


@pytest.mark.parametrize("words", TOGETHER.values(), ids=TOGETHER)
def test_two_ranks_and_parts_train_as_one_process(words: str, data: Path, tmp_path: Path):
    common = words.split()
    one = trained(data, tmp_path / "one", *common)
    in_parts = ("--batch_size", "3", "--global_batch", "4", *common)
    in_ranks = ("--batch_size", "2", "--n_gpu", "2", *common)
    runs = [trained(data, tmp_path / "parts", *in_parts)]
    log = tmp_path / "log"
    assert processes.run(flags_of(data, tmp_path / "two", *in_ranks), log, 2) == [0, 0], (
        log.read_text()
    )
    runs.append(tmp_path / "two" / "run")
    expected, start = load_tensors(one / "epoch_1.pth"), load_tensors(data / "base.pth")
    moved = max(
        float((value - expected[key]).abs().max())
        for key, value in start.items()
        if key in expected and value.shape == expected[key].shape and value.numel()
    )
    grown = [value for key, value in expected.items() if "_b_" in key or key.endswith("b")]
    updated = max((float(value.abs().max()) for value in grown), default=0.0)
    for run in runs:
        assert losses_of(run) == pytest.approx(losses_of(one), abs=1e-5)
        other = load_tensors(run / "epoch_1.pth")
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                bound = 1e-2 * max(moved, updated)
                assert torch.allclose(value, other[key], rtol=0, atol=bound), key
