"""A short form of `make fuzz`: changed files of every kind are read or refused, nothing else."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fuzz import fuzz
from fuzz_readers import PROGRAM_READERS, READERS


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_changed_files_are_read_or_refused(kind: str, tmp_path: Path):
    tries = 12 if kind in PROGRAM_READERS else 60
    outcome = fuzz(kind, 0, 0, tries, until=time.monotonic() + 300, keep=tmp_path)
    assert not outcome.failures
    assert outcome.tries == tries
    assert outcome.refused or kind in PROGRAM_READERS  # programs mend some records themselves
