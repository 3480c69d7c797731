"""Mean and deviation of a scan's values in each organ; the table of labels for 3D Slicer."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from test_predict import SPEC, adapter, marked, run
from test_scans import placed
from test_segmentations import grid, run_prepare

from datasets.scans.segmentations import segments_of
from datasets.scans.volumes import read_volume, write_volume
from prediction.results import intensities

__all__ = ["adapter"]  # a fixture
SHAPE = (12, 31, 37)


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "volumes.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_mean_and_deviation_are_those_of_numpy(dtype: type):
    rng = np.random.default_rng(1)
    high = 200 if dtype == np.uint8 else 30_000
    array = rng.integers(0, high, (5, 8, 9)).astype(dtype)
    labels = rng.choice(np.array([0, 1, 3], np.uint8), (5, 8, 9))
    labels[0, 0, 0] = 4  # one voxel
    means, deviations = intensities(array, labels, 4)
    for value in (1, 3, 4):
        inside = array[labels == value].astype(np.float64)
        assert means[value - 1] == pytest.approx(inside.mean(), rel=1e-13)
        assert deviations[value - 1] == pytest.approx(inside.std(), rel=1e-12, abs=1e-12)
    assert (means[1], deviations[1]) == (None, None)  # an empty organ
    assert deviations[3] == 0


def test_nothing_cancels_far_from_zero():
    array = np.full((2, 10, 10), 1e9)
    array[:, ::2] += 0.5
    means, deviations = intensities(array, np.ones(array.shape, np.uint8), 1)
    assert means == [pytest.approx(1e9 + 0.25, rel=1e-15)]
    assert deviations == [pytest.approx(0.25, rel=1e-6)]


def test_colour_pictures_have_none():
    array, labels = np.zeros((1, 3, 4, 4), np.uint8), np.ones((1, 4, 4), np.uint8)
    assert intensities(array, labels, 2) == ([None, None], [None, None])


def test_columns_of_volumes_csv(tmp_path: Path, adapter: Path):
    rng = np.random.default_rng(0)
    scan, classes = marked(SHAPE)
    scan = np.where(classes == 0, scan, scan + rng.integers(-90, 90, SHAPE)).astype(np.int16)
    scan[classes == 3] = -1000  # no top mark
    write_volume(tmp_path / "a.nii.gz", scan, placed("RAS"))
    out = tmp_path / "out"
    assert run(tmp_path / "a.nii.gz", out, adapter) == 0
    # SimpleITK measures the label file over the scan's file.
    measured = sitk.LabelStatisticsImageFilter()
    image = sitk.ReadImage(str(tmp_path / "a.nii.gz"), sitk.sitkFloat64)
    measured.Execute(image, sitk.ReadImage(str(out / "a.nii.gz")))
    rows = rows_of(out)
    assert list(rows[0]) == (
        "case class value voxels ml cut_by_edge intensity_mean intensity_sd".split()
    )
    (result,) = json.loads((out / "predictions.json").read_text())["cases"]
    assert len(rows) == 3 and rows[0]["voxels"] != "0"
    for index, row in enumerate(rows):
        mean, deviation = result["intensity_mean"][index], result["intensity_sd"][index]
        if row["voxels"] == "0":
            assert (row["intensity_mean"], row["intensity_sd"]) == ("", "")
            assert (mean, deviation) == (None, None)
            continue
        value, count = int(row["value"]), int(row["voxels"])
        assert mean == pytest.approx(measured.GetMean(value), rel=1e-12)
        sample = measured.GetSigma(value)  # divided by one less than the number of voxels
        assert deviation == pytest.approx(sample * np.sqrt((count - 1) / count), rel=1e-9)
        assert float(row["intensity_mean"]) == pytest.approx(mean, rel=1e-5)
    assert any(row["voxels"] == "0" for row in rows)
    assert any(row["intensity_mean"].startswith("-") for row in rows)  # HU below 0, unquoted


def test_records_of_earlier_versions_have_blank_cells(tmp_path: Path, adapter: Path):
    for name in "ab":
        write_volume(tmp_path / "in" / f"{name}.nii.gz", marked(SHAPE)[0], placed("RAS"))
    out = tmp_path / "out"
    assert run(tmp_path / "in", out, adapter) == 0
    record = out / ".done" / "a.json"
    content = json.loads(record.read_text())
    for name in ("intensity_mean", "intensity_sd"):
        del content["result"][name]
    record.write_text(json.dumps(content))
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert run(tmp_path / "in", out, adapter) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")} == times
    blank = {row["case"] for row in rows_of(out) if not row["intensity_mean"]}
    assert blank == {"a"} and all(row["ml"] for row in rows_of(out))
    # A damaged record is none.
    content["result"]["intensity_mean"] = ["much"]
    record.write_text(json.dumps(content))
    assert run(tmp_path / "in", out, adapter, "--overwrite") == 0
    assert not {row["case"] for row in rows_of(out) if not row["intensity_mean"]}


def test_a_segmentation_goes_to_slicer_and_back_into_training(tmp_path: Path, adapter: Path):
    scan, classes = marked(SHAPE)
    root, out = tmp_path / "raw", tmp_path / "out"
    for name in "ab":
        write_volume(root / "imagesTr" / f"{name}_0000.nii.gz", scan, placed("RAS"))
        write_volume(tmp_path / "in" / f"{name}.nii.gz", scan, placed("RAS"))
    assert run(tmp_path / "in", out, adapter, "--format", ".seg.nrrd", "--probabilities") == 0
    for name in "ab":
        found, geometry = read_volume(out / f"{name}.seg.nrrd")
        assert geometry.matches(grid(root))
        assert [(one.name, one.value) for one in segments_of(out / f"{name}.seg.nrrd")] == list(
            zip(SPEC.class_names, SPEC.predicted_values, strict=True)
        )
        (root / "labelsTr").mkdir(exist_ok=True)
        (root / "labelsTr" / f"{name}.seg.nrrd").write_bytes(
            (out / f"{name}.seg.nrrd").read_bytes()
        )
    files = sorted(path.name for path in (out / "probabilities" / "a").iterdir())
    assert files[0] == "0_background.nrrd" and not any(".seg." in name for name in files)
    assert segments_of(out / "probabilities" / "a" / files[1]) is None
    time = (out / "a.seg.nrrd").stat().st_mtime_ns
    assert run(tmp_path / "in", out, adapter, "--format", ".seg.nrrd", "--probabilities") == 0
    assert (out / "a.seg.nrrd").stat().st_mtime_ns == time
    values = dict(zip(SPEC.class_names, SPEC.predicted_values, strict=True))
    told = {"channel_names": {"0": "CT"}, "labels": {"background": 0} | values}
    (root / "dataset.json").write_text(json.dumps(told))
    assert run_prepare(root, tmp_path / "data", "--test_cases", "b") == 0
    assert found.max() == 9 and classes.max() == 3
