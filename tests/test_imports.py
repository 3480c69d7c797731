"""The direction of imports, as the README's table of files states it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# file or folder -> the project's modules that it may import
ALLOWED: dict[str, set[str]] = {
    "safe_io": set(),
    "interruption": set(),
    "losses": set(),
    "metrics": set(),
    "segment_anything": {"safe_io"},
    "datasets": {"safe_io"},
    "adapter_file": {"safe_io"},
    "run_folder": {"datasets", "safe_io"},
    "ranks": {"interruption", "safe_io"},
    "lora": {"adapter_file", "safe_io"},
    "packing": {"lora", "segment_anything"},
    "inference": {"datasets"},
    "scans": {"datasets", "safe_io"},
    "report": {"datasets", "metrics", "safe_io"},
    "preprocess": {"datasets", "safe_io", "scans"},
    "sam_lora_image_encoder": {"lora", "segment_anything"},
    "sam_lora_image_encoder_mask_decoder": {"lora", "sam_lora_image_encoder", "segment_anything"},
    "flags": {"datasets", "metrics", "segment_anything"},
    "config": {
        *("adapter_file", "datasets", "flags", "run_folder", "safe_io", "segment_anything"),
    },
    "utils": {
        *("adapter_file", "config", "datasets", "inference", "lora", "losses", "metrics"),
        *("run_folder", "safe_io", "scans", "segment_anything"),
    },
    "training": {
        *("config", "datasets", "inference", "interruption", "lora", "metrics", "ranks"),
        *("safe_io", "segment_anything"),
    },
    "trainer": {
        *("config", "datasets", "interruption", "losses", "ranks", "training", "utils"),
    },
    "predictions": {"datasets", "report", "safe_io", "scans", "utils"},
    "adapter": {"adapter_file", "config", "flags", "safe_io", "utils"},
    "train": {
        *("config", "datasets", "flags", "lora", "ranks", "run_folder", "safe_io", "trainer"),
        *("training", "utils"),
    },
    "test": {
        *("config", "datasets", "flags", "inference", "metrics", "packing", "ranks", "report"),
        *("safe_io", "scans", "utils"),
    },
    "predict": {
        *("config", "datasets", "flags", "inference", "packing", "predictions", "ranks"),
        *("safe_io", "scans", "utils"),
    },
}
ALLOWED["benchmarks"] = set(ALLOWED)  # it times everything; nothing but tests imports it


def project_files() -> list[Path]:
    """Every Python file but the tests."""
    packages = [path.parent for path in REPOSITORY.glob("*/__init__.py")]
    nested = [path for package in packages for path in package.rglob("*.py")]
    return sorted([*REPOSITORY.glob("*.py"), *nested])


def owner(path: Path) -> str:
    """The row of the table that a file belongs to."""
    return path.relative_to(REPOSITORY).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", project_files(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_point_down(path: Path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module.split(".")[0])
    own = owner(path)
    assert imported & ALLOWED.keys() - {own} <= ALLOWED[own]


def test_a_table_row_is_a_file_or_folder_and_the_other_way_round():
    assert ALLOWED.keys() == {owner(path) for path in project_files()}


@pytest.mark.parametrize("path", project_files(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_files_stay_short(path: Path):
    lines = len(path.read_text().splitlines())
    assert lines <= (400 if owner(path) in ("segment_anything", "config") else 330)
