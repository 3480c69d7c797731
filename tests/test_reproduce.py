"""From raw scans, or what was downloaded, to the printed table; small stand-ins for all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TINY_FLAGS, write_slices

import train
from common.files import sha256_of
from preprocess import phantom
from tools import reproduce
from tools.reproduce import MODELS, Model

TINY_TABLE = """
title = "A stand-in of the paper's table"
[base]
vit_name = "vit_tiny"
ckpt = "none"
img_size = 64
batch_size = 4
n_gpu = 1
max_epochs = 1
stop_epoch = 1
max_iterations = 2
[[rows]]
name = "SAMed"
published = "SAMed"
rank = 2
[[rows]]
name = "rank 3"
rank = 3
"""


def exit_code(*words: object) -> int:
    """Run the program in this process."""
    try:
        reproduce.main([*map(str, words)])
    except SystemExit as stop:
        return int(stop.code)
    return 0


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The flags of a machine onto which nothing was downloaded; no program may start."""
    models = {
        name: Model(model.encoder, str(tmp_path / model.adapter), model.url)
        for name, model in MODELS.items()
    }
    monkeypatch.setattr(reproduce, "MODELS", models)
    monkeypatch.setattr(reproduce, "run", lambda command: pytest.fail(f"{command} was started"))
    return ["--data", tmp_path / "data", "--testset", tmp_path / "testset", "--output", tmp_path]


def test_what_is_missing_is_one_list_with_links_and_hashes(
    nothing: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert exit_code(*nothing) == 2
    told = capsys.readouterr()
    assert all(model.adapter in told.out and model.url in told.out for model in MODELS.values())
    assert "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912" in told.out
    assert "dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth" in told.out
    assert "SHA-256 expected not known" in told.out and reproduce.TEST_SET in told.out
    assert told.err.count("\n") == 1 and "nothing was started" in told.err
    assert exit_code(*nothing, "--train", "--only", "SAMed") == 2
    told = capsys.readouterr().out
    assert reproduce.TRAINING_SET in told and "vit_b" in told
    assert "vit_h" not in told and "adapter of" not in told


def test_damaged_weights_and_missing_cases_are_found(
    nothing: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    weights = tmp_path / "checkpoints" / "sam_vit_b_01ec64.pth"
    weights.parent.mkdir()
    weights.write_bytes(b"half of it")
    (tmp_path / "checkpoints" / "epoch_159.pth").write_bytes(b"an adapter")
    monkeypatch.setattr(reproduce, "REPOSITORY", tmp_path)
    volumes = tmp_path / "testset" / "test_vol_h5"
    volumes.mkdir(parents=True)
    for case in reproduce.SYNAPSE.test_cases[1:]:
        (volumes / f"{case}.npy.h5").write_bytes(b"")
    assert exit_code(*nothing) == 2
    told = capsys.readouterr()
    assert f"damaged  {weights}" in told.out and sha256_of(weights) in told.out
    assert "lacks case0008" in told.err
    assert "SAMed_h" not in told.out  # only the adapter that is there is to be tested


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "SAM"], "expected SAMed, SAMed_s, SAMed_h"),
        (["--table", "x.toml"], "no effect without --train"),
        (["--raw", "/nowhere"], "--raw /nowhere does not exist"),
    ],
)
def test_wrong_flags(nothing: list[object], words: list[str], told: str, capsys):
    assert exit_code(*nothing, *words) == 2
    assert told in capsys.readouterr().err


def raw_scans(folder: Path) -> Path:
    """Make phantoms in the layout of the raw BTCV data."""
    phantom.main(["--output", str(folder), "--cases", "6", "--size", "48", "--slices", "8"])
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("quick_python")
def test_raw_scans_and_adapters_to_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    run = "--max_epochs 1 --stop_epoch 1 --max_iterations 1 --batch_size 2 --name one".split()
    slices = write_slices(tmp_path / "slices")
    words = ["--root_path", str(slices), "--output", str(tmp_path / "runs")]
    train.main([*TINY_FLAGS, *run, *words, "--list_dir", str(slices / "lists")])
    adapter = str(next((tmp_path / "runs" / "one").glob("epoch_*.pth")))
    monkeypatch.setattr(reproduce, "MODELS", {"SAMed": Model("vit_tiny", adapter, "nowhere")})
    raw, data = raw_scans(tmp_path / "raw"), tmp_path / "data"
    flags = ["--output", tmp_path / "out", "--device", "cpu"]
    assert exit_code("--raw", raw, "--data", data, *flags) == 0
    out = capfd.readouterr().out
    assert "preprocess.prepare" in out and "81.88" in out and "do not compare" in out
    table = json.loads((tmp_path / "out" / "adapters" / "table.json").read_text())
    (row,) = table["rows"]
    results = tmp_path / "out" / "adapters" / "SAMed_s1234" / "test" / "results.json"
    assert (
        row["scores"]["samed_dsc"]["mean"] == json.loads(results.read_text())["total"]["samed_dsc"]
    )
    # The prepared data again, as if they had been downloaded.
    assert exit_code("--data", data, "--testset", tmp_path / "no", *flags) == 0
    assert "preprocess.prepare" not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("quick_python")
def test_raw_scans_to_a_trained_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "tiny.toml").write_text(TINY_TABLE)
    raw = raw_scans(tmp_path / "raw")
    words = ["--data", tmp_path / "data", "--output", tmp_path / "out", "--device", "cpu"]
    assert exit_code("--raw", raw, "--train", "--table", tmp_path / "tiny.toml", *words) == 0
    out = capfd.readouterr().out
    assert "SAMed (base)" in out and "rank 3" in out and "81.88" in out
    assert (tmp_path / "out" / "tiny" / "index.html").is_file()
