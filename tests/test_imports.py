"""The direction of imports, as the README's table of files states it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
VARIANTS = {"sam_lora_image_encoder", "sam_lora_image_encoder_mask_decoder"}
# file or folder -> the project's modules that it may import
ALLOWED: dict[str, set[str]] = {
    "safe_io": set(),
    "segment_anything": {"safe_io"},
    "datasets": {"safe_io"},
    "adapter_file": {"safe_io"},
    "run_folder": {"safe_io"},
    "lora": {"adapter_file", "safe_io"},
    "losses": set(),
    "metrics": set(),
    "volumes": {"safe_io"},
    "orientation": {"volumes"},
    "scans": {"safe_io", "volumes"},
    "label_files": {"datasets", "safe_io", "scans", "volumes"},
    "predictions": {
        *(
            "datasets",
            "figures",
            "label_files",
            "orientation",
            "safe_io",
            "scans",
            "utils",
            "volumes",
        ),
    },
    "adapter": {"adapter_file", "config", "flags", "safe_io", "utils"},
    "predict": {
        *("config", "datasets", "flags", "inference", "packing", "predictions", "ranks", "run_log"),
        *("safe_io", "scans", "utils"),
    },
    "preprocess": {"safe_io", "datasets", "orientation", "scans", "volumes"},
    "tables": {"safe_io", "metrics"},
    "figures": {"safe_io", "metrics", "datasets", "tables"},
    "report": {"safe_io", "metrics", "datasets", "figures", "tables"},
    "inference": {"datasets"},
    "packing": {"lora", "segment_anything"},
    "sam_lora_image_encoder": {"lora", "segment_anything"},
    "sam_lora_image_encoder_mask_decoder": {"lora", "segment_anything", "sam_lora_image_encoder"},
    "flags": {"datasets", "metrics", "segment_anything"},
    "config": {
        *("adapter_file", "flags", "run_folder", "safe_io", "datasets", "segment_anything"),
    },
    "interruption": set(),
    "ranks": {"interruption", "safe_io"},
    "memory": set(),
    "run_log": {"datasets", "safe_io"},
    "utils": {
        *("safe_io", "segment_anything", "lora", "losses", "metrics", "inference", "volumes"),
        *("adapter_file", "config", "datasets", "run_folder"),
    },
    "batches": {"datasets", "interruption", "ranks"},
    "training_state": {"config", "interruption", "lora", "ranks", "run_log", "safe_io"},
    "validation": {
        *("datasets", "inference", "metrics", "ranks", "run_log", "safe_io", "training_state"),
    },
    "curves": {"datasets", "run_log", "safe_io"},
    "data_check": {"datasets", "safe_io", "validation"},
    "trainer": {
        *("batches", "config", "curves", "datasets", "interruption", "losses", "ranks"),
        *("run_log", "training_state", "utils", "validation"),
    },
    "train": {
        *(
            "config",
            "flags",
            "data_check",
            "datasets",
            "lora",
            "memory",
            "ranks",
            "run_folder",
            "run_log",
        ),
        *("safe_io", "trainer", "utils", "validation"),
    },
    "test": {
        *("config", "datasets", "figures", "flags", "inference", "metrics", "orientation"),
        *("packing", "ranks", "report", "run_log", "safe_io", "tables", "utils", "volumes"),
    },
}
ALLOWED["benchmarks"] = set(ALLOWED)  # it times everything; nothing but tests imports it


def project_files() -> list[Path]:
    """Every Python file but the tests."""
    folders = ("segment_anything", "datasets", "preprocess", "benchmarks")
    nested = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
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


@pytest.mark.parametrize("path", project_files(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_files_stay_short(path: Path):
    lines = len(path.read_text().splitlines())
    assert lines <= (400 if owner(path) in ("segment_anything", "config") else 330)
