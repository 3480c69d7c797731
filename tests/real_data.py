"""The folder of the small real scans; tests that need it are skipped where it is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(
    not (REAL_DATA / "ct").is_dir(), reason=f"the real scans are not at {REAL_DATA}"
)
