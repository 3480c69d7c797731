"""The evidence of docs/ablations.md: base weights from phantoms, commands, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import train
from ablation.table import read_table
from common.errors import InputError
from config.flags import train_parser
from preprocess import phantom
from tools import evidence, phantom_base

SIZES = "--cases 3 --size 32 --slices 3 --epochs 1".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("base")
    file, work = folder / "base.pth", folder / "work"
    phantom_base.main(["--output", str(file), "--work", str(work), *SIZES])
    return file, work


@pytest.mark.slow
def test_the_base_is_a_plain_network_with_the_weights_of_its_run(base: tuple[Path, Path]):
    file, work = base
    state = torch.load(file, weights_only=True)
    trained = torch.load(next((work / "runs" / "base").glob("epoch_*.pth")), weights_only=True)
    assert not [key for key in state if "updates" in key or key.startswith("w_")]
    # One of every kind: the neck has no update, so it is the trained one bit by bit.
    key = "image_encoder.neck.0.weight"
    kept = [value for name, value in trained.items() if name.endswith(key)]
    assert len(kept) == 1 and torch.equal(state[key], kept[0])
    assert state["mask_decoder.mask_tokens.weight"].shape[0] == len(phantom_base.ORGANS) + 1


@pytest.mark.slow
def test_other_organs_are_adapted_from_the_base(base: tuple[Path, Path], tmp_path: Path):
    flags = "--cases 3 --size 32 --slices 3 --classes aorta liver".split()
    data = phantom_base.phantom_data(tmp_path / "adapt", flags, test_share=0.3)
    recipe = "--vit_name vit_tiny --img_size 32 --batch_size 2 --n_gpu 1 --max_iterations 1"
    words = f"--root_path {data} --output {tmp_path / 'runs'} --name one --ckpt {base[0]}"
    train.main(f"{words} {recipe} --fresh_heads".split())
    assert "heads: 0 of" in (tmp_path / "runs/one/log.txt").read_text()
    assert json.loads((tmp_path / "runs/one/config.json").read_text())["num_classes"] == 2


@pytest.mark.slow
def test_an_interrupted_base_goes_on_and_a_finished_one_is_kept(
    base: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file, work = base
    again = tmp_path / "again.pth"
    made = []
    monkeypatch.setattr(phantom, "main", made.append)
    phantom_base.main(["--output", str(again), "--work", str(work), *SIZES])
    assert not made  # the phantoms are those of before, and so is the run
    one, other = (torch.load(path, weights_only=True) for path in (file, again))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(InputError, match="exists"):
        phantom_base.main(["--output", str(file), "--work", str(work), *SIZES])
    with pytest.raises(InputError, match="--size is 40"):
        phantom_base.main(["--output", str(tmp_path / "new.pth"), "--size", "40"])


@pytest.mark.parametrize("name", evidence.TABLES)
def test_the_flags_of_a_table_are_flags_that_the_table_leaves_open(name: str, tmp_path: Path):
    args = evidence.build_parser().parse_args(["--output", str(tmp_path)])
    words = [str(word) for word in evidence.table_flags(args, name, Path("b.pth"), Path("data"))]
    table = read_table(words[0])
    given = words[words.index("--") + 1 :]
    values = train_parser().parse_args(["--root_path", "data", *given])
    assert values.vit_name == "vit_tiny" and values.ckpt.endswith("b.pth")
    varied = {flag for row in table.rows for flag in row.flags if flag not in ("config",)}
    assert not varied & {word[2:] for word in given if word.startswith("--")}


def test_the_page_has_a_place_for_every_table_and_keeps_its_text(tmp_path: Path):
    evidence.check_page(evidence.PAGE)
    page = tmp_path / "page.md"
    page.write_text("# Title\n<!-- rank -->\nold\n<!-- end of rank -->\nkept\n")
    with pytest.raises(InputError, match="<!-- targets -->"):
        evidence.check_page(page)
    result = tmp_path / "rank"
    test = result / "rank-4_s1" / "test"
    test.mkdir(parents=True)
    (result / "table.md").write_text("# Rank\n\n| row |\n| --- |\n| 4 |\n")
    (result / "plot.png").write_bytes(b"picture")
    environment = {"tested": "2026-11-26 10:00", "machine": "x86, 2 CPU cores", "torch": "2"}
    (test / "results.json").write_text(json.dumps({"environment": environment}))
    for _ in range(2):  # again, over itself
        evidence.fill_in(page, "rank", result)
        text = page.read_text()
        assert text.startswith("# Title\n<!-- rank -->\n\n### Rank\n\n| row |")
        assert text.endswith("<!-- end of rank -->\nkept\n") and "old" not in text
        assert "1 runs on x86, 2 CPU cores, torch 2; 2026-11-26." in text
    assert (tmp_path / "ablations_rank.png").read_bytes() == b"picture"


def test_a_dry_run_of_the_evidence_trains_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    called = []
    monkeypatch.setattr(phantom_base, "call", lambda name, *rest: called.append(name))
    monkeypatch.setattr(phantom_base, "phantom_data", lambda folder, flags, **rest: folder)
    evidence.main(["--output", str(tmp_path), "--only", "rank", "--dry_run"])
    assert called == ["ablate.py"]
