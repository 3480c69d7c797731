"""A name in a file never decides what code runs: variants come from the project's own folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import sam_lora_image_encoder
from common.errors import InputError
from config.flags import predict_parser, train_parser
from config.settings import parse_args
from lora.variants import load_variant, variant_file

RUN = 'open(__file__ + ".ran", "w")\n'
OWN = """
from dataclasses import dataclass

import sam_lora_image_encoder


@dataclass
class Places:
    first: int = 0


class LoRA_Sam(sam_lora_image_encoder.LoRA_Sam):
    pass
"""


def adapter_that_names(module: object, path: Path) -> Path:
    model = tiny_model()
    model.save_lora_parameters(path, {"img_size": 64, "vit_name": "vit_tiny", "num_classes": 2})
    state = torch.load(path, weights_only=True)
    state["samed_settings"]["module"] = module
    torch.save(state, path)
    return path


NAMES = [
    "antigravity",
    "this",
    "os",
    "os.path",
    "tests.conftest",
    "lora.model",
    "utils",
    "train",
    "test",
    "conftest",
    "../evil",
    "/tmp/evil",
    "sam_lora_image_encoder.py",
    "sam_lora_image_encoder\n",
    "SAM_LORA_IMAGE_ENCODER",
    "ｓam_lora_image_encoder",
    "*",
    "",
    ".",
    "a\0b",
]


@pytest.mark.parametrize("name", NAMES)
def test_other_names_are_refused_and_import_nothing(name: str):
    before = set(sys.modules)
    with pytest.raises(InputError, match="--module"):
        load_variant(name)
    assert set(sys.modules) == before


@pytest.mark.parametrize("name", ["antigravity", "innocent", "os.path", "a\0b", 5, None, ["x"]])
def test_an_adapter_cannot_have_another_module_imported(
    name: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "innocent.py").write_text(RUN + OWN)
    monkeypatch.syspath_prepend(elsewhere)
    monkeypatch.chdir(elsewhere)
    adapter = adapter_that_names(name, tmp_path / "a.pth")
    before = set(sys.modules)
    with pytest.raises(InputError, match="module"):
        parse_args(
            predict_parser(),
            ["--lora_ckpt", str(adapter), "--input", "scan", "--output", "out", "--device", "cpu"],
        )
    assert not (elsewhere / "innocent.py.ran").exists()
    assert set(sys.modules) == before


def test_a_file_is_read_before_it_is_run(project: Path):
    for name, text in {
        "script": RUN + "from sam_lora_image_encoder import LoRA_Sam\n",
        "nothing": RUN,
        "inside": RUN + "def f():\n    class LoRA_Sam: pass\n",
        "broken": RUN + "class LoRA_Sam(:\n",
        "zeros": RUN + "\0",
        "deep": RUN + "(" * 100_000,
    }.items():
        (project / f"{name}.py").write_text(text)
        with pytest.raises(InputError, match=f"--module {name}"):
            load_variant(name)
        assert not (project / f"{name}.py.ran").exists()


def test_only_files_of_the_folder_itself_count(project: Path, tmp_path: Path):
    (tmp_path / "outside.py").write_text(OWN)
    (project / "linked.py").symlink_to(tmp_path / "outside.py")
    (project / "package.py").mkdir()
    (project / "package.py" / "__init__.py").write_text(OWN)
    (project / "plain").mkdir()
    (project / "plain" / "__init__.py").write_text(OWN)
    os.mkfifo(project / "fifo.py")
    (project / "native.so").write_bytes(b"\x7fELF")
    (project / "gone.py").symlink_to(project / "nowhere.py")
    for name in ("linked", "package", "plain", "fifo", "native", "gone", "project"):
        with pytest.raises(InputError, match=f"--module {name}"):
            variant_file(name)


def test_a_variant_of_ones_own_works_and_runs_once(project: Path):
    (project / "my_own.py").write_text(RUN + OWN)
    own = load_variant("my_own")
    assert issubclass(own, sam_lora_image_encoder.LoRA_Sam) and own.__module__ == "my_own"
    assert load_variant("my_own") is own
    (project / "alias.py").write_text("import my_own\nLoRA_Sam = my_own.LoRA_Sam\n")
    assert load_variant("alias") is own


def test_a_folder_of_ones_own_is_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "elsewhere_own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)  # The current folder by itself is not searched.
    with pytest.raises(InputError, match="or in the folder that the environment variable SAMED_VA"):
        variant_file("elsewhere_own")
    monkeypatch.setenv("SAMED_VARIANTS", ".")
    assert variant_file("elsewhere_own") == tmp_path / "elsewhere_own.py"
    # A name that both folders have would mean one file and run the other.
    (tmp_path / "sam_lora_image_encoder.py").write_text(OWN)
    with pytest.raises(InputError, match=r"and also .*; rename your own file"):
        variant_file("sam_lora_image_encoder")
    monkeypatch.setenv("SAMED_VARIANTS", "absent")
    with pytest.raises(InputError, match="SAMED_VARIANTS is 'absent', which is no folder"):
        variant_file("elsewhere_own")


def test_the_published_variant_is_the_one_that_scripts_import():
    assert load_variant("sam_lora_image_encoder") is sam_lora_image_encoder.LoRA_Sam


def test_a_variant_cannot_take_the_name_of_a_library(project: Path):
    (project / "json.py").write_text(RUN + OWN)
    with pytest.raises(InputError, match=r"--module json has the name of a module of Python"):
        load_variant("json")
    assert not (project / "json.py.ran").exists()


def test_a_variant_that_fails_is_not_kept(project: Path):
    (project / "failing.py").write_text(OWN + "\nraise OSError('mine')\n")
    for _ in range(2):
        with pytest.raises(OSError, match="mine"):
            load_variant("failing")


def test_config_json_cannot_have_another_module_imported(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "innocent.py").write_text(RUN + OWN)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "config.json").write_text('{"program": "SAMed", "module": "innocent"}')
    with pytest.raises(InputError, match="--module innocent does not exist"):
        parse_args(train_parser(), ["--config", str(tmp_path), "--root_path", "data"])
    assert not (tmp_path / "innocent.py.ran").exists()
