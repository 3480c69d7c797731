"""The published numbers of `published.json`, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.files import read_json

PUBLISHED = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Published:
    """What was published about a model: scores by the original's rule for empty masks (`samed`)."""

    data: str  # name of the data set
    cases: int  # number of its test cases
    dsc: float  # %
    hd95_voxels: float
    organs: dict[str, float]  # DSC in %; empty: not known
    source: str


def read_published() -> dict[str, Published]:
    """Return the published numbers by the key that the rows of a table name."""
    entries = read_json(PUBLISHED, remedy="restore it from the repository")
    return {key: Published(**entry) for key, entry in entries.items()}
