"""The simulated user against independent counts, and `python -m tools.clicks`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_predict import SPEC

import test as test_program
from common.errors import exit_on_bad_input
from correction import predictor as prediction
from correction.clicks import inmost_pixel, largest_piece, next_click
from correction.predictor import OrganPredictor
from correction.prompts import Click
from segment_anything import Sam
from tools import clicks


def pieces_by_hand(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Find the pieces of a mask by walking from pixel to pixel, corners included."""
    left = set(map(tuple, np.argwhere(mask).tolist()))
    found = []
    while left:
        todo, piece = [min(left)], set()
        while todo:
            row, column = todo.pop()
            if (row, column) in left:
                left.remove((row, column))
                piece.add((row, column))
                todo += [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        found.append(piece)
    return found


def depth_by_hand(place: tuple[int, int], mask: np.ndarray) -> float:
    """Return the distance to the nearest pixel that is not in a mask, also outside of the slice."""
    around = np.argwhere(~np.pad(mask, 1)) - 1
    return float(np.sqrt(((around - place) ** 2).sum(axis=1).min()))


def blobs(seed: int) -> np.ndarray:
    """Return labels (24, 20) of the classes 0, 1, 2 in pieces of all sizes."""
    return np.kron(np.random.default_rng(seed).integers(0, 3, (8, 5)), np.ones((3, 4), np.uint8))


@pytest.mark.parametrize("seed", range(8))
def test_a_click_is_at_the_inmost_pixel_of_the_largest_piece_of_error(seed: int):
    labels, truth = blobs(seed), np.roll(blobs(seed + 100), 1, axis=1)
    for organ in (1, 2):
        missed = (truth == organ) & (labels != organ)
        false = (truth != organ) & (labels == organ)
        pieces = pieces_by_hand(missed) + pieces_by_hand(false)
        click = next_click(labels, truth, organ)
        place = (click.y, click.x)
        (chosen,) = [piece for piece in pieces if place in piece]
        assert len(chosen) == max(map(len, pieces))
        assert click.inside == missed[place] and click.organ == organ
        mask = np.zeros(labels.shape, bool)
        mask[tuple(np.transpose(list(chosen)))] = True
        assert depth_by_hand(place, mask) == max(depth_by_hand(one, mask) for one in chosen)


def test_no_error_needs_no_click():
    assert next_click(blobs(0), blobs(0), 1) is None
    labels = np.where(blobs(0) == 2, 0, blobs(0))  # wrong about class 2 alone
    assert next_click(labels, blobs(0), 1) is None
    assert next_click(labels, blobs(0), 2).inside


def test_missed_and_false_pixels_that_touch_are_two_pieces():
    missed, false = np.zeros((2, 4, 9), bool)
    missed[:, :4], false[:, 4:8] = True, True
    assert np.array_equal(largest_piece(missed, false), missed)  # of equal ones the missed one
    false[0, 8] = True
    assert np.array_equal(largest_piece(missed, false), false)


def test_the_edge_of_the_slice_is_an_edge():
    assert inmost_pixel(np.ones((5, 7), bool)) == (2, 2)
    assert inmost_pixel(np.ones((1, 1), bool)) == (0, 0)


def test_a_random_user_clicks_on_every_pixel_of_error():
    labels, truth = blobs(1)[:6, :6], blobs(2)[:6, :6]
    chosen = [next_click(labels, truth, 1, np.random.default_rng(n)) for n in range(500)]
    wrong = np.argwhere((truth == 1) != (labels == 1)).tolist()
    assert {(click.y, click.x) for click in chosen} == set(map(tuple, wrong))
    assert all(click.inside == (truth[click.y, click.x] == 1) for click in chosen)


def write_data(folder: Path, *, labelled: bool = True) -> Path:
    """Write two test volumes whose images show their labels, and their list."""
    (folder / "test_vol_h5").mkdir(parents=True)
    (folder / "lists").mkdir()
    for seed, name in enumerate(("one", "two")):
        label = np.stack([blobs(seed + n) for n in range(5)]) * labelled
        image = np.stack([blobs(seed + n) for n in range(5)]) / 3
        with h5py.File(folder / "test_vol_h5" / f"{name}.npy.h5", "w") as file:
            file["image"], file["label"] = image.astype(np.float32), label.astype(np.uint8)
    (folder / "lists" / "test_vol.txt").write_text("one\ntwo\n")
    return folder


def write_adapter(folder: Path, prompt_prob: float = 0.5) -> Path:
    model = tiny_model(num_classes=SPEC.num_classes)
    model.train_all_weights()
    settings = {
        "vit_name": "vit_tiny",
        "img_size": 64,
        "num_classes": SPEC.num_classes,
        "class_names": list(SPEC.class_names),
        "spec": replace(SPEC, size=48).to_json(),
        "prompt_prob": prompt_prob,
    }
    model.save_lora_parameters(folder / "adapter.pth", settings)
    return folder / "adapter.pth"


def run(program: object, folder: Path, *flags: str) -> int:
    given = ["--volume_path", folder / "data", "--lora_ckpt", folder / "adapter.pth"]
    try:
        with exit_on_bad_input():
            program.main([*map(str, given), "--device", "cpu", *flags])
    except SystemExit as stop:
        return int(stop.code)
    return 0


@pytest.mark.slow
def test_no_click_is_what_test_py_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    write_data(tmp_path / "data")
    write_adapter(tmp_path)
    tested, clicked = tmp_path / "tested", tmp_path / "clicked"
    assert run(test_program, tmp_path, "--output_dir", str(tested), "--no_viewer") == 0
    embedded = []
    monkeypatch.setattr(
        Sam,
        "preprocess",
        lambda self, images, do=Sam.preprocess: embedded.append(len(images)) or do(self, images),
    )
    assert run(clicks, tmp_path, "--output", str(clicked), "--clicks", "0", "2") == 0
    assert sum(embedded) == 10  # each slice once
    expected = json.loads((tested / "results.json").read_text())
    found = json.loads((clicked / "clicks.json").read_text())
    for case in expected["cases"]:
        dsc = {name: scores["dsc"] for name, scores in case["scores"].items()}
        assert found["cases"][case["case"]]["0"] == dsc
        assert found["cases"][case["case"]]["2"] != dsc
    assert found["mean"]["0"] == expected["total"]["dsc"]
    assert [row["mean"]["dsc"] for row in expected["classes"]] == [
        found["classes"][name]["0"] for name in SPEC.class_names
    ]
    rows = (clicked / "clicks.csv").read_text().splitlines()
    assert rows[0] == "case,organ,clicks,dsc" and len(rows) == 1 + 2 * 2 * 3
    assert (clicked / "clicks.png").read_bytes().startswith(b"\x89PNG")
    assert f"{100 * found['mean']['2']:.2f}" in capsys.readouterr().out
    assert run(clicks, tmp_path, "--output", str(clicked), "--clicks", "1") == 0
    (clicked / "clicks.csv").write_text("mine")
    assert run(clicks, tmp_path, "--output", str(clicked), "--clicks", "1") == 2


def test_a_network_that_obeys_clicks_is_right_in_the_end(monkeypatch: pytest.MonkeyPatch):
    """Where the decoder gives every prompted pixel what the prompt says, clicks heal each pixel."""
    model = tiny_model(image_size=64, num_classes=2).eval()
    model.prompt_prob = 0.5
    predictor = OrganPredictor(model, ["a", "b"], input_size=64, img_size=64, by="network")

    def decode(self: object, embeddings: torch.Tensor, prompts: object, size: object) -> tuple:
        labels = np.zeros((len(embeddings), *size), np.uint8)
        for row in range(len(embeddings) if prompts else 0):
            for (x, y), kind, organ in zip(
                prompts.coords[row].round().int().tolist(),
                prompts.kinds[row].tolist(),
                prompts.organs[row].tolist(),
                strict=True,
            ):
                if kind == 1:
                    labels[row, y, x] = organ
        return labels, None

    monkeypatch.setattr(OrganPredictor, "decode", decode)
    truth = np.zeros((3, 64, 64), np.uint8)
    truth[0, 3, 4], truth[0, 9, 9], truth[2, 60, 5] = 1, 2, 1
    truth[2, 20:22, 20] = 2
    args = clicks.build_parser().parse_args(["--output", "x", "--clicks", "0", "1", "2"])
    args.num_classes, args.use_amp, args.input_slices = 2, False, 1
    sample = {"image": np.zeros(truth.shape, np.float32), "label": truth, "case_name": "a"}
    found = clicks.click_through(args, predictor, sample, lambda slices: None)
    assert found == {0: (0.0, 0.0), 1: (1.0, 0.8), 2: (1.0, 1.0)}


@pytest.mark.parametrize("by", ["reach", "network"])
def test_many_slices_are_corrected_as_one_by_one(by: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prediction, "DECODED", 3)
    model = tiny_model(num_classes=2).eval()
    model.prompt_prob = 0.5
    predictor = OrganPredictor(model, ["a", "b"], input_size=48, img_size=64, by=by)
    slices = np.random.default_rng(0).random((3, 24, 20), dtype=np.float32)
    given = [
        [Click(1, 3, 4), Click(2, 9, 9), Click(1, 1, 1, inside=False)],
        [],
        [Click(2, 5, 5) for _ in range(9)] + [Click(1, 6, 6)],
    ]
    embeddings = predictor.embed(torch.from_numpy(slices))
    before, _ = predictor.decode(embeddings, None, (24, 20))
    together = predictor.correct_slices(embeddings, given, before)
    for image, prompts, labels in zip(slices, given, together, strict=True):
        predictor.set_image(image)
        assert np.array_equal(labels, predictor.correct(prompts))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ("--clicks", "3", "1"),
            "ascending numbers without repetition; pass --clicks 1 3",
        ),
        (("--clicks", "1", "1"), "expected ascending"),
        (("--clicks", "-1"), "--clicks is -1, expected 0…100"),
        (("--clicks", "0.5"), "invalid int value"),
        (("--by", "network"), "knows no prompts"),
        (("labels",), "hold no labelled voxel (one, two)"),
    ],
)
def test_wrong_input_is_refused_before_any_click(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], told: str
):
    write_data(tmp_path / "data", labelled=flags != ("labels",))
    write_adapter(tmp_path, prompt_prob=0.0 if "--by" in flags else 0.5)
    flags = () if flags == ("labels",) else flags
    assert run(clicks, tmp_path, "--output", str(tmp_path / "out"), *flags) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and told in errors[0]
    assert not (tmp_path / "out").exists()
