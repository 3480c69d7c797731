"""A scan of another modality than the training data: refused, or warned of, never in silence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_inputs_told import write_series
from test_predict import SPEC, make_adapter, marked, run
from test_scans import placed

from datasets.intensity import CT, MR, PICTURE, RANGE, Intensity, air_share
from datasets.registry import SPEC_FILE, SYNAPSE, DatasetSpec, spec_from_json
from datasets.scans.files import find_scans
from datasets.scans.volumes import write_volume
from prediction.cases import read_case
from preprocess import prepare

CT_LIKE = np.random.default_rng(0).integers(-1024, 1500, (4, 16, 16), np.int16)
MR_LIKE = np.random.default_rng(1).integers(0, 1200, (4, 16, 16), np.int16)
CROPPED = np.clip(CT_LIKE, -150, 300)
PHASE = np.clip(CT_LIKE, -400, 400)
CT_RANGE, MR_RANGE, DARK, BITS16 = (-1024, 3071), (0, 1400), (0, 4095), Intensity(RANGE, 0, 65535)
LIKE_CT, NO_AIR, NEGATIVE = "look like CT in Hounsfield", "hold no air", "are partly negative"
FAR, BLACK = "lie far outside", "are nearly black"
DOUBTS = {
    "CT for an MR network": (MR, CT_LIKE, None, LIKE_CT),
    "CT for an MR network of known range": (MR, CT_LIKE, MR_RANGE, LIKE_CT),
    "CT in fractions of a float": (MR, CT_LIKE.astype(np.float32) + 0.5, MR_RANGE, LIKE_CT),
    "cropped CT for an MR network": (MR, CROPPED, MR_RANGE, NEGATIVE),
    "MR": (MR, MR_LIKE, None, None),
    "MR of a brighter scanner": (MR, 20 * MR_LIKE, MR_RANGE, None),
    "MR that resampling made a little negative": (MR, MR_LIKE - 40, MR_RANGE, None),
    "CT for a network of CT by percentiles": (MR, CT_LIKE, CT_RANGE, None),
    "MR for a network of CT by percentiles": (MR, MR_LIKE, CT_RANGE, NO_AIR),
    "CT": (CT, CT_LIKE, CT_RANGE, None),
    "CT, range not known": (CT, CROPPED, None, None),
    "MR with negative values for a CT network": (CT, PHASE, CT_RANGE, NO_AIR),
    "cropped CT for a network of cropped CT": (CT, CROPPED, (-200, 400), None),
    "CT in other units": (CT, 10 * CT_LIKE, CT_RANGE, FAR),
    "a picture": (PICTURE, np.full((1, 9, 9), 200, np.uint8), (0, 255), None),
    "16 bits for a network of 12": (BITS16, np.full((1, 9, 9), 60000, np.uint16), DARK, FAR),
    "12 bits for a network of 16": (BITS16, np.full((1, 9, 9), 4000, np.uint16), (0, 65535), BLACK),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_values_of_another_kind_are_doubted(name: str):
    rule, image, raw_range, expected = DOUBTS[name]
    doubts = rule.doubts(image, raw_range)
    assert len(doubts) == (expected is not None)
    if expected:
        assert expected in doubts[0] and f"{image.min():g} to {image.max():g}" in doubts[0]


def test_the_share_of_air():
    scan = np.array([[[-1000, -901], [-900, -899]], [[0, 1], [2, 3]]])
    assert air_share(scan) == 3 / 8


@pytest.mark.parametrize(
    ("modality", "changes", "told"),
    [
        ("MR", {}, "its DICOM modality is MR, but the adapter was trained on CT"),
        ("CT", {}, None),
        ("CT", {"intensity": MR, "modality": "MR"}, "modality is CT, but the adapter was trained"),
        ("MR", {"intensity": MR, "modality": "MR"}, None),
        ("PT", {"intensity": MR, "modality": "MR"}, "modality is PT, but the adapter was trained"),
        ("MR", {"intensity": MR}, None),  # percentiles alone do not say which modality
        ("OT", {}, None),
    ],
)
def test_the_modality_of_dicom_is_compared(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    modality: str,
    changes: dict[str, object],
    told: str | None,
):
    array = marked((4, 20, 20))[0]
    if "intensity" in changes:
        array = array - array.min()
    write_series(tmp_path / "s", {"0008|0060": modality}, array)
    case = read_case(replace(SPEC, **changes), find_scans(tmp_path / "s")[0])
    assert len(case.warnings) == (told is not None)
    if told:
        assert told in case.warnings[0]
        assert f"warning: s: {case.warnings[0]}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_ct_for_a_network_of_mr_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    adapter = make_adapter(tmp_path, replace(SPEC, intensity=MR, raw_range=MR_RANGE), monkeypatch)
    for name, array in (("ct", CT_LIKE), ("mr", MR_LIKE)):
        write_volume(tmp_path / "in" / f"{name}.nii.gz", array, placed("LPS"))
    assert run(tmp_path / "in", tmp_path / "out", adapter) == 0
    said = capfd.readouterr()
    assert f"warning: ct: its values from -1024 to {CT_LIKE.max()} look like CT" in said.err
    assert "warning: mr" not in said.err
    assert "read the warnings in predictions.json on ct" in said.out
    cases = json.loads((tmp_path / "out" / "predictions.json").read_text())["cases"]
    assert [len(case["warnings"]) for case in cases] == [1, 0]


def test_facts_of_the_training_data_are_part_of_the_description():
    described = replace(SYNAPSE, raw_range=(-1024.0, 3071.0), modality="CT")
    values = json.loads(json.dumps(described.to_json()))
    assert spec_from_json(values, "here") == described
    # Descriptions without them stay as earlier runs recorded them.
    assert not {"raw_range", "modality"} & SYNAPSE.to_json().keys()
    for wrong in ([1], [3, 1], "ab", [None, 2]):
        with pytest.raises(ValueError, match="does not describe a data set"):
            spec_from_json(values | {"raw_range": wrong}, "here")


@pytest.mark.slow
def test_preparation_records_range_and_modality(tmp_path: Path):
    scans = {"a": CT_LIKE, "b": np.clip(CT_LIKE, -900, 1000), "c": 2 * CT_LIKE}
    for name, array in scans.items():
        write_series(tmp_path / "raw" / "images" / name, {"0008|0060": "CT"}, array)
        label = (array > 500).astype(np.uint8)
        write_volume(tmp_path / f"raw/labels/{name}.mha", label, placed("LPS", oblique=False))
    flags = ["--input", tmp_path / "raw", "--output", tmp_path / "data", "--workers", "1"]
    prepare.main([*map(str, flags), "--train_cases", "a", "b", "--test_cases", "c"])
    spec: DatasetSpec = spec_from_json(json.loads((tmp_path / "data" / SPEC_FILE).read_text()), "")
    assert spec.raw_range == (float(CT_LIKE.min()), float(CT_LIKE.max()))  # not of the test case
    assert spec.modality == "CT"
