"""Reading damaged files raises only `InputError`; writing is complete or leaves the old file."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from common import errors
from common.errors import InputError, exit_on_bad_input, require_package
from common.files import load_arrays
from common.names import safe_name
from common.state_dicts import unwrapped
from common.writing import atomic_path
from datasets.dataset_synapse import Synapse_dataset
from lora.adapter_file import read_adapter

REPOSITORY = Path(__file__).resolve().parent.parent
ROUNDS = 150


def write_pth(path: Path) -> None:
    state = {"w_a_000": torch.zeros(4, 8), "samed_settings": {"rank": 4, "class_names": ["a"]}}
    torch.save(state, path)


def write_old_pth(path: Path) -> None:
    torch.save({"w_a_000": torch.zeros(4, 8)}, path, _use_new_zipfile_serialization=False)


def write_npz(path: Path) -> None:
    np.savez(path, image=np.random.default_rng(0).random((8, 8)), label=np.zeros((8, 8)))


def write_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["image"] = np.random.default_rng(0).random((2, 8, 8), dtype=np.float32)
        file["label"] = np.zeros((2, 8, 8), dtype=np.uint8)


def read_slice(path: Path) -> None:
    load_arrays(path, ("image", "label"))


def read_h5(path: Path) -> None:
    (path.parent / "test_vol.txt").write_text("damaged\n")
    Synapse_dataset(path.parent, path.parent, "test_vol").check()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "write", "read"),
    [
        ("damaged.pth", write_pth, read_adapter),
        ("damaged.pth", write_old_pth, read_adapter),
        ("damaged.npz", write_npz, read_slice),
        ("damaged.npy.h5", write_h5, read_h5),
    ],
)
def test_damaged_bytes_never_cause_another_error(
    name: str, write: Callable, read: Callable, tmp_path: Path
):
    path = tmp_path / name
    write(path)
    read(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for number in range(ROUNDS):
        damaged = bytearray(whole)
        if number % 3 == 0:
            damaged = damaged[: rng.integers(0, len(whole))]
        for place in rng.integers(0, len(damaged), 4) if damaged else ():
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read(path)
        except InputError as error:
            refused += 1
            assert "damaged" in str(error) and "\n" not in str(error)
    assert refused > ROUNDS // 4  # some changes hit bytes that do not matter


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "/a", "a\\b"])
def test_a_name_cannot_leave_its_folder(name: str):
    with pytest.raises(InputError, match="plain"):
        safe_name(name, source="list")
    assert safe_name("case0001_slice000", source="list") == "case0001_slice000"


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_refusal_of_the_system_becomes_an_error_line(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped, exit_on_bad_input():
        raise PermissionError(errno.EACCES, "Permission denied", "/data/log.txt")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: /data/log.txt cannot be used (Permission denied)")
    # This error does not come from the user's files.
    with pytest.raises(ConnectionError), exit_on_bad_input():
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")


def test_a_state_dict_is_found_inside_a_checkpoint():
    weights = {"a.weight": torch.zeros(1), "b.bias": torch.ones(1)}
    for content in (
        weights,
        {"model": weights, "optimizer": {"state": {}}},
        {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
        {"model": {"model_state_dict": {f"model.module.{k}": v for k, v in weights.items()}}},
        {f"_orig_mod.{key}": value for key, value in weights.items()} | {"note": "plain"},
    ):
        found = unwrapped(content)
        assert {key: found[key] for key in weights} == weights
    one_without = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert unwrapped(one_without) == one_without


def test_content_without_weights_is_left_alone():
    endless: dict = {}
    endless["model"] = endless
    for content in (None, [1], "text", {}, {"model": {"lr": 1}}, {"model": 3}, {1: 2}):
        assert unwrapped(content) == content
    assert unwrapped(endless) is endless


@pytest.mark.parametrize(
    ("requirements", "command"),
    [
        ("requirements-onnx.txt", "pip install 'samed[onnx]'"),
        ("requirements.txt", "pip install --force-reinstall samed"),
    ],
)
def test_an_installed_project_names_its_extras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requirements: str, command: str
):
    """It has no requirement files."""
    for folder, told in (
        (REPOSITORY, f"pip install -r {requirements}"),
        (tmp_path, command),
    ):
        monkeypatch.setattr(errors, "__file__", str(folder / "common" / "errors.py"))
        with pytest.raises(InputError, match=f"run: {re.escape(told)}$"):
            require_package("a_package_that_is_not_there", requirements)
