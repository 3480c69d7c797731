"""Data sets that are nearly as expected: taken as they are meant, or refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_own_data import NNUNET, cases_of, run_prepare, write_set

from datasets.registry import stored_spec

ERRORS = pytest.CaptureFixture[str]


def write_pictures(root: Path, pictures: dict[str, np.ndarray], ending: str = ".png") -> Path:
    """Pictures with masks of 0 and 1 in two plain folders."""
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(root / "images" / f"{name}{ending}")
        mask = (np.arange(picture.shape[0] * picture.shape[1]) % 2).astype(np.uint8)
        Image.fromarray(mask.reshape(picture.shape[:2])).save(root / "labels" / f"{name}.png")
    return root


def refused(root: Path, output: Path, capfd: ERRORS, *flags: str) -> str:
    """The one sentence that a data set is refused with."""
    capfd.readouterr()
    assert run_prepare(root, output, *flags) == 2
    told = capfd.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in told
    return lines[0]


def test_a_case_whose_name_begins_as_anothers_keeps_its_slices(tmp_path: Path):
    root, output = write_set(tmp_path / "raw", NNUNET, cases=3), tmp_path / "data"
    for kind, channel in (("imagesTr", "_0000"), ("labelsTr", "")):
        path = root / kind / f"pat2{channel}.nii.gz"
        path.rename(path.with_name(f"pat1_slice2{channel}.nii.gz"))
    cases = ["--train_cases", "pat1", "pat1_slice2", "--test_cases", "pat0"]
    assert run_prepare(root, output, *cases) == 0
    slices = sorted(path.name for path in (output / "train_npz").iterdir())
    (output / ".done" / "pat1.json").unlink()  # it is prepared again
    (output / "train_npz" / ".7.partial.pat1_slice2_slice000.npz").touch()  # being written
    (output / "train_npz" / ".7.partial.pat1_slice000.npz").touch()  # of a killed run
    assert run_prepare(root, output, *cases) == 0
    left = sorted(path.name for path in (output / "train_npz").iterdir())
    assert left == [".7.partial.pat1_slice2_slice000.npz", *slices] and len(slices) == 8
