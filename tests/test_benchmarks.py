"""The benchmarks' plain implementations agree with the project, and a speed needs agreement."""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise_updates, tiny_model, write_slices

import test
from benchmarks import __main__ as benchmarks
from benchmarks import scaling, scenes, table, testing, where
from benchmarks.plain import plain_copy, plain_sample, plain_test
from benchmarks.timing import Comparison, DisagreementError, Row, compare
from common.errors import exit_on_bad_input
from datasets.augmentation import draw_augmentation, keyed_rng, prepare_batch
from datasets.dataset_synapse import Synapse_dataset
from datasets.scans.volumes import read_volume

pytestmark = pytest.mark.slow


def volume(shape: tuple[int, ...], *, labelled: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return an image of random blocks, and the class 0…2 of each voxel."""
    rng = np.random.default_rng(sum(shape))
    blocks = rng.integers(0, 3, (shape[0], -(-shape[1] // 5), -(-shape[2] // 5)))
    label = blocks.repeat(5, axis=1).repeat(5, axis=2)[:, : shape[1], : shape[2]].astype(np.uint8)
    image = (label / 3 + 0.2 * rng.random(shape)).astype(np.float32)
    return image, label if labelled else np.zeros_like(label)


@pytest.mark.parametrize(
    ("shape", "labelled"),
    [
        ((5, 40, 40), True),
        ((1, 64, 64), True),  # a single slice of the network's size
        ((2, 33, 47), True),  # odd and not square
        ((3, 20, 24), False),  # an empty label
    ],
)
def test_a_volume_goes_through_as_in_the_original_loop(
    shape: tuple[int, ...], labelled: bool, tmp_path: Path
):
    image, label = volume(shape, labelled=labelled)
    flags = ("--img_size", "64", "--input_size", "32", "--is_savenii")
    args, dataset = scenes.test_data(tmp_path, {"case0001": (image, label)}, *flags, num_classes=2)
    model = tiny_model().eval()
    # Make the classes differ.
    torch.nn.init.normal_(model.sam.mask_decoder.mask_tokens.weight)
    randomise_updates(model)
    expected, scores = plain_test(
        dataset.paths[0],
        plain_copy(model),
        classes=2,
        input_size=32,
        image_size=64,
        folder=tmp_path,
    )
    model.merge()
    (result,) = test.test_cases(args, model, dataset, tmp_path / "out")
    found, _ = read_volume(tmp_path / "out" / "predictions" / "case0001_pred.nii.gz")
    assert len(np.unique(expected)) > 1  # the comparison needs several classes
    assert np.array_equal(found, expected)
    found_scores = [(score.samed_dsc, score.samed_hd95) for score in result.scores]
    assert np.allclose(found_scores, scores, atol=1e-9)


def test_results_come_in_order_and_once(tmp_path: Path):
    """There are more volumes than may wait at the same time."""
    names = [f"case{index:04d}" for index in range(2 * test.WAITING + 1)]
    volumes = {
        name: volume((1 + index % 3, 20, 20), labelled=True) for index, name in enumerate(names)
    }
    flags, done = ("--img_size", "64", "--input_size", "32"), []
    args, dataset = scenes.test_data(tmp_path, volumes, *flags, num_classes=2)
    finished = test.test_cases(args, tiny_model().eval(), dataset, tmp_path, progress=done.append)
    assert [result.case for result in finished] == names
    assert sum(done) == dataset.count_slices() == sum(1 + index % 3 for index in range(len(names)))


def test_the_rows_of_testing_run_on_what_test_py_reads():
    """Without this test only `make benchmark` would notice changed flags or data."""
    label = np.zeros((2, 32, 32), dtype=np.uint8)
    label[:, 8:24, 8:24] = 3
    row = testing.testing_row(
        "test.py",
        "masks given",
        torch.device("cpu"),
        scenes.Scene(label / 8, label, label),
        None,
        target=0,
        repeats=1,
    )
    assert row.repeats == 1 and row.difference == 0
    result = scaling.test_slices(1, torch.device("cpu"))()[0]
    assert len(result.scores) == scenes.NUM_CLASSES


@pytest.mark.parametrize("size", [40, 35])
def test_samples_equal_the_plain_path(size: int, tmp_path: Path):
    folder = write_slices(tmp_path, count=8, size=size)
    dataset = Synapse_dataset(folder, None, "train")
    choices = [draw_augmentation(keyed_rng(0, epoch, 0)) for epoch in range(8)]
    samples = [dataset[index] for index in range(8)]
    batch = prepare_batch(
        [torch.from_numpy(sample["image"]) for sample in samples],
        [torch.from_numpy(sample["label"]) for sample in samples],
        choices,
        output_size=(96, 96),
        low_res=(24, 24),
    )
    for index, choice in enumerate(choices):
        image, label, low_res_label = plain_sample(dataset.paths[index], choice, 96, 24)
        assert torch.allclose(batch["image"][index, 0], image, atol=1e-5)
        assert torch.equal(batch["label"][index].long(), label)
        assert torch.equal(batch["low_res_label"][index], low_res_label)


@pytest.mark.parametrize("peer", [1.1, math.nan])
def test_no_speed_without_agreement(peer: float):
    comparison = Comparison(
        name="row",
        what="what",
        peer_name="peer",
        ours=lambda: 1.0,
        peer=lambda: peer,
        difference=lambda a, b: abs(a - b),
        tolerance=1e-3,
        target=None,
    )
    with pytest.raises(DisagreementError, match="differ"):
        compare(comparison)


def test_the_page_says_what_was_not_measured(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    table.update_page(page, tmp_path)
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert text.count("Not measured") == 2
    table.update_page(page, tmp_path)
    assert page.read_text() == text


def test_a_missed_target_shows():
    facts = ("name", "what", "peer", 1.2, 1.0, 1.4, 5, 0.0, 1e-5)
    assert Row(*facts, None).met and Row(*facts, 1.2).met and not Row(*facts, 1.3).met


@pytest.mark.parametrize("flags", [["--help"], ["encoder"], []])
def test_missing_peers_are_named_before_anything_is_measured(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(where, "version", absent)
    monkeypatch.setattr(benchmarks, "ROWS", dict.fromkeys(benchmarks.ROWS))
    with pytest.raises(SystemExit) as stop, exit_on_bad_input():
        benchmarks.main(flags)
    told = capsys.readouterr()
    if flags == ["--help"]:
        assert stop.value.code == 0 and "encoder" in told.out
    else:
        assert stop.value.code == 2 and told.err.startswith("error: the row 'encoder' is timed")
        assert "pip install -r benchmarks/requirements.txt" in told.err
    assert where.where(torch.device("cpu"), benchmarks.PEERS)["versions"]["transformers"] is None
