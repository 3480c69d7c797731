"""The description of a data set in a file, an adapter or a run: every field is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import InputError
from datasets.registry import SPEC_FILE, SYNAPSE, spec_from_json, stored_spec
from datasets.trained_on import TrainedOn

GOOD = SYNAPSE.to_json()
WRONG: dict[str, list[Any]] = {
    "name": ["", "../../x", "a/b", "/a", "..", ".", "a\\b", 5, None, ["a"], "x" * 10**6],
    "class_names": [["a"] * 8, [["a"]] * 8, "abcdefgh", [], [f"c{i}" for i in range(300)], [1] * 8],
    "raw_labels": [{}, [], {"a": 1}, {"1": 1.0}, {"-1": 1}, {"1": "1"}, {"9" * 5000: 1}, None],
    "ignored_labels": [[-1], [65536], ["1"], [1.5], [True], 5, [[1]]],
    "predicted_values": [[], [1], [10**30] * 8, ["1"] * 8, None],
    "intensity": [
        {},
        None,
        [],
        "window",
        {"rule": "other", "low": 0, "high": 1},
        {"rule": "window", "low": "0", "high": "1"},
        {"rule": "window", "low": 1, "high": 0},
        {"rule": "window", "low": float("-inf"), "high": 1},
        {"rule": "window", "low": float("nan"), "high": 1},
        {"rule": "window", "low": 0, "high": 10**400},
        {"rule": "percentiles", "low": -1, "high": 50},
        {"rule": "percentiles", "low": 0, "high": 101},
        {"rule": "window", "low": 0, "high": 1, "sure": 1},
        {"rule": "window", "low": 0, "high": 1, "__class__": 1},
        {"rule": ["window"], "low": 0, "high": 1},
    ],
    "orientation": ["", "LP", "LPX", 5, ["L", "P", "S"], "LLL"],
    "channels": [0, 2, 10**6, "1", True, None],
    "channel": [-1, 65536, 1.5, "0", True],
    "size": [0, -1, 10**6, 2**40, 224.0, "224", True, [224]],
    "train_cases": [[5], 5, [["a"]], ["x" * 10**6], None],
    "test_cases": [[5], {"a": 1}, [None]],
    "pictures": ["yes", 1, []],
    "label_threshold": [0, -1, "1", float("nan"), 10**400, [1]],
    "raw_range": [[1], [1, 0], ["0", "1"], [0, float("inf")], 5, [0, 1, 2]],
    "modality": [5, "C\nT", ["CT"]],
}
ROWS = [(field, value) for field, values in WRONG.items() for value in values]


@pytest.mark.parametrize(("field", "value"), ROWS, ids=[f"{f}-{v!a:.30}" for f, v in ROWS])
def test_a_field_of_another_kind_is_refused(field: str, value: Any):
    with pytest.raises(InputError, match="here") as caught:
        spec_from_json(GOOD | {field: value}, "here")
    assert len(str(caught.value)) < 500 or "x" * 1000 in str(caught.value)


@pytest.mark.parametrize("value", [None, 5, [], [GOOD], "spec", {}])
def test_a_description_that_is_no_object_is_refused(value: Any):
    with pytest.raises(InputError, match="here"):
        spec_from_json(value, "here")


def test_the_published_description_comes_back():
    assert spec_from_json(json.loads(json.dumps(GOOD)), "here") == SYNAPSE


def test_a_damaged_file_is_told(tmp_path: Path):
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN}', b'{"a": 1e999}'):
        (tmp_path / SPEC_FILE).write_bytes(content)
        with pytest.raises(InputError, match=SPEC_FILE):
            stored_spec(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"cases": [5]},
        {"cases": 5},
        {"sizes": []},
        {"sizes": [[1]]},
        {"sizes": [[0, 1]]},
        {"sizes": [[1, 10**30.0]]},
        {"sizes": [["1", "1"]]},
        {"sizes": [[1, 1]] * 10**5},
        {"low": "0"},
        {"low": 2.0},
        {"high": float("inf")},
        {"voxels": [-1]},
        {"voxels": [1.5]},
        {"voxels": None},
        {"colour": "no"},
    ],
    ids=lambda change: f"{change!a:.40}",
)
def test_facts_about_training_data_of_another_kind_count_as_none(change: dict):
    good = TrainedOn(("a",), ((4, 5),), 0.0, 1.0, (3, 4)).to_json()
    assert TrainedOn.from_json(json.loads(json.dumps(good))).to_json() == good
    assert TrainedOn.from_json(good | change) is None
