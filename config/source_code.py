"""Fingerprints of the source files that decide what is computed.

People edit these files for ablations. A run and an adapter record the fingerprints, so that nobody
continues a run, or tests an adapter, with other code by mistake.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = (
    "common",
    "config",
    "datasets",
    "distributed",
    "evaluation",
    "lora",
    "segment_anything",
    "training",
)
FILES = (
    "train.py",
    "trainer.py",
    "utils.py",
    "sam_lora_image_encoder.py",
    "sam_lora_image_encoder_mask_decoder.py",
)


def fingerprint_code(module: str, root: Path = REPOSITORY) -> dict[str, str]:
    """Return eight hexadecimal digits for every source file that training depends on.

    Comments, docstrings and formatting do not change a fingerprint.

    Args:
        module: the LoRA variant in use, `--module`. Its file counts too, and the files beside it
            that it imports.
        root: folder of the project.
    """
    nested = [
        path
        for folder in FOLDERS
        for path in (root / folder).rglob("*.py")
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    paths = [*nested, *(root / name for name in FILES if (root / name).is_file())]
    found = {str(path.relative_to(root)): fingerprint_file(path) for path in paths}
    return found | _variant_files(module, root)


def fingerprint_file(path: Path) -> str:
    """Return eight hexadecimal digits for a source file."""
    return _fingerprint(path.read_bytes())


def _variant_files(module: str, root: Path) -> dict[str, str]:
    """Return the fingerprints of a variant outside the published ones, and of what it imports."""
    # A script written against the original has imported its variant from a folder of its own.
    loaded = getattr(sys.modules.get(module), "__file__", None)
    file = Path(loaded or root / f"{module}.py")
    waiting = [file] if file.is_file() else []
    found: dict[str, str] = {}
    while waiting:
        path = waiting.pop()
        if path.name in found or path.name in FILES:
            continue
        source = path.read_bytes()
        found[path.name] = _fingerprint(source)
        beside = (path.with_name(f"{name}.py") for name in _imported(source))
        waiting += [file for file in beside if file.is_file()]
    return found


def _imported(source: bytes) -> set[str]:
    names: set[str] = set()
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names


def changed_files(before: Mapping[str, str] | None, now: Mapping[str, str]) -> list[str]:
    """Return the files that were edited, added or removed since `before` was recorded.

    Nothing counts as changed if `before` is no such record: older versions did not write it.
    """
    if not isinstance(before, Mapping) or not all(isinstance(file, str) for file in before):
        return []
    return sorted(file for file in {*before, *now} if before.get(file) != now.get(file))


@cache
def _fingerprint(source: bytes) -> str:
    words: list[str] = []
    # A file that cannot be parsed is being edited; it cannot be imported either.
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        _list_words(ast.parse(source), words)
        source = "\n".join(words).encode()
    return hashlib.sha256(source).hexdigest()[:8]


def _list_words(node: ast.AST, words: list[str]) -> None:
    """Append a syntax tree as words that are the same in every version of Python."""
    words.append(type(node).__name__)
    for name in node._fields:
        value = getattr(node, name, None)
        if name == "body" and isinstance(value, list):
            value = _without_docstring(value)
        # Newer versions of Python have more fields, which are empty where they mean nothing.
        if value is None or value == []:
            continue
        words.append(name)
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, ast.AST):
                _list_words(item, words)
            else:
                words.append(repr(item))
        words.append("]")  # Where a list ends is part of the code: `g(f(a), b)`, `g(f(a, b))`.
    words.append(")")


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return body[1:] if is_text else body
