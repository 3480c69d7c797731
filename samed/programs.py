"""The console scripts: they run the project's scripts as `python train.py` does."""

from __future__ import annotations

import os
import runpy
import sys

from samed import INSTALLED, PROJECT


def train() -> None:
    """Run `train.py`."""
    run("train")


def test() -> None:
    """Run `test.py`."""
    run("test")


def predict() -> None:
    """Run `predict.py`."""
    run("predict")


def prepare() -> None:
    """Run `python -m preprocess.prepare`."""
    run("preprocess.prepare")


def ablate() -> None:
    """Run `ablate.py`."""
    run("ablate")


def demo() -> None:
    """Run `demo.py`."""
    run("demo")


def run(name: str) -> None:
    """Run a module of the project as the main program of this process.

    Signals, exit codes and the processes that it starts are those of the script, because it is the
    `__main__` that Python and they see.

    Args:
        name: `train`, `tools.adapter` or another module or package of the project.
    """
    enter_project()
    if INSTALLED:  # The folder of a package is no place for weights: an update deletes it.
        os.environ.setdefault("SAMED_CHECKPOINTS", "checkpoints")
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def enter_project() -> None:
    """Let `import` search the project first, as it does for a script in the project's folder."""
    # It would hide the project from the processes that the scripts start.
    os.environ.pop("PYTHONSAFEPATH", None)
    if str(PROJECT) in sys.path[:1]:
        return
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder of the console scripts, or the current one
    sys.path.insert(0, str(PROJECT))
