"""`predict.py`: scans without labels to segmentations with the geometry of the scan."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import tiny_model
from PIL import Image
from scipy import ndimage
from test_scans import placed, write_dicom
from torch import nn

import predict
from common.errors import exit_on_bad_input
from datasets.intensity import MR, PICTURE, RANGE, WINDOW, Intensity
from datasets.registry import DatasetSpec
from datasets.scans.volumes import Geometry, read_volume, write_volume
from evaluation.predict_volume import predict_volume
from prediction import segmenting
from prediction.cases import UnitSlices

pytestmark = pytest.mark.slow

SPEC = DatasetSpec(
    name="marks",
    class_names=("front mark", "left mark", "top mark"),
    raw_labels={2: 1, 5: 2, 9: 3},
    ignored_labels=(),
    predicted_values=(2, 5, 9),
    intensity=Intensity(WINDOW, -1000.0, 1000.0),
    orientation="LPS",
)
# Intensities of background and the three marks.
VALUES = np.array([-1000, -400, 200, 900], dtype=np.int16)


class Bands(nn.Module):
    """A stand-in for the network: it finds the marks by their intensity alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def merge(self) -> None:
        """Do nothing, because there are no updates to merge."""

    def forward(self, images: torch.Tensor, *_: Any) -> dict[str, torch.Tensor]:
        grey = images.mean(dim=1, keepdim=True)  # (B, 1, S, S)
        centres = torch.tensor([0.0, 0.3, 0.6, 0.95])[:, None, None]
        return {"masks": -200 * (grey - centres).square()}


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an adapter file for `SPEC`, and replace the network by `Bands`."""
    return make_adapter(tmp_path, SPEC, monkeypatch)


def make_adapter(
    folder: Path, spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch | None = None
) -> Path:
    """Save a tiny adapter with the spec in its settings; with `monkeypatch`, use `Bands`."""
    model = tiny_model(num_classes=spec.num_classes)
    if monkeypatch is None:  # `Bands` needs no weights, so the file may be smaller
        model.train_all_weights()
    settings = {
        "vit_name": "vit_tiny",
        "img_size": 64,
        "num_classes": spec.num_classes,
        "class_names": list(spec.class_names),
        "spec": spec.to_json(),
    }
    model.save_lora_parameters(folder / "adapter.pth", settings)
    if monkeypatch is not None:
        monkeypatch.setattr(predict, "build_model", lambda args, device: (Bands(), 16))
        monkeypatch.setattr(predict, "pack_encoder", lambda model: None)
    return folder / "adapter.pth"


def run(source: Path, output: Path, adapter: Path, *flags: str) -> int:
    """Run the program in this process and return its exit code."""
    argv = ["--input", source, "--output", output, "--lora_ckpt", adapter, "--device", "cpu"]
    try:
        with exit_on_bad_input():
            predict.main([*map(str, argv), *flags])
    except SystemExit as stop:
        return int(stop.code)
    return 0


def marked(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return a scan (D, H, W) int16 with a block for each mark, and its classes uint8.

    No flip maps the blocks onto each other, so a wrong orientation shows.
    """
    depth, height, width = shape
    classes = np.zeros(shape, dtype=np.uint8)
    thick = max(1, depth // 3)
    classes[:thick, : height // 3, : width // 4] = 1
    classes[depth - thick :, height // 2 :, width // 8 : width // 2] = 2
    classes[depth // 3 : depth // 3 + thick, height // 8 : height // 2, 2 * width // 3 :] = 3
    return VALUES[classes], classes


def core(classes: np.ndarray) -> np.ndarray:
    """Return the voxels far enough from any edge that the network's grid does not matter."""
    # This excludes the border: the published resampling may set the last row and column to 0.
    size = [7 if length > 1 else 1 for length in classes.shape]
    largest = ndimage.maximum_filter(classes, size, mode="constant", cval=255)
    return largest == ndimage.minimum_filter(classes, size)


def expected_file(source: Path) -> str:
    """Return the suffix that the label file of a scan has."""
    for suffix, output in ((".nii.gz", ".nii.gz"), (".nhdr", ".nrrd"), (".mhd", ".mha")):
        if source.name.endswith(suffix):
            return output
    return source.suffix or ".mha"


CASES = {
    "oblique NIfTI": (".nii.gz", "LPS", (24, 31, 37)),
    "RAS": (".nii.gz", "RAS", (24, 31, 37)),
    "LAS, not packed": (".nii", "LAS", (25, 30, 41)),
    "sagittal": (".nii.gz", "PIR", (33, 24, 38)),
    "coronal": (".nii.gz", "LSP", (29, 24, 35)),
    "NRRD": (".nrrd", "RAI", (24, 31, 37)),
    "NRRD, header apart": (".nhdr", "PSL", (24, 31, 37)),
    "MHA": (".mha", "ASR", (30, 31, 37)),
    "MHD": (".mhd", "RPS", (24, 31, 37)),
    "DICOM": ("", "LPS", (24, 31, 37)),
    "DICOM, RAS": ("", "RAS", (24, 31, 37)),
    "DICOM, sagittal": ("", "PIR", (33, 24, 38)),
    "one slice, RAS": (".nii.gz", "RAS", (1, 48, 60)),
    "one slice, NRRD": (".nrrd", "LPS", (1, 48, 60)),
    "one slice, sagittal": (".mha", "PIR", (1, 48, 60)),
    "one slice, DICOM": ("", "LPS", (1, 48, 60)),
}


@pytest.mark.parametrize("name", CASES)
def test_labels_have_the_geometry_of_the_scan(tmp_path: Path, adapter: Path, name: str):
    suffix, letters, shape = CASES[name]
    array, classes = marked(shape)
    geometry = placed(letters)
    source = tmp_path / f"scan{suffix}"
    if suffix:
        write_volume(tmp_path / "one_file.nrrd", array, geometry)
        sitk.WriteImage(sitk.ReadImage(tmp_path / "one_file.nrrd"), source)
        scan = sitk.ReadImage(str(source))
    else:
        write_dicom(source, array, geometry)
        series = sitk.ImageSeriesReader()
        series.SetFileNames(series.GetGDCMSeriesFileNames(str(source)))
        scan = series.Execute()
        classes = np.searchsorted(VALUES, sitk.GetArrayFromImage(scan)).astype(np.uint8)
    assert run(source, tmp_path / "out", adapter) == 0
    path = tmp_path / "out" / f"scan{expected_file(source)}"
    labels = sitk.ReadImage(str(path))
    assert labels.GetSize() == scan.GetSize()
    for read in ("GetSpacing", "GetOrigin", "GetDirection"):
        found, expected = getattr(labels, read)(), getattr(scan, read)()
        if suffix:
            assert found == expected  # bit for bit
        else:  # SimpleITK computes the normal and the distance of slices in another order
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert labels.GetPixelID() == sitk.sitkUInt8
    voxels = sitk.GetArrayFromImage(labels)
    values = np.array([0, 2, 5, 9])[classes]
    sure = core(classes)
    assert np.array_equal(voxels[sure], values[sure])
    for value in (2, 5, 9):  # no mark is lost, and most of each is in its place
        assert (values[sure] == value).any()
        both = ((voxels == value) & (values == value)).sum()
        assert both >= 0.6 * (values == value).sum() and both >= 0.6 * (voxels == value).sum()


def test_nifti_geometry_is_copied_byte_by_byte(tmp_path: Path, adapter: Path):
    array, _ = marked((6, 31, 37))
    write_volume(tmp_path / "scan.nii.gz", array, placed("RAS"))
    assert run(tmp_path / "scan.nii.gz", tmp_path / "out", adapter) == 0
    headers = [
        gzip.decompress(path.read_bytes())[:348]
        for path in (tmp_path / "scan.nii.gz", tmp_path / "out" / "scan.nii.gz")
    ]
    # Size, spacing, units and affines.
    for start, stop in ((40, 56), (76, 92), (123, 124), (252, 328)):
        assert headers[0][start:stop] == headers[1][start:stop]


def test_one_slice_and_formats(tmp_path: Path, adapter: Path):
    array, _ = marked((1, 40, 44))
    geometry = placed("LPS", oblique=False)
    write_volume(tmp_path / "scan.nii.gz", array, geometry)
    for wanted in (".mha", ".nrrd"):
        assert run(tmp_path / "scan.nii.gz", tmp_path / wanted, adapter, "--format", wanted) == 0
        voxels, where = read_volume(tmp_path / wanted / f"scan{wanted}")
        assert voxels.shape == array.shape and where.matches(geometry)
        assert set(np.unique(voxels)) == {0, 2, 5, 9}


def test_all_output_files(tmp_path: Path, adapter: Path):
    array, classes = marked((6, 31, 37))
    geometry = placed("RAS")
    write_volume(tmp_path / "scan.nii.gz", array, geometry)
    out = tmp_path / "out"
    assert run(tmp_path / "scan.nii.gz", out, adapter, "--probabilities") == 0
    voxels = read_volume(out / "scan.nii.gz")[0]
    rows = list(csv.DictReader((out / "volumes.csv").open()))
    assert [row["class"] for row in rows] == list(SPEC.class_names)
    for row, value in zip(rows, (2, 5, 9), strict=True):
        count = (voxels == value).sum()
        assert int(row["value"]) == value and int(row["voxels"]) == count
        assert float(row["ml"]) == pytest.approx(count * 0.83 * 1.27 * 3.1 / 1000, rel=5e-3)
    parts = [
        read_volume(out / "probabilities" / "scan" / f"{name}.nii.gz")
        for name in ("0_background", "2_front_mark", "5_left_mark", "9_top_mark")
    ]
    assert all(where.matches(geometry) for _, where in parts)
    likely = np.stack([part for part, _ in parts])
    assert np.abs(likely.sum(axis=0) - 1).max() < 5e-3  # stored in 16 bits
    sure = core(classes)
    assert np.array_equal(np.array([0, 2, 5, 9])[likely.argmax(axis=0)][sure], voxels[sure])

    snap = [line for line in (out / "labels.txt").read_text().splitlines() if line[0] != "#"]
    assert [(int(line.split()[0]), line.split('"')[1]) for line in snap] == [
        (0, "background"),
        (2, "front mark"),
        (5, "left mark"),
        (9, "top mark"),
    ]
    slicer = [line for line in (out / "labels.ctbl").read_text().splitlines() if line[0] != "#"]
    assert [len(line.split()) for line in slicer] == [6] * 4
    with Image.open(out / "overlays" / "scan.png") as picture:
        assert picture.width > 600
    summary = json.loads((out / "predictions.json").read_text())
    assert summary["failed"] == {} and summary["cases"][0]["case"] == "scan"
    assert not list(out.rglob("*partial*"))


def test_large_label_values_are_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wide = replace(SPEC, raw_labels={2: 1, 300: 2, 900: 3}, predicted_values=(2, 300, 900))
    adapter = make_adapter(tmp_path, wide, monkeypatch)
    write_volume(tmp_path / "scan.nii.gz", marked((6, 31, 37))[0], placed("LPS"))
    assert run(tmp_path / "scan.nii.gz", tmp_path / "out", adapter) == 0
    voxels = read_volume(tmp_path / "out" / "scan.nii.gz")[0]
    assert voxels.dtype == np.uint16 and set(np.unique(voxels)) == {0, 2, 300, 900}


def test_pictures_become_index_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = replace(SPEC, intensity=PICTURE, orientation=None, channels=3)
    adapter = make_adapter(tmp_path, spec, monkeypatch)
    classes = marked((1, 40, 52))[1][0]
    grey = np.array([0, 77, 153, 242], np.uint8)[classes]
    (tmp_path / "in").mkdir()
    Image.fromarray(grey).save(tmp_path / "in" / "grey.png")
    Image.fromarray(np.dstack([grey, grey, grey // 2 * 2])).save(tmp_path / "in" / "colour.png")
    assert run(tmp_path / "in", tmp_path / "out", adapter, "--probabilities") == 0
    for name in ("grey", "colour"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.mode == "P" and picture.size == (52, 40)
            found = np.asarray(picture)
        sure = core(classes[None])[0]
        assert np.array_equal(found[sure], np.array([0, 2, 5, 9])[classes][sure])
    assert len(list((tmp_path / "out" / "probabilities" / "grey").iterdir())) == 4


def test_a_picture_for_a_network_of_scans_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    adapter = make_adapter(tmp_path, replace(SPEC, intensity=MR), monkeypatch)
    Image.fromarray(np.arange(2000, dtype=np.uint8).reshape(40, 50)).save(tmp_path / "slice.png")
    assert run(tmp_path / "slice.png", tmp_path / "out", adapter) == 0
    told = capfd.readouterr().err
    assert "warning: slice: this is a picture, but the adapter was trained on scans" in told


def test_scans_are_never_replaced(tmp_path: Path, adapter: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "in").mkdir()
    scan = tmp_path / "in" / "scan.nii.gz"
    write_volume(scan, marked((4, 20, 20))[0], placed("LPS"))
    series = write_dicom(tmp_path / "series", marked((4, 20, 20))[0], placed("LPS"))
    before = scan.read_bytes()
    for source, output in ((scan, scan.parent), (scan.parent, scan.parent), (series, series)):
        assert run(source, output, adapter) == 2
        assert "is a folder of scans that are read" in capfd.readouterr().err
    assert scan.read_bytes() == before and list(scan.parent.iterdir()) == [scan]
    assert run(scan, scan.parent / "out", adapter) == 0


def test_the_channel_comes_from_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapter = make_adapter(tmp_path, replace(SPEC, channel=1), monkeypatch)
    (tmp_path / "in").mkdir()
    right, geometry = marked((4, 40, 44))[0], placed("LPS", oblique=False)
    wrong = np.flip(right, 1).copy()
    for name, array in (("s0_0000", wrong), ("s0_0001", right)):
        write_volume(tmp_path / "in" / f"{name}.nii.gz", array, geometry)
    both = sitk.JoinSeries([sitk.GetImageFromArray(array) for array in (wrong, right)])
    sitk.WriteImage(both, str(tmp_path / "in" / "s1.nii.gz"))
    assert run(tmp_path / "in", tmp_path / "out", adapter) == 0
    files = sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz"))
    assert files == ["s0_0001.nii.gz", "s1.nii.gz"]
    first, second = (read_volume(tmp_path / "out" / name)[0] for name in files)
    assert np.array_equal(first, second) and set(np.unique(first)) == {0, 2, 5, 9}


@pytest.mark.parametrize("classes", [2, 12])
def test_an_adapter_without_class_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int
):
    """Its classes get numbers, not the names of the Synapse classes."""
    model = tiny_model(num_classes=classes)
    model.train_all_weights()
    model.save_lora_parameters(tmp_path / "plain.pth")

    class Last(Bands):
        def forward(self, images: torch.Tensor, *_: Any) -> dict[str, torch.Tensor]:
            return {"masks": torch.eye(classes + 1)[-1][None, :, None, None].expand(1, -1, 16, 16)}

    monkeypatch.setattr(predict, "build_model", lambda args, device: (Last(), 16))
    monkeypatch.setattr(predict, "pack_encoder", lambda model: None)
    write_volume(tmp_path / "scan.nii.gz", marked((3, 20, 20))[0], placed("LPS"))
    flags = ["--num_classes", str(classes), "--vit_name", "vit_tiny", "--img_size", "64"]
    flags += ["--batch_size", "1", "--probabilities", "--intensity", "ct"]
    assert run(tmp_path / "scan.nii.gz", tmp_path / "out", tmp_path / "plain.pth", *flags) == 0
    with (tmp_path / "out" / "volumes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [f"class {i}" for i in range(1, classes + 1)]
    assert int(rows[-1]["voxels"]) > 0
    assert len(list((tmp_path / "out" / "probabilities" / "scan").glob("*.nii.gz"))) == classes + 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyError("x")])
def test_an_error_in_one_scan_does_not_stop_the_rest(
    tmp_path: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
):
    (tmp_path / "in").mkdir()
    for name in "abc":
        write_volume(tmp_path / "in" / f"{name}.nii.gz", marked((3, 20, 20))[0], placed("LPS"))
    calls = []

    def fail_second(*args: Any, **kwargs: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return predict_volume(*args, **kwargs)

    monkeypatch.setattr(segmenting, "predict_volume", fail_second)
    flags = ["--probabilities"]
    assert run(tmp_path / "in", tmp_path / "out", adapter, *flags) == predict.EXIT_SOME_FAILED
    assert "error: b: " in capfd.readouterr().err
    with (tmp_path / "out" / "volumes.csv").open() as file:
        assert {row["case"] for row in csv.DictReader(file)} == {"a", "c"}
    assert not list((tmp_path / "out").glob(".*partial*"))


def test_a_full_disk_is_a_single_error_line(
    tmp_path: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_volume(tmp_path / "scan.nii.gz", marked((3, 20, 20))[0], placed("LPS"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert run(tmp_path / "scan.nii.gz", tmp_path / "out", adapter, "--probabilities") == 2
    told = capfd.readouterr().err
    assert "No space left on device" in told and "Traceback" not in told
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_one_output_folder_for_several_calls(tmp_path: Path, adapter: Path):
    for name in ("a", "b"):
        write_volume(tmp_path / f"{name}.nii.gz", marked((3, 20, 20))[0], placed("LPS"))
        assert run(tmp_path / f"{name}.nii.gz", tmp_path / "out", adapter) == 0
    with (tmp_path / "out" / "volumes.csv").open() as file:
        assert {row["case"] for row in csv.DictReader(file)} == {"a", "b"}
    told = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [case["case"] for case in told["cases"]] == ["a", "b"]


def test_a_bad_scan_does_not_stop_the_rest_and_a_rerun_keeps_finished_scans(
    tmp_path: Path, adapter: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "in").mkdir()
    for name in ("a", "c", "d"):
        write_volume(tmp_path / "in" / f"{name}.nii.gz", marked((6, 31, 37))[0], placed("LPS"))
    whole = (tmp_path / "in" / "a.nii.gz").read_bytes()
    (tmp_path / "in" / "b.nii.gz").write_bytes(whole[: len(whole) // 2])
    write_volume(tmp_path / "in" / "e.nii.gz", np.ones((3, 9, 9), np.int16), placed("LPS"))
    out = tmp_path / "out"
    assert run(tmp_path / "in", out, adapter) == predict.EXIT_SOME_FAILED
    told = capfd.readouterr().err
    assert "error: b: " in told and "error: e: " in told and "Traceback" not in told
    assert "2 of 5 scans failed: b, e; the others are done" in told
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert set(done) == {"a.nii.gz", "c.nii.gz", "d.nii.gz"}

    (tmp_path / "in" / "e.nii.gz").unlink()
    (tmp_path / "in" / "b.nii.gz").write_bytes(whole)
    assert run(tmp_path / "in", out, adapter) == 0
    again = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert {name: again[name] for name in done} == done and "b.nii.gz" in again
    with (out / "volumes.csv").open() as file:
        assert {row["case"] for row in csv.DictReader(file)} == set("abcd")
    # Other settings give other results, so all scans are segmented again.
    assert run(tmp_path / "in", out, adapter, "--largest_component") == 0
    assert all((out / name).stat().st_mtime_ns > time for name, time in again.items())

    for path in (tmp_path / "in").iterdir():
        path.write_bytes(b"junk")
    assert run(tmp_path / "in", tmp_path / "none", adapter) == 2
    assert not list((tmp_path / "none").glob("*.nii.gz"))


def test_only_a_batch_of_slices_is_scaled_at_a_time(tmp_path: Path, adapter: Path):
    sizes = []

    class Watched(np.ndarray):
        pass

    slices = UnitSlices(marked((40, 8, 8))[0].view(Watched), (-1000.0, 1000.0), 1, tmp_path)
    original = type(slices).__getitem__

    def watch(self: Any, part: slice) -> np.ndarray:
        sizes.append(len(range(*part.indices(40))))
        return original(self, part)

    type(slices).__getitem__ = watch
    try:
        predict_volume(Bands(), slices, input_size=(8, 8), image_size=(8, 8), batch_size=3)
    finally:
        type(slices).__getitem__ = original
    assert max(sizes) == 3 and sum(sizes) == 40


def test_flips_are_undone_before_the_mean():
    class Sided(Bands):
        def forward(self, images: torch.Tensor, *_: Any) -> dict[str, torch.Tensor]:
            side = torch.linspace(-2, 2, images.shape[-1]).expand(images.shape[-2:])
            grey = images.mean(dim=1)
            return {"masks": torch.stack([torch.zeros_like(grey), 4 * grey - 2 + side], dim=1)}

    rng = np.random.default_rng(0)
    volume = rng.random((3, 8, 8), dtype=np.float32)
    sizes = {"input_size": (8, 8), "image_size": (8, 8)}
    found: list[torch.Tensor] = []
    predict_volume(
        Sided(),
        volume,
        **sizes,
        flips=(1,),
        on_probabilities=lambda start, part: found.append(part),
    )
    side = np.linspace(-2, 2, 8, dtype=np.float32)
    plain, flipped = (1 / (1 + np.exp(-(4 * volume - 2 + s))) for s in (side, side[::-1]))
    assert np.abs(torch.cat(found)[:, 1].numpy() - (plain + flipped) / 2).max() < 1e-6
    # A network without sides gives the same labels with all flips.
    plain = predict_volume(Bands(), volume, **sizes)
    assert np.array_equal(predict_volume(Bands(), volume, **sizes, flips=(0, 1)), plain)


def test_the_largest_component_is_kept():
    labels = np.zeros((4, 10, 10), np.uint8)
    labels[0, :2, :2], labels[1:3, 5:8, 5:8], labels[3, 9, 0] = 1, 1, 1
    labels[0, 9, 9], labels[1, 0, 0] = 2, 3
    labels[3, 0:2, 5] = 3
    segmenting.keep_largest(labels)
    expected = np.zeros_like(labels)
    expected[1:3, 5:8, 5:8], expected[0, 9, 9], expected[3, 0:2, 5] = 1, 2, 3
    assert np.array_equal(labels, expected)


REFUSED = {
    "MR for a CT network": (lambda: np.full((3, 9, 9), 5, np.int16), {}, "Hounsfield"),
    "a constant scan": (lambda: np.zeros((3, 9, 9), np.int16), {"intensity": MR}, "0 everywhere"),
    "8 bits for a network of 16": (
        lambda: np.full((3, 9, 9), 200, np.uint8),
        {"intensity": Intensity(RANGE, 0.0, 65535.0)},
        "8 bits per pixel",
    ),
    "too large values": (
        lambda: np.full((3, 9, 9), 4000, np.int16),
        {"intensity": Intensity(RANGE, 0.0, 255.0)},
        "expected 0…255",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_scans_that_do_not_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
):
    make, changes, told = REFUSED[name]
    adapter = make_adapter(tmp_path, replace(SPEC, **changes), monkeypatch)
    write_volume(tmp_path / "scan.nii.gz", make(), Geometry.unknown())
    assert run(tmp_path / "scan.nii.gz", tmp_path / "out", adapter) == 2
    assert told in capfd.readouterr().err
    assert not (tmp_path / "out" / "scan.nii.gz").exists()


def test_a_real_network_needs_only_its_adapter_file(tmp_path: Path):
    """No stand-in here: the file rebuilds the network without base weights or flags."""
    adapter = make_adapter(tmp_path, SPEC)
    write_volume(tmp_path / "scan.nii.gz", marked((3, 20, 24))[0], placed("RAS"))
    assert run(tmp_path / "scan.nii.gz", tmp_path / "out", adapter, "--batch_size", "2") == 0
    assert read_volume(tmp_path / "out" / "scan.nii.gz")[0].shape == (3, 20, 24)
