"""Test runs as `results.json` files tell them, which anybody may have edited or damaged."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_json as read_json_file
from common.names import safe_name
from evaluation.metrics import ClassScore
from evaluation.tables import OUTCOMES, SAMED, SCORES, CaseResult, WorstSlice

SHARES = ("dsc", "nsd", "samed_dsc")  # scores from 0 to 1; the others are distances
LARGEST = 1e9  # distance or size in mm or voxels
MOST_VOXELS = 1 << 48  # of a case, so that sums have less than 64 bits
MOST_CLASSES = 255  # labels are uint8
LONGEST = 1000  # characters of a name


@dataclass(frozen=True)
class TestRun:
    """The content of a `results.json`."""

    path: Path
    class_names: list[str]
    results: list[CaseResult]
    definitions: dict[str, str]
    settings: dict[str, Any]  # flags and environment
    tolerance: float | None  # tolerance of NSD, mm; None: unknown
    trained_on: list[str] | None = None  # test cases that were trained on; None: unknown


def read_json(path: Path) -> TestRun:
    """Read a `results.json`.

    Raises:
        MissingFileError: there is no such file.
        InputError: the file is damaged or another program wrote it.
    """
    content = read_json_file(path, remedy="pass the folder that test.py wrote")
    try:
        run = _test_run(path, content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a results.json that test.py wrote ({type(error).__name__}: "
            f"{str(error)[:80]}); run test.py again"
        ) from None
    if not run.results or not run.class_names:
        raise InputError(f"{path} holds no case; run test.py again")
    return run


def _test_run(path: Path, content: dict[str, Any]) -> TestRun:
    names = _names([row["name"] for row in content["classes"]], "classes")
    if len(names) > MOST_CLASSES:
        raise ValueError(f"there are {len(names)} classes")
    _names([row["case"] for row in content["cases"]], "cases")
    return TestRun(
        path=path,
        class_names=names,
        results=[_case_result(row, names) for row in content["cases"]],
        definitions={key: _text(text, key) for key, text in content["definitions"].items()},
        settings={key: dict(content.get(key) or {}) for key in ("flags", "environment")},
        tolerance=_known(_number, content, "nsd_tolerance", LARGEST),
        trained_on=_known(_names, content, "trained_on_cases"),
    )


def _case_result(row: dict[str, Any], names: Sequence[str]) -> CaseResult:
    try:
        return CaseResult(
            row["case"],
            [_score(row["scores"][name]) for name in names],
            _known(_counts, row, "confusion", len(names) + 1),
            [_worst_slice(entry) for entry in row.get("worst", ())],
            slices=_known(_whole, row, "slices"),
            spacing=_known(_spacing, row, "spacing"),
            sides=_known(_text, row, "sides"),
            group=_known(_text, row, "group"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{row['case']:.40}: {error}") from None


def _score(values: dict[str, Any]) -> ClassScore:
    score = ClassScore(**values)
    if score.outcome not in OUTCOMES:
        raise ValueError(f"the outcome {score.outcome!r:.40} is unknown")
    for name in SCORES:
        most = 1 if name in SHARES else LARGEST
        if name in SAMED:
            _number(values[name], name, most)
        else:
            _known(_number, values, name, most)
    return score


def _worst_slice(values: dict[str, Any]) -> WorstSlice:
    for name in ("index", "wrong", "foreground"):
        _whole(values[name], name)
    _known(_whole, values, "organ_wrong")
    _known(_number, values, "error")
    for name in ("organ", "place"):
        _known(_text, values, name)
    for part in _text(values["picture"], "picture").split("/"):
        safe_name(part, source="picture")
    return WorstSlice(**values)


def _known(check: Callable[..., Any], row: dict[str, Any], name: str, *limits: Any) -> Any:
    """Return a checked value; None if it is null or absent, as in files of older versions."""
    return None if row.get(name) is None else check(row[name], name, *limits)


def _names(values: Sequence[Any], what: str) -> list[str]:
    names = [_text(value, what) for value in values]
    if len(set(names)) < len(names):
        raise ValueError(f"{what} repeat a name")
    return names


def _text(value: Any, what: str) -> str:
    good = type(value) is str and 0 < len(value) <= LONGEST
    if not good or any(unicodedata.category(character) == "Cc" for character in value):
        raise ValueError(f"{what}: {value!r:.40} is no text of one line")
    return value


def _number(value: Any, what: str, most: float = 1) -> float:
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise ValueError(f"{what}: {value!r:.40} is no number from 0 to {most:g}")
    return value


def _whole(value: Any, what: str, most: int = MOST_VOXELS) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{what}: {value!r:.40} is no whole number from 0 to {most}")
    return value


def _counts(rows: Any, what: str, size: int) -> list[list[int]]:
    if not all(type(part) is list and len(part) == size for part in (rows, *rows)):
        raise ValueError(f"{what} is not {size} x {size}")
    return [[_whole(count, what) for count in row] for row in rows]


def _spacing(sizes: Any, what: str) -> tuple[float, ...]:
    if type(sizes) is not list or len(sizes) != 3:
        raise ValueError(f"{what}: {sizes!r:.40} is no list of three sizes in mm")
    if min(_number(size, what, LARGEST) for size in sizes) <= 0:
        raise ValueError(f"{what}: {sizes!r:.40} holds a size of 0 mm")
    return tuple(map(float, sizes))
