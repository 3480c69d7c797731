"""`python -m samed NAME FLAGS…` runs what `python -m NAME FLAGS…` runs in the project's folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from samed import PROJECT
from samed.programs import enter_project, run

FOLDERS = ("evaluation", "preprocess", "tools")  # of programs besides train.py and its like
USAGE = "usage: python -m samed NAME FLAGS…, where NAME is one of"


def programs() -> list[str]:
    """Return the names of the programs, as `python -m` takes them in the project's folder."""
    paths = [*PROJECT.glob("*.py"), *(path for f in FOLDERS for path in (PROJECT / f).glob("*.py"))]
    found = [path for path in paths if '\nif __name__ == "__main__":' in path.read_text("utf-8")]
    parts = (path.relative_to(PROJECT).with_suffix("").parts for path in found)
    names = {".".join(words).removesuffix(".__main__") for words in parts}
    return sorted(names - {"setup"})


def chosen(argv: Sequence[str]) -> str:
    """Return the program that the first word names.

    Raises:
        InputError: there is no such program.
        SystemExit: of `--help`, after the list of the programs.
    """
    from common.errors import InputError  # `enter_project` makes it known

    names = programs()
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE, *names, sep="\n  ")
        raise SystemExit
    if not argv or argv[0] not in names:
        given = f"{argv[0]!a:.60} is" if argv else "nothing was given, which is"
        raise InputError(f"{given} no program of SAMed; expected one of {', '.join(names)}")
    return argv[0]


if __name__ == "__main__":
    enter_project()
    from common.errors import exit_on_bad_input

    with exit_on_bad_input():
        program = chosen(sys.argv[1:])
    del sys.argv[1]
    run(program)
