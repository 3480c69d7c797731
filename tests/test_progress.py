"""Where no progress bar is shown, training logs its position and the time left."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import TINY_FLAGS, write_slices

import train
from training import run


@pytest.mark.parametrize(("seconds", "lines"), [(0, 4), (60, 0)])
def test_the_log_has_position_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, lines: int
):
    monkeypatch.setattr(run, "NEWS_EVERY", seconds)
    data = write_slices(tmp_path / "data", count=4, size=32)
    flags = ["--batch_size", "2", "--max_epochs", "2", "--stop_epoch", "2"]
    train.main(["--root_path", str(data), "--output", str(tmp_path / "out"), *TINY_FLAGS, *flags])
    log = next((tmp_path / "out").glob("*/log.txt")).read_text()
    found = re.findall(r"step (\d) of 4, epoch (\d): (?:loss \d+\.\d+, )?about \d+ min left", log)
    assert len(found) == lines
    assert "loss nan" not in log
    assert [step for step, _ in found] == ["1", "2", "3", "4"][:lines]
