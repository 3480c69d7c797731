"""Which cases belong to one scan or patient: by `--group`, else by their names."""

from __future__ import annotations

import contextlib
import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from common.errors import InputError, first_few, warn
from common.files import require_file
from datasets.names import group_names
from preprocess.raw_cases import RawCase

AUTO, NONE, TABLE = "auto", "none", ".csv"
REMEDY = (
    "--group 'PATTERN' (a regular expression whose part in parentheses is the scan or patient), "
    "--group FILE.csv (columns file and group) or --group none corrects this"
)


def check_group_flag(value: str) -> None:
    """Refuse a `--group` that is no pattern with one group; a table is checked when it is read."""
    if value in (AUTO, NONE) or value.lower().endswith(TABLE):
        return
    try:
        groups = re.compile(value).groups
    except re.error as error:
        raise InputError(
            f"--group is {value!r}, which is not a regular expression ({error}); {REMEDY}"
        ) from None
    if groups != 1:
        raise InputError(
            f"--group is {value!r} with {groups} parts in parentheses, expected auto, none, "
            "FILE.csv or a regular expression with one such part, the scan or patient, e.g. "
            "'(.+)_slice'"
        )


def group_cases(cases: dict[str, RawCase], rule: str) -> dict[str, RawCase]:
    """Give each case its group, and print what groups were found.

    Args:
        rule: value of `--group`.

    Returns:
        The cases with their groups by their former names. Pictures that are slices of a scan get
        the name SCAN_sliceNUMBER if their names decide about the group.

    Raises:
        InputError: the pattern does not match a name, the table lacks a file, or two pictures would
            get the same name.
    """
    pictures = all(case.image.is_picture for case in cases.values())
    if rule == AUTO:
        grouped = _grouped_by_name(cases, pictures)
    elif rule == NONE:
        grouped = dict(cases)
    else:
        table = rule.lower().endswith(TABLE)
        groups = _read_table(Path(rule), cases) if table else _match_pattern(rule, list(cases))
        grouped = {name: replace(case, group=groups[name]) for name, case in cases.items()}
    sizes = Counter(case.group for case in grouped.values())
    what = "pictures" if pictures else "scans"
    if len(sizes) < len(grouped):
        shown = first_few([f"{group} ({count})" for group, count in sizes.most_common()], 8)
        kind = "scans" if pictures else "patients"
        print(
            f"{len(grouped)} {what} of {len(sizes)} {kind} were found (--group {rule}): {shown}; "
            "a random split keeps each together"
        )
    elif pictures:
        print(f"each of {len(grouped)} pictures is a case of its own (--group {rule})")
    return grouped


def _grouped_by_name(cases: dict[str, RawCase], pictures: bool) -> dict[str, RawCase]:
    """Group cases by `datasets.names.group_names`, and name slices as the other programs do."""
    found = group_names(list(cases), slices=pictures)
    for doubt in found.doubts:
        warn(f"{doubt}; {REMEDY}")
    alone = [name for name in cases if name not in found.slices] if found.slices else []
    if alone:
        warn(
            f"{len(alone)} pictures have no number at the end of their name, so each is a case: "
            f"{first_few(alone)}"
        )
    renamed: dict[str, RawCase] = {}
    taken: dict[str, RawCase] = {}
    for name, case in cases.items():
        new_name = name
        if name in found.slices:
            scan, number = found.slices[name]
            new_name = f"{scan}_slice{number}"
        if new_name in taken:
            both = f"{taken[new_name].image.path.name} and {case.image.path.name}"
            raise InputError(
                f"{both} would both become {new_name}; rename one of them, or pass --group none"
            )
        taken[new_name] = case
        renamed[name] = replace(
            case, name=new_name, group=found.groups[name], is_slice=name in found.slices
        )
    return renamed


def _match_pattern(pattern: str, names: Sequence[str]) -> dict[str, str]:
    """Return what the pattern finds in each name."""
    found = {name: match[1] for name in names if (match := re.search(pattern, name)) and match[1]}
    others = [name for name in names if name not in found]
    if others:
        raise InputError(
            f"--group {pattern!r} finds no scan in {len(others)} of {len(names)} names, e.g. "
            f"{first_few(others)}; correct the pattern, or pass a table FILE.csv with the columns "
            "file and group"
        )
    return found


@contextlib.contextmanager
def _csv_errors(path: Path) -> Iterator[None]:
    """Name the table that is none, e.g. because a quotation mark is never closed."""
    try:
        yield
    except csv.Error as error:
        raise InputError(f"{path} is not a CSV table ({error}); correct it") from None


def _read_table(path: Path, cases: dict[str, RawCase]) -> dict[str, str]:
    """Read the group of each case from a CSV file with the columns file and group.

    The columns may be divided by semicolons or tabs, as spreadsheets do in some countries.
    """
    require_file(path, what="--group", remedy="expected a CSV file with the columns file and group")
    with (
        path.open(newline="", encoding="utf-8-sig", errors="replace") as file,
        _csv_errors(path),
    ):
        header = file.readline()
        divider = next((sign for sign in ",;\t" if sign in header), ",")
        columns = [name.strip() for name in next(csv.reader([header], delimiter=divider), [])]
        lowered = [name.lower() if name.lower() in ("file", "group") else name for name in columns]
        reader = csv.DictReader(file, lowered, delimiter=divider)
        if not {"file", "group"} <= set(reader.fieldnames or ()):
            raise InputError(
                f"{path} has the columns {first_few(reader.fieldnames or ['none'])}, expected file "
                "and group"
            )
        rows: dict[str, str] = {}
        for row in reader:
            name, group = Path((row["file"] or "").strip()).name, (row["group"] or "").strip()
            if rows.setdefault(name, group) != group:
                raise InputError(
                    f"{path} gives {name} the groups {rows[name]} and {group}; expected one group "
                    "for each name, so correct a line, or rename files of equal names"
                )
    found, used = {}, set()
    for name, case in cases.items():
        for known in (case.image.path.name, case.image.name, case.label.path.name, name):
            if rows.get(known):
                found[name] = rows[known]
                used.add(known)
                break
    absent = [name for name in cases if name not in found]
    if absent:
        raise InputError(
            f"{path} gives no group for {len(absent)} of {len(cases)} files, e.g. "
            f"{first_few(absent)}; add a line for each"
        )
    unused = [name for name in rows if name and name not in used]
    if unused:
        warn(f"{path} names {first_few(unused)}, which the data set does not have")
    return found
