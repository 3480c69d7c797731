"""Names that become paths, lines of lists or cells of tables: one rule for all programs."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from common.errors import InputError


def safe_name(name: str, *, source: str | Path) -> str:
    """Return `name` if it is one plain path component, else refuse it (`../`, `/`, empty)."""
    if not name or name in (".", "..") or "\\" in name or PurePosixPath(name).name != name:
        raise InputError(
            f"{source} names {name!r}, expected a plain case or slice name without folders; "
            "correct that line"
        )
    return name
