"""A table of ablations: rows of flags, each trained with several seeds, as a TOML file lists them.

title = "Rank of the updates"
seeds = [1234, 1235, 1236]          # default: [1234]
base_row = "rank 4"                 # the row that the others are compared with; default: first

[base]                              # flags of train.py in every row
config = "recipes/samed.json"       # relative to the repository

[axes]                              # either a grid: a row for every combination,
rank = [1, 4, 16]

[[rows]]                            # or named rows
name = "SAMed_s"
published = "SAMed_s"               # its numbers in ablation/published.json
config = "recipes/samed_s.json"

[test]                              # flags of test.py in every row
nsd_tolerance = 1.0
"""

from __future__ import annotations

import hashlib
import itertools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablation.published import read_published
from common.console import printable
from common.errors import InputError, first_few, first_line
from common.files import require_file
from config.flags import test_parser, train_parser
from config.parser import Flag, Parser, without_second_names
from config.run_folder import read_config_file
from config.settings import REPOSITORY, config_path

SEED = 1234
LARGEST_FILE = 1 << 20  # bytes
MOST_CELLS = 10_000
LONGEST_TEXT = 100  # characters of a title or the name of a row
# Characters of a run folder's name, as `--name` allows.
LONGEST_NAME = 60
KEYS = {
    "title": str,
    "base": dict,
    "test": dict,
    "seeds": list,
    "axes": dict,
    "rows": list,
    "base_row": str,
}
ROW_KEYS = ("name", "published")  # of a row, beside its flags
# Flags that ablate.py sets itself, or that mean nothing in a table.
SET_BY_RUNNER = {
    "train.py": (
        *("root_path", "output", "name", "seed", "resume", "restart", "check", "device"),
        *("processes", "same_code", "note"),
    ),
    # What the run's adapter records is not to be said again.
    "test.py": (
        *("config", "volume_path", "output_dir", "overwrite", "lora_ckpt", "device", "processes"),
        *("seed", "same_code", "list_dir", "dataset", "ckpt", "module"),
    ),
}


@dataclass(frozen=True)
class Row:
    """One row of a table: the flags of train.py that tell it from the others, and those of all."""

    name: str
    flags: dict[str, Any]
    published: str | None = None  # key of published.json


@dataclass(frozen=True)
class Cell:
    """One run of a table: a row with one seed."""

    row: Row
    seed: int
    name: str  # of the run folder below --output


@dataclass(frozen=True)
class Table:
    """The content of a table file."""

    path: Path
    title: str
    base: str  # name of the row that the others are compared with
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    axes: tuple[str, ...] = ()  # names of the flags of a grid
    test: dict[str, Any] = field(default_factory=dict)  # flags of test.py

    @property
    def cells(self) -> list[Cell]:
        """All runs: the seeds of the first row, then those of the second, and so on."""
        return [
            Cell(row, seed, folder_name(row.name, seed)) for row in self.rows for seed in self.seeds
        ]


def folder_name(row: str, seed: int) -> str:
    """Return the name of the run folder of a row's run: `rank-4_s1234`.

    Of a long name, the end is a hash.
    """
    plain, end = re.sub(r"[^\w.-]+", "-", row, flags=re.ASCII).strip(".-"), f"_s{seed}"
    if not plain or len(plain) + len(end) > LONGEST_NAME:
        digest = hashlib.sha256(row.encode()).hexdigest()[:8]
        plain = f"{plain[: LONGEST_NAME - len(end) - 9]}-{digest}".lstrip("-")
    return plain + end


def read_table(path: str | Path) -> Table:
    """Read a table file.

    The combinations of flags are checked by `ablation.plans.plan_cells`, with the data at hand.

    Raises:
        MissingFileError: there is no such file, or none that a row's `config` names.
        InputError: it is not TOML, or a key, flag, name or value in it is wrong.
    """
    path = Path(path)
    content = _read_toml(path)
    for key, value in content.items():
        if key not in KEYS:
            raise InputError(
                f"{path} has the key {key!a:.60}, expected {', '.join(KEYS)}; flags of train.py "
                "belong into [base], [axes] or [[rows]]"
            )
        if type(value) is not KEYS[key]:
            raise InputError(
                f"{path} has {key} = {value!a:.60}, expected a {KEYS[key].__name__}; correct it"
            )
    if ("axes" in content) == ("rows" in content):
        both = "both [axes] and [[rows]]" if "axes" in content else "neither [axes] nor [[rows]]"
        raise InputError(f"{path} has {both}; give one of them")
    base = _flags(content.get("base", {}), train_parser(), f"{path}, [base]")
    axes = _axes(path, content["axes"]) if "axes" in content else {}
    rows = _grid(path, base, axes) if axes else _rows(path, base, content["rows"])
    base_row = content.get("base_row", rows[0].name)
    if base_row not in [row.name for row in rows]:
        raise InputError(
            f"{path} has base_row = {base_row!a:.60}, expected the name of a row: "
            f"{first_few([row.name for row in rows])}"
        )
    table = Table(
        path=path,
        title=_text(content.get("title"), f"{path} has the title"),
        base=base_row,
        rows=rows,
        seeds=_seeds(path, content.get("seeds", [SEED])),
        axes=tuple(axes),
        test=_flags(content.get("test", {}), test_parser(), f"{path}, [test]"),
    )
    _check_names(table)
    return table


def _read_toml(path: Path) -> dict[str, Any]:
    require_file(path, what="table", remedy="pass a .toml file, for example ablations/rank.toml")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not TOML ({first_line(error)}); see ablations/rank.toml"
        ) from None


def _text(value: Any, where: str) -> str:
    """Return a title or a name, which becomes a heading, a cell of a table or a line."""
    plain = isinstance(value, str) and value.strip() == value and printable(value) == value
    if not plain or not 0 < len(value) <= LONGEST_TEXT:
        raise InputError(
            f"{where} {value!a:.60}, expected a text of one line with 1…{LONGEST_TEXT} characters"
        )
    return value


def _seeds(path: Path, seeds: list[Any]) -> tuple[int, ...]:
    flag = train_parser().flags["seed"]
    for seed in seeds:
        flag.check_type(seed, f"{path}, seeds:")
        flag.check_limits(seed, f"{path}, seeds:")
    if not seeds or len(set(seeds)) < len(seeds):
        fault = "names a seed twice" if seeds else "is empty"
        raise InputError(f"{path}: seeds = {seeds!s:.60} {fault}; list every seed once")
    return tuple(seeds)


def _flags(values: Mapping[str, Any], parser: Parser, where: str) -> dict[str, Any]:
    """Return the flags of a part of a table, checked one by one, as the parser would hold them."""
    flags = {}
    for name, value in values.items():
        if name in SET_BY_RUNNER[parser.prog]:
            seeds = "; list it in seeds" if name == "seed" else "; leave it out"
            raise InputError(f"{where} has {name}, which ablate.py sets for every run{seeds}")
        if name not in parser.flags:
            raise InputError(f"{where}: {parser.explain([f'--{name}'])}")
        if parser.prog == "test.py" and parser.flags[name].in_adapter:
            raise InputError(f"{where} has {name}, which the run records; set it in [base]")
        flags[name] = _value(parser.flags[name], value, where)
    return without_second_names(flags, parser.flags, where)


def _value(flag: Flag, value: Any, where: str) -> Any:
    """Return a flag's value from a file: one item may stand for a list, and a number for a text."""
    if flag.takes_list:
        items = value if isinstance(value, list) else [value]
        value = [str(item) if flag.type is str and type(item) is int else item for item in items]
        if not value:
            raise InputError(f"{where} has {flag.name} = [], expected one value or more")
    flag.check_type(value, where)
    flag.check_limits(value, where)
    if flag.name == "config":
        file = config_path(str(REPOSITORY / value))
        read_config_file(file)
        return str(file)
    return value


def _merged(base: Mapping[str, Any], flags: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the flags of a row: its own, those of its `config`, and those of [base].

    `config` is named on the command line, where flags win over it, so flags of [base] that the
    file of a row sets are left out.
    """
    if "config" in flags:
        recipe = read_config_file(Path(flags["config"]))
        base = {name: value for name, value in base.items() if name not in recipe}
    merged = {**base, **flags}
    recipe = read_config_file(Path(merged["config"])) if "config" in merged else {}
    for name, value in merged.items():
        if value is False and recipe.get(name):
            raise InputError(
                f"{where} has {name} = false, but {merged['config']} sets it and a switch cannot "
                "be unset; write the other flags of that file into the table instead"
            )
    return merged


def _rows(path: Path, base: Mapping[str, Any], entries: list[Any]) -> tuple[Row, ...]:
    rows = []
    for number, entry in enumerate(entries, start=1):
        where = f"{path}, row {number}"
        if not isinstance(entry, dict):
            raise InputError(f"{where} is {entry!a:.60}, expected a name and flags")
        name, published = _text(entry.get("name"), f"{where} has the name"), entry.get("published")
        where = f"{path}, row {name!r}"
        if published is not None:
            _check_published(published, where)
        own = {key: value for key, value in entry.items() if key not in ROW_KEYS}
        rows.append(Row(name, _merged(base, _flags(own, train_parser(), where), where), published))
    if not rows:
        raise InputError(f"{path} has no row; add [[rows]] with a name and flags")
    return tuple(rows)


def _check_published(key: Any, where: str) -> None:
    known = read_published()
    if not isinstance(key, str) or key not in known:
        raise InputError(
            f"{where} has published = {key!a:.60}, expected a key of published.json: "
            f"{first_few(sorted(known), 20)}"
        )


def _axes(path: Path, axes: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the values of each flag of a grid."""
    found: dict[str, list[Any]] = {}
    parser, where = train_parser(), f"{path}, [axes]"
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{where} has {name} = {values!a:.60}, expected a list of values")
        for value in values:
            own = _flags({name: value}, parser, where)
            if name not in own:  # a second name, as AdamW
                raise InputError(
                    f"{where} has {name}, which is another name of --{'/'.join(own) or 'a flag'}; "
                    "name that flag and its values"
                )
            if own[name] in found.get(name, ()):
                raise InputError(f"{where} has {name} = {value!a:.60} twice; leave one out")
            found.setdefault(name, []).append(own[name])
    if not found:
        raise InputError(f"{where} is empty; add a flag and its values, as rank = [1, 4, 16]")
    return found


def _grid(path: Path, base: Mapping[str, Any], axes: Mapping[str, list[Any]]) -> tuple[Row, ...]:
    rows = []
    # A grid may be far too large to be built.
    for values in itertools.islice(itertools.product(*axes.values()), MOST_CELLS + 1):
        own = dict(zip(axes, values, strict=True))
        name = ", ".join(f"{flag} {_shown(value)}" for flag, value in own.items())
        rows.append(Row(name, _merged(base, own, f"{path}, [axes]")))
    return tuple(rows)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return Path(value).stem if isinstance(value, str) and "/" in value else f"{value}"


def _check_names(table: Table) -> None:
    if len(table.rows) * len(table.seeds) > MOST_CELLS:
        raise InputError(f"{table.path} has more than {MOST_CELLS:,} runs; split it")
    seen: dict[str, str] = {}
    for row in table.rows:
        # Some file systems take upper and lower case for the same.
        folder = folder_name(row.name, table.seeds[0]).casefold()
        if folder in seen:
            raise InputError(
                f"{table.path}: the rows {seen[folder]!r} and {row.name!r} would have the same "
                "folder; rename one"
            )
        seen[folder] = row.name
