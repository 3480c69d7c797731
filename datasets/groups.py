"""Which prepared slices and volumes belong together: as preprocessing recorded it, or by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.errors import InputError, warn
from common.files import read_json
from datasets.names import Grouping, case_of, group_names
from datasets.registry import SUMMARY_FILE


def groups_of(names: Sequence[str], folder: Path | None, *, slices: bool) -> Grouping:
    """Return the group of each slice or volume.

    Args:
        folder: holds the slices or volumes; None: only the names tell.
        slices: whether the names are of slices or pictures; else they are of whole scans.
    """
    recorded = recorded_groups(folder) if folder else {}
    found = {name: recorded.get(name) or recorded.get(case_of(name)) for name in names}
    if all(found.values()):
        return Grouping(found, {})
    return group_names(names, slices=slices)


def cases_of(names: Sequence[str], folder: Path | None) -> set[str]:
    """Return the cases and groups of slices, by all names that a test volume may have."""
    groups = groups_of(names, folder, slices=True).groups
    written = {case_of(name) for name in names if case_of(name) != name}
    return written | set(groups.values())


def recorded_groups(folder: Path) -> dict[str, str]:
    """Return the group of each case as preprocessing recorded it; empty without such a record."""
    for path in (folder / SUMMARY_FILE, folder.parent / SUMMARY_FILE):
        if not path.is_file():
            continue
        try:
            content = read_json(path, remedy="so only names tell which slices belong together")
            rows = content["cases"]
            return {str(row["case"]): str(row["group"]) for row in rows}
        except InputError as error:
            warn(str(error))
        except (KeyError, TypeError):
            continue  # another program wrote it
    return {}
