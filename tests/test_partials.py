"""Unfinished files of killed programs are removed by the next run; those of living ones stay."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import tiny_model
from test_power_cut import in_a_fork
from test_tables import NAMES, RESULTS

from common.writing import atomic_path, partial_name, remove_partials
from evaluation import __main__ as evaluation
from evaluation.tables import write_json
from tools import adapter


def leave_partials(path: Path) -> tuple[Path, Path]:
    """Let a process be killed while it writes a file; return its partial file and a living one."""
    before = set(path.parent.iterdir())

    def killed() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_fork(killed) == -signal.SIGKILL
    (dead,) = set(path.parent.iterdir()) - before
    living = partial_name(path)
    living.write_text("half")
    return dead, living


def test_the_partials_of_dead_processes_are_removed(tmp_path: Path):
    dead, living = leave_partials(tmp_path / "a.json")
    (tmp_path / ".12.partial.notes").write_text("of another program")
    remove_partials(tmp_path)
    assert not dead.exists() and living.exists() and len(list(tmp_path.iterdir())) == 2


def test_the_programs_that_write_one_file_remove_them(tmp_path: Path):
    state = {k: v.clone() for k, v in tiny_model().adapter_state().items()}
    torch.save(state, tmp_path / "a.pth")
    write_json(tmp_path / "results.json", RESULTS, NAMES, {})
    programs: dict[str, Callable[[], object]] = {
        "b.safetensors": lambda: adapter.main(
            ["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors")]
        ),
        "report.html": lambda: evaluation.main([str(tmp_path)]),
    }
    for name, program in programs.items():
        dead, _ = leave_partials(tmp_path / name)
        program()
        assert not dead.exists() and (tmp_path / name).is_file()
