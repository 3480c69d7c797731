"""Validation on held-out cases, the best adapter, early stopping, the page of `--check`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, tiny_model, write_slices
from test_datasets import write_volume_h5

import train
import trainer
from common.errors import InputError
from datasets.dataset_synapse import Synapse_dataset
from datasets.names import case_of
from evaluation import metrics
from evaluation.metrics import score_volume
from evaluation.predict_volume import predict_volume
from lora.adapter_file import read_adapter
from training.curves import draw_curves
from training.validation import Validation, hold_out, validate

pytestmark = pytest.mark.slow

FLAGS = ["--batch_size", "4", "--AdamW", "--base_lr", "1e-3", "--max_epochs", "9"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve slices of four cases."""
    return write_slices(tmp_path / "data", count=3, cases=4)


def run(data: Path, output: Path, *flags: str) -> Path:
    train.main(["--root_path", str(data), "--output", str(output), *TINY_FLAGS, *FLAGS, *flags])
    (folder,) = output.iterdir()
    return folder


def records_of(folder: Path, key: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


def test_cases_are_held_out_whole(data: Path):
    dataset = Synapse_dataset(data, None, "train")
    left, held_out = hold_out(dataset, 2, seed=1)
    trained, validated = {case_of(name) for name in left.sample_list}, set(held_out)
    assert len(validated) == 2 and not trained & validated
    assert len(left) == 6 and all(len(part) == 3 for part in held_out.values())
    assert set(hold_out(dataset, 2, seed=1)[1]) == validated
    assert any(set(hold_out(dataset, 2, seed=seed)[1]) != validated for seed in range(9))
    assert len(hold_out(dataset, None, seed=1)[1]) == 1
    assert len(dataset) == 12
    with pytest.raises(InputError, match="--val_cases is 4"):
        hold_out(dataset, 4, seed=1)


def test_a_validation_gives_the_scores_of_a_test_of_the_stacked_slices(data: Path):
    dataset = Synapse_dataset(data, None, "train")
    _, held_out = hold_out(dataset, 2, seed=0)
    model = tiny_model(num_classes=8)
    found = validate(model, held_out, num_classes=8, img_size=64)
    assert model.training
    model.eval()
    for name, part in held_out.items():
        volume = np.stack([part[i]["image"] for i in range(len(part))])
        label = np.stack([part[i]["label"] for i in range(len(part))])
        prediction = predict_volume(model, volume, input_size=(40, 40), image_size=(64, 64))
        expected = [score.dsc for score in score_volume(prediction, label, 8)]
        for dsc, reference in zip(found.cases[name], expected, strict=True):
            assert dsc == (None if reference is None else pytest.approx(reference))
    assert found.score == pytest.approx(np.mean([dsc for dsc in found.dsc if dsc is not None]))


class Everywhere(torch.nn.Module):
    """A network that finds class 1 in every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor, *_: object) -> dict[str, torch.Tensor]:
        return {"masks": torch.eye(4)[1][None, :, None, None].expand(len(images), -1, 64, 64)}


def unlabelled(folder: Path) -> dict[str, Synapse_dataset]:
    """One held-out case; its label has class 2 in one slice and neither class 1 nor class 3."""
    (folder / "train_npz").mkdir(parents=True)
    (folder / "lists").mkdir()
    for index in range(2):
        label = np.zeros((40, 40), np.float32)
        label[:9, :9] = 2 * index
        image = np.zeros((40, 40), np.float32)
        np.savez(folder / "train_npz" / f"case0001_slice{index:03d}.npz", image=image, label=label)
    names = [f"case0001_slice{index:03d}\n" for index in range(2)]
    (folder / "lists" / "train.txt").write_text("".join(names))
    return {"case0001": Synapse_dataset(folder, None, "train")}


def test_a_false_organ_counts_as_zero_in_a_validation_as_in_a_test(tmp_path: Path):
    cases = unlabelled(tmp_path)
    found = validate(Everywhere(), cases, num_classes=3, img_size=64)
    assert found.dsc == (0.0, 0.0, None)  # a false organ, a missed one, an absent one
    label = np.stack([cases["case0001"][index]["label"] for index in range(2)])
    scores = score_volume(np.ones_like(label), label, 3)
    assert found.dsc == tuple(score.dsc for score in scores)


def test_the_rule_for_empty_masks_is_changed_in_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def ignore_false_organs(overlap: int, predicted: int, real: int) -> float | None:
        return 2 * overlap / (predicted + real) if real else None

    cases = unlabelled(tmp_path)
    label = np.stack([cases["case0001"][index]["label"] for index in range(2)])

    def found() -> tuple[tuple[float | None, ...], ...]:
        scores = score_volume(np.ones_like(label), label, 3, (1.0, 1.0, 1.0))
        validated = validate(Everywhere(), cases, num_classes=3, img_size=64).dsc
        return validated, tuple(s.dsc for s in scores), tuple(s.nsd for s in scores)

    assert found() == ((0.0, 0.0, None),) * 3
    monkeypatch.setattr(metrics, "dsc_from_counts", ignore_false_organs)
    assert found() == ((None, 0.0, None),) * 3


def test_the_best_adapter_belongs_to_the_best_score(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("training.run.draw_curves", draw_curves)
    folder = run(data, tmp_path / "out", "--stop_epoch", "6", "--val_every", "2")
    validations = records_of(folder, "score")
    assert [record["epoch"] for record in validations] == [1, 3, 5]
    assert len(validations[0]["dsc"]) == 8 and len(validations[0]["cases"]) == 1
    best = [record for record in records_of(folder, "saved") if record["saved"] == "best.pth"]
    scores = [record["score"] for record in validations]
    assert best[-1]["steps"] == 3 * (validations[int(np.argmax(scores))]["epoch"] + 1)
    assert read_adapter(folder / "best.pth")[1]["num_classes"] == 8
    assert (folder / "curves.png").stat().st_size > 5000


def scored(*scores: tuple[float, float]) -> object:
    """Return a stand-in for `validate`: each call finds the next DSC of the classes 1 and 2."""
    found = iter(scores)
    return lambda *args, **kwargs: Validation((*next(found), *[None] * 6), {})


def test_patience_ends_a_run_and_resuming_does_not_continue_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trainer, "validate", scored((0.1, 0.1), (0.3, 0.3), (0.3, 0.3), (0.2, 0.2)))
    folder = run(data, tmp_path / "out", "--val_every", "1", "--patience", "2")
    assert [record["epoch"] for record in records_of(folder, "score")] == [0, 1, 2, 3]
    assert [record["steps"] for record in records_of(folder, "saved")] == [3, 6, 12]
    assert (folder / "epoch_3.pth").is_file()
    train.main(["--resume", str(folder)])
    assert len(records_of(folder, "score")) == 4


def test_an_organ_that_stays_at_zero_is_named(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(trainer, "validate", scored(*[(0.5, 0.0)] * 4))
    # basicConfig would remove the handler of caplog.
    monkeypatch.setattr(logging, "basicConfig", lambda **kwargs: None)
    with caplog.at_level(logging.WARNING):
        run(data, tmp_path / "out", "--stop_epoch", "4", "--val_every", "1")
    warnings = [record.getMessage() for record in caplog.records if "DSC has been 0" in record.msg]
    assert len(warnings) == 2 and "right kidney" in warnings[0] and "spleen" not in warnings[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patience", "2"], "need --val_every"),
        (["--val_every", "1", "--val_cases", "4"], "--val_cases is 4"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(
    flags: list[str], message: str, data: Path, tmp_path: Path
):
    with pytest.raises(InputError, match=message):
        run(data, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_check_shows_facts_and_warnings_and_trains_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    source = data / "train_npz" / "case0006_slice001.npz"
    (data / "train_npz" / "case0005_slice000.npz").write_bytes(source.read_bytes())
    write_volume_h5(data)
    (data / "test_vol_h5" / "case0001.npy.h5").rename(data / "test_vol_h5" / "case0006.npy.h5")
    (data / "lists" / "test_vol.txt").write_text("case0006\n")
    flags = ["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS, *FLAGS]
    train.main([*flags, "--check"])
    page = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    for text in (
        "training: 12 slices of 4 cases",
        "40×40 (12)",
        "memory of one process, estimated",
        "warning: 1 case(s) are trained on and tested: case0006",
        "warning: 1 equal training slices: case0005_slice000 = case0006_slice001",
    ):
        assert text in page
    train.main([*flags, "--max_iterations", "1"])
    (folder,) = (tmp_path / "out").iterdir()
    assert (folder / "check.txt").read_text().strip() == page.strip()
    facts = json.loads((folder / "check.json").read_text())
    labels = [np.load(path)["label"] for path in (data / "train_npz").iterdir()]
    counts = np.bincount(np.stack(labels).astype(int).ravel(), minlength=9)
    assert facts["voxels"]["train"] == counts.tolist()


def rename_slices(data: Path, pattern: str) -> None:
    """Rename every slice by a pattern of its case and number."""
    names = []
    for path in sorted((data / "train_npz").iterdir()):
        case, number = path.stem.split("_slice")
        names.append(pattern.format(case=case, number=number))
        path.rename(path.with_stem(names[-1]))
    (data / "lists" / "train.txt").write_text("\n".join(names))


@pytest.mark.parametrize(
    ("pattern", "cases"),
    [
        ("{case}_{number}", 4),
        ("{case}_slice{number}", 4),
        ("{case}_frame01_slice_{number}", 4),  # as the preparations of ACDC name slices
        ("{case}_{number}_slice000", 4),
        ("picture_{case}{number}", 12),  # no scan is told
        ("{case}x{number}", 12),
    ],
)
def test_validation_holds_out_whole_scans_however_slices_are_named(
    pattern: str, cases: int, data: Path, capsys: pytest.CaptureFixture
):
    rename_slices(data, pattern)
    train.main(["--root_path", str(data), *TINY_FLAGS, *FLAGS, "--val_every", "1", "--check"])
    assert f"12 slices of {cases} cases" in capsys.readouterr().out
    left, held_out = hold_out(Synapse_dataset(data, None, "train"), None, seed=1)
    held = [name for part in held_out.values() for name in part.sample_list]
    assert len(held) == (3 if cases == 4 else 2) and len(left) == 12 - len(held)
    if cases == 4:
        assert len({name[:8] for name in held}) == 1
        assert held[0][:8] not in {name[:8] for name in left.sample_list}


@pytest.mark.parametrize("fault", ["raw HU", "missing volume"])
def test_check_stops_on_errors(fault: str, data: Path, tmp_path: Path):
    flags = ["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS, *FLAGS]
    if fault == "raw HU":
        for name in ("case0005_slice000", "case0006_slice000"):
            path = data / "train_npz" / f"{name}.npz"
            np.savez(path, image=np.full((40, 40), -900.0), label=np.zeros((40, 40)))
        with pytest.raises(InputError, match=r"look like raw HU.*; 1 more files are faulty"):
            train.main([*flags, "--check"])
        return
    write_volume_h5(data)
    (data / "lists" / "test_vol.txt").write_text("case0001\ncase0009\n")
    with pytest.raises(InputError, match="case0009"):
        train.main([*flags, "--check"])
    train.main([*flags, "--max_iterations", "1"])  # faulty test data do not prevent training
    (folder,) = (tmp_path / "out").iterdir()
    assert "the test data cannot be used" in (folder / "check.txt").read_text()
