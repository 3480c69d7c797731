"""Fingerprints of the source files that decide what is computed.

People edit these files for ablations. A run and an adapter record the fingerprints, so that nobody
continues a run, or tests an adapter, with other code by mistake.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
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
PROGRAMS = ("train.py", "trainer.py", "utils.py", "sam_lora_image_encoder.py")


def fingerprint_code(module: str, root: Path = REPOSITORY) -> dict[str, str]:
    """Return eight hexadecimal digits for every source file.

    Comments, docstrings and formatting do not change a fingerprint.

    Args:
        module: the LoRA variant in use, `--module`; its file counts too.
        root: folder of the project.
    """
    nested = [path for folder in FOLDERS for path in (root / folder).rglob("*.py")]
    top = [root / name for name in (*PROGRAMS, f"{module}.py")]
    files = sorted({path.relative_to(root) for path in (*nested, *top) if path.is_file()})
    return {str(file): _fingerprint((root / file).read_bytes()) for file in files}


def changed_files(before: Mapping[str, str] | None, now: Mapping[str, str]) -> list[str]:
    """Return the files that were edited, added or removed since `before` was recorded.

    Nothing counts as changed if `before` is None: older versions did not record it.
    """
    if not isinstance(before, Mapping):
        return []
    return sorted(file for file in {*before, *now} if before.get(file) != now.get(file))


@cache
def _fingerprint(source: bytes) -> str:
    words: list[str] = []
    # A file with a syntax error is being edited; it cannot be imported either.
    with contextlib.suppress(SyntaxError):
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


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return body[1:] if is_text else body
