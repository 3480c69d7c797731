"""A disk that is full or gone while a file is written: one error, and the older file stays.

A limit on the size of a file stands for the full disk: the system answers in the same way, and to
libraries in C as well.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from common import writing
from common.errors import InputError
from common.tensors import save_tensors
from common.writing import atomic_path, write_bytes, write_json, write_text
from datasets.registry import DATASETS
from datasets.scans.files import ScanFile
from datasets.scans.labels import write_index_picture, write_like
from datasets.scans.volumes import Geometry, read_volume, write_volume
from evaluation.charts import save
from evaluation.views import save_picture

NOISE = np.random.default_rng(0).integers(0, 9, (5, 16, 16), dtype=np.uint8)
PLACE = Geometry.unknown()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def volume(path: Path, seed: int) -> None:
    write_volume(path, np.roll(NOISE, seed), PLACE)


def like(path: Path, seed: int) -> None:
    scan = path.with_name(f"scan{''.join(path.suffixes)}")
    if not scan.exists():
        with largest_file(resource.RLIM_INFINITY):
            write_volume(scan, NOISE.astype(np.int16), PLACE)
    write_like(path, np.roll(NOISE, seed), ScanFile("scan", scan, "".join(path.suffixes)), PLACE)


def label_picture(path: Path, seed: int) -> None:
    spec = DATASETS["Synapse"]
    values = np.array((0, *spec.predicted_values), np.uint8)
    write_index_picture(path, np.roll(NOISE, seed)[0] % len(values), values, spec)


def picture(path: Path, seed: int) -> None:
    save_picture(Image.fromarray(np.roll(NOISE, seed)[0]), path)


def figure(path: Path, seed: int) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(1, 1))
    drawn.text(0, 0.5, f"{seed}")
    save(drawn, path)


def tensors(path: Path, seed: int) -> None:
    save_tensors({"a": torch.full((400,), float(seed))}, path)


def hdf5(path: Path, seed: int) -> None:
    with h5py.File(path, "w", driver="core", backing_store=False) as file:
        file["image"] = np.roll(NOISE, seed)
        file.flush()
        content = file.id.get_file_image()
    write_bytes(path, memoryview(content))


WRITERS = {
    "a.nii.gz": volume,
    "a.nii": volume,
    "a.nrrd": volume,
    "a.mha": volume,
    "b.nii.gz": like,
    "b.nii": like,
    "b.nrrd": like,
    "b.mha": like,
    "label.png": label_picture,
    "picture.png": picture,
    "figure.png": figure,
    "a.pth": tensors,
    "a.h5": hdf5,
    "a.json": lambda path, seed: write_json(path, [seed] * 99),
    "a.txt": lambda path, seed: write_text(path, f"{seed}\n" * 99),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_does_not_fit_never_gets_its_name(name: str, tmp_path: Path):
    write, path = WRITERS[name], tmp_path / name
    write(path, 1)
    before = path.read_bytes()
    write(path, 2)
    size = path.stat().st_size
    write(path, 1)
    assert path.read_bytes() == before  # equal contents give equal files
    files = set(tmp_path.iterdir())
    for missing in (1, 5, 9, size // 3, size - 20, size):
        with largest_file(size - missing), pytest.raises(InputError, match="cannot write") as told:
            write(path, 2)
        assert "File too large" in str(told.value) and str(path) in str(told.value), missing
        assert path.read_bytes() == before
        assert set(tmp_path.iterdir()) == files
    write(path, 2)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["a.json", "a.nii.gz", "picture.png", "a.pth", "a.h5"])
def test_a_disk_that_refuses_while_it_flushes_is_one_error(
    number: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    WRITERS[name](tmp_path / name, 1)
    before = (tmp_path / name).read_bytes()

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError, match=os.strerror(number)):
        WRITERS[name](tmp_path / name, 2)
    assert (tmp_path / name).read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / name]


@pytest.mark.parametrize("name", ["a.nii.gz", "b.nii", "a.mha", "a.nrrd", "label.png", "a.json"])
def test_a_file_that_reads_back_differently_never_gets_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, room = tmp_path / name, writing.require_room
    WRITERS[name](path, 1)
    before, own = path.read_bytes(), Path.write_bytes

    def lose(temporary: Path) -> None:
        """Lose the end of a file, as a library that stopped early."""
        content = temporary.read_bytes()
        own(temporary, content[: -len(content) // 3])

    monkeypatch.setattr(Path, "write_bytes", lambda path, content: own(path, content[:-3]))
    for place in ("datasets.scans.labels", "datasets.scans.volumes"):
        monkeypatch.setattr(f"{place}.require_room", lambda path: (lose(path), room(path)))
    with pytest.raises(InputError, match="reads back differently"):
        WRITERS[name](path, 2)
    assert path.read_bytes() == before


def test_a_folder_that_vanishes_is_one_error(tmp_path: Path):
    folder = tmp_path / "out"
    with pytest.raises(InputError, match="was removed"), atomic_path(folder / "a.txt") as temporary:
        temporary.write_text("a")
        temporary.unlink()
        folder.rmdir()


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr", ".img", ".hdr"])
def test_a_format_of_two_files_is_not_written(suffix: str, tmp_path: Path):
    with pytest.raises(InputError, match="two files"):
        write_volume(tmp_path / f"a{suffix}", NOISE, PLACE)
    assert not list(tmp_path.iterdir())


def test_a_label_picture_of_16_bits_reads_back(tmp_path: Path):
    values = np.array((0, 7, 500), np.uint16)
    write_index_picture(tmp_path / "a.png", NOISE[0] % 3, values, DATASETS["Synapse"])
    with Image.open(tmp_path / "a.png") as written:
        assert np.array_equal(np.asarray(written), values[NOISE[0] % 3])


def test_nan_and_single_slices_read_back(tmp_path: Path):
    array = np.array([[[np.nan, -0.0, np.inf]]], np.float32)
    for suffix in (".nii.gz", ".nrrd", ".mha"):
        write_volume(tmp_path / f"a{suffix}", array, PLACE)
        with pytest.raises(InputError, match="NaN"):
            read_volume(tmp_path / f"a{suffix}")
