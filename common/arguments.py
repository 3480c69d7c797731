"""A command line parser whose errors are one line that names the nearest flag; `--part K/N`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from common.console import printable
from common.errors import EXIT_BAD_INPUT, InputError, first_few
from common.names import utf8_path

Item = TypeVar("Item")


class ArgumentParser(argparse.ArgumentParser):
    """As `argparse.ArgumentParser`, but a flag has to be written in full.

    With abbreviations, `--lr` would silently set `--lr_exp`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse a command line; one error line names the first argument that is not known."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self.explain(unknown))
        return values

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line as argparse does; refuse one that is not UTF-8, as libraries do."""
        words = sys.argv[1:] if args is None else args
        try:
            for word in (Path.cwd(), *words):
                utf8_path(word)
        except InputError as error:
            self.error(str(error))
        except FileNotFoundError:
            self.error("the current folder was deleted; change to another one")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and end with exit code 2."""
        print(printable(f"error: {message} (see {self.prog} --help)"), file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)

    def explain(self, unknown: list[str]) -> str:
        """Return why the first of these words, which belong to no flag, is wrong."""
        flags = [word.split("=")[0][2:] for word in unknown if word.startswith("--")]
        if not flags:
            hint = ""
            if "--config" in self._option_string_actions:
                hint = "; --config takes one folder, of several runs the one that holds them"
            return f"{first_few(unknown)} belongs to no flag, or a flag got several values{hint}"
        known = [option[2:] for option in self._option_string_actions if option.startswith("--")]
        words = set(flags[0].split("_"))
        near = [
            *get_close_matches(flags[0], known, n=2),
            *(option for option in known if words & set(option.split("_"))),
        ]
        named = " or ".join(f"--{option}" for option in list(dict.fromkeys(near))[:3])
        return f"--{flags[0]} is no flag of {self.prog}" + (
            f", did you mean {named}?" if near else ""
        )


def share_of(items: Sequence[Item], part: str | None) -> list[Item]:
    """Return the share that `--part K/N` names: every N-th item from the K-th on.

    Raises:
        InputError: it is not K/N with K from 1 to N.
    """
    if part is None:
        return list(items)
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part, re.ASCII)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise InputError(f"--part is {part!a:.40}, expected K/N with K from 1 to N, as 1/4")
    return list(items[number - 1 :: count])
