"""The direction of imports and the size of files and functions, as CONTRIBUTING.md states them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# Top to bottom: a file imports only from rows below its own.
ROWS = (
    ("setup", "samed", "benchmarks"),
    ("tools",),
    ("demo",),
    ("demo_page",),
    ("train", "test", "predict", "ablate"),
    ("ablation",),
    ("trainer",),
    ("utils",),
    ("training",),
    ("config",),
    ("sam_lora_image_encoder_mask_decoder",),
    ("sam_lora_image_encoder",),
    ("preprocess",),
    ("correction",),
    ("prediction",),
    ("evaluation",),
    ("datasets",),
    ("lora",),
    ("segment_anything",),
    ("distributed",),
    ("common",),
)
HEIGHT = {name: -index for index, row in enumerate(ROWS) for name in row}
MOST_LINES, MOST_LINES_OF_SAM = 330, 400  # of a file
MOST_FUNCTION_LINES, MOST_LINES_OF_THE_LOOP, MOST_PARAMETERS = 60, 80, 8


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


def definitions(path: Path) -> list[ast.FunctionDef]:
    """Every function of a file, at any depth."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", project_files(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_functions_stay_short(path: Path):
    """Tables of flags may be long, and the original's interfaces have the parameters they have."""
    found = []
    for function in definitions(path):
        if function.name in ("build_parser", "test_single_volume"):
            continue
        lines = function.end_lineno - function.lineno + 1
        parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        count = len([p for p in parameters if p.arg not in ("self", "cls")])
        most = MOST_LINES_OF_THE_LOOP if function.name == "trainer_synapse" else MOST_FUNCTION_LINES
        if lines > most or count > MOST_PARAMETERS:
            found.append(f"{function.name}: {lines} lines, {count} parameters")
    assert found == []


@pytest.mark.parametrize("path", project_files(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_arguments_are_written_out(path: Path):
    """No `f(*(a, b), c)` and no `f(**{"a": 1})`, which hide what an argument means."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            stars = [arg.value for arg in node.args if isinstance(arg, ast.Starred)]
            stars += [keyword.value for keyword in node.keywords if keyword.arg is None]
            assert not any(isinstance(star, (ast.Tuple, ast.List, ast.Dict)) for star in stars)
