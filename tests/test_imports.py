"""The direction of imports and the size of files and functions, as CONTRIBUTING.md states them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# Top to bottom: a file imports only from rows below its own.
ROWS = (
    ("benchmarks", "tools"),
    ("train", "test", "predict"),
    ("trainer",),
    ("utils",),
    ("training",),
    ("config",),
    ("sam_lora_image_encoder_mask_decoder",),
    ("sam_lora_image_encoder",),
    ("preprocess",),
    ("evaluation",),
    ("datasets",),
    ("lora",),
    ("segment_anything",),
    ("distributed",),
    ("common",),
)
HEIGHT = {name: -index for index, row in enumerate(ROWS) for name in row}
MOST_LINES, MOST_LINES_OF_SAM = 330, 400  # of a file


def project_files() -> list[Path]:
    """Every Python file but the tests."""
    packages = [path.parent for path in REPOSITORY.glob("*/__init__.py")]
    nested = [path for package in packages for path in package.rglob("*.py")]
    return sorted([*REPOSITORY.glob("*.py"), *nested])


def owner(path: Path) -> str:
    """The row of the table that a file belongs to."""
    return path.relative_to(REPOSITORY).parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    """The top-level modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", project_files(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_point_down(path: Path):
    own = owner(path)
    ours = imported_names(path) & HEIGHT.keys() - {own}
    assert {name for name in ours if HEIGHT[name] >= HEIGHT[own]} == set()


def test_a_row_is_a_file_or_folder_and_the_other_way_round():
    assert HEIGHT.keys() == {owner(path) for path in project_files()}


@pytest.mark.parametrize("path", project_files(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_files_stay_short(path: Path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= (MOST_LINES_OF_SAM if owner(path) == "segment_anything" else MOST_LINES)
