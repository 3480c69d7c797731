"""What a flag is: one row of a table, from which the parser and every check follow."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.arguments import ArgumentParser
from common.errors import InputError

# Of a path or name, as Linux limits paths.
LONGEST_TEXT = 4096


@dataclass(frozen=True)
class Flag:
    """A flag of a program; `config/*_flags.py` hold rows of this class."""

    name: str
    help: str
    # The type of the value; `bool` makes a switch that takes no value.
    type: type = str
    default: Any = None
    choices: tuple[Any, ...] | None = None
    required: bool = False
    # The flag takes one value or more, which become a list.
    takes_list: bool = False
    # Limits of the value, both included; every number has them.
    low: float | None = None
    high: float | None = None
    # A limit that the value must exceed.
    above: float | None = None
    multiple_of: int | None = None
    # What the error message adds about the limits.
    hint: str = ""
    # A resumed run must keep the value, and predict.py segments again when it changes.
    changes_numbers: bool = True
    # An adapter file records the value, so that test.py and predict.py rebuild the network.
    in_adapter: bool = False
    # Part of the run folder's name; the function may return None.
    in_name: Callable[[argparse.Namespace], str | None] | None = None
    # config.json records the value.
    in_config: bool = True
    # `--config RUN` sets the flag of this program from the run's config.json.
    from_config: bool = True
    # The switch is a second name: another flag, and the value that the switch gives it.
    means: tuple[str, Any] | None = None

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Add this flag to a parser's group."""
        if self.means:
            name, value = self.means
            group.add_argument(
                f"--{self.name}",
                action="store_const",
                dest=name,
                const=value,
                default=argparse.SUPPRESS,
                help=self.help,
            )
            return
        if self.type is bool:
            group.add_argument(f"--{self.name}", action="store_true", help=self.help)
            return
        group.add_argument(
            f"--{self.name}",
            type=self.type,
            default=self.default,
            choices=self.choices,
            required=self.required,
            nargs="+" if self.takes_list else None,
            help=self.help,
        )

    def check_type(self, value: Any, source: object) -> None:
        """Check a value that a file holds instead of the command line.

        Raises:
            InputError: the value has another type than the flag, or is none of its choices.
        """
        if value is None and self.default is None and self.type is not bool:
            return
        items = value if self.takes_list and isinstance(value, list) else [value]
        for item in items:
            is_number = self.type is float and type(item) is int
            if type(item) is not self.type and not is_number:
                raise InputError(
                    f"{source} has {self.name} = {value!a:.60}, expected a value of type "
                    f"{self.type.__name__}; correct it or leave it out"
                )
            if self.choices and item not in self.choices:
                raise InputError(
                    f"{source} has {self.name} = {value!a:.60}, expected "
                    f"{' or '.join(map(str, self.choices))}; correct it or leave it out"
                )
        if self.takes_list and not isinstance(value, list):
            raise InputError(f"{source} has {self.name} = {value!a:.60}, expected a list")

    def check_limits(self, value: Any, source: object = None) -> None:
        """Check that a value is within the limits, and that a text can be a path; None passes.

        Args:
            source: the file that holds the value; None: the command line.

        Raises:
            InputError: the value is outside.
        """
        for item in value if self.takes_list and isinstance(value, list) else [value]:
            if item is None or self._within_limits(item):
                continue
            given = f"--{self.name} is" if source is None else f"{source} has {self.name} ="
            hint = f"; {self.hint}" if self.hint else ""
            shown = ascii(item)[:40] if self.type is str else f"{item!s:.40}"
            raise InputError(f"{given} {shown}, expected {self._expected()}{hint}")

    def _within_limits(self, value: Any) -> bool:
        if self.type is str:
            return 0 < len(value) <= LONGEST_TEXT and "\0" not in value
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )

    def _expected(self) -> str:
        if self.type is str:
            return f"1…{LONGEST_TEXT} characters, none of them NUL"
        if self.above is not None:
            return f"a number above {self.above}, at most {self.high:,}"
        multiple = f"a multiple of {self.multiple_of} in " if self.multiple_of else ""
        return f"{multiple}{self.low:,}…{self.high:,}"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of the examples, and show every default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class Parser(ArgumentParser):
    """A parser that remembers the rows its flags came from, by their names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)
        self.flags: dict[str, Flag] = {}

    def add_flags(self, groups: Mapping[str, Sequence[Flag]]) -> None:
        """Add rows, grouped in the help text by their titles."""
        for title, rows in groups.items():
            group = self.add_argument_group(title)
            for flag in rows:
                flag.add_to(group)
                self.flags[flag.name] = flag


def by_name(groups: Mapping[str, Sequence[Flag]]) -> dict[str, Flag]:
    """Return the rows of a table of flags by their names."""
    return {flag.name: flag for rows in groups.values() for flag in rows}


def without_second_names(
    values: Mapping[str, Any], flags: Mapping[str, Flag], source: object
) -> dict[str, Any]:
    """Return values in which no switch stands for another flag (`Flag.means`).

    Args:
        source: file that holds the values, for messages. Earlier versions recorded such switches,
            and scripts written against the original pass them.
    """
    plain = dict(values)
    for flag in flags.values():
        if flag.means and flag.name in plain:
            flag.check_type(plain[flag.name], source)
            name, value = flag.means
            if not plain.pop(flag.name):
                plain.setdefault(name, flags[name].default)
            elif plain.setdefault(name, value) != value:
                raise InputError(
                    f"{source} has {flag.name} and {name} = {plain[name]!a:.60}, which contradict "
                    "each other; leave one out"
                )
    return plain


def check_limits(flags: Iterable[Flag], args: argparse.Namespace) -> None:
    """Check the limits of every flag that `args` holds."""
    for flag in flags:
        flag.check_limits(getattr(args, flag.name, None))


def that_change_numbers(values: Mapping[str, Any], flags: Mapping[str, Flag]) -> dict[str, Any]:
    """Return the values that change results; a value that is no flag counts as one that does."""
    return {
        name: value
        for name, value in values.items()
        if name not in flags or flags[name].changes_numbers
    }
