"""Raw scans to slices and volumes: exact values, safe reruns, and helpful errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy import ndimage
from test_volumes import OBLIQUE, cut, junk, write_image

from common.files import load_arrays
from common.written import JOURNAL
from datasets.dataset_synapse import Synapse_dataset
from datasets.names import case_names
from datasets.registry import SPEC_FILE, SYNAPSE, stored_spec
from datasets.scans.files import ScanFile
from datasets.scans.orientation import orientation_of
from datasets.scans.volumes import Geometry, read_volume, write_volume
from preprocess.prepare import main
from preprocess.raw_cases import RawCase
from preprocess.raw_data import RawData
from preprocess.split import Split, choose_roles

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_CT = REPOSITORY.parent / "shared" / "data" / "ct"
SHAPE = (4, 12, 10)  # (D, H, W)


def scan(number: int, shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Return HU int16 and raw labels uint8 of a case, both (D, H, W)."""
    rng = np.random.default_rng(number)
    image = rng.integers(-300, 400, shape).astype(np.int16)
    image.flat[:2] = -1024, 3000
    return image, rng.integers(0, 14, shape).astype(np.uint8)


def add_case(
    root: Path,
    number: int,
    image: np.ndarray | None = None,
    label: np.ndarray | None = None,
    geometry: Geometry = OBLIQUE,
    label_geometry: Geometry = OBLIQUE,
) -> tuple[Path, Path]:
    """Write a case in the BTCV layout, with arrays of `scan` where none are given."""
    made = scan(number)
    paths = [root / "Training" / kind / f"{kind}{number:04d}.nii.gz" for kind in ("img", "label")]
    write_volume(paths[0], made[0] if image is None else image, geometry)
    write_volume(paths[1], made[1] if label is None else label, label_geometry)
    return paths[0], paths[1]


def prepare(root: Path, output: Path, *flags: str | int) -> int:
    """Run the command in this process and return its exit code."""
    flags = flags if "--workers" in flags else (*flags, "--workers", 1)
    try:
        main(["--input", str(root), "--output", str(output), *map(str, flags)])
    except SystemExit as stop:
        return int(stop.code)
    return 0


def files_of(folder: Path) -> dict[str, int]:
    """Return every file below a folder with the time it was written."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


def read_h5(path: Path) -> dict[str, Any]:
    """Return data sets and attributes of a test volume."""
    with h5py.File(path, "r") as file:
        return {**{key: file[key][()] for key in file}, **dict(file.attrs)}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Cases 1 (published: test), 5 and 31 (training, 31 first) and 50 (in neither list)."""
    for number in (1, 5, 31, 50):
        add_case(tmp_path / "raw", number)
    return tmp_path / "raw"


def test_values_and_layout(raw: Path, tmp_path: Path):
    output = tmp_path / "out"
    assert prepare(raw, output) == 0
    lists = {path.name: path.read_text().split() for path in (output / "lists").iterdir()}
    slices = [f"case{n:04d}_slice{i:03d}" for n in (31, 5, 50) for i in range(SHAPE[0])]
    assert lists == {"train.txt": slices, "test_vol.txt": ["case0001"]}
    assert {p.name for p in (output / "train_npz").iterdir()} == {f"{s}.npz" for s in slices}
    assert [p.name for p in (output / "test_vol_h5").iterdir()] == ["case0001.npy.h5"]

    table = np.zeros(14)
    for raw_value, used in {1: 1, 2: 2, 3: 3, 4: 4, 6: 5, 7: 6, 8: 7, 11: 8}.items():
        table[raw_value] = used
    for number in (1, 5):
        image, label = scan(number)
        expected = ((np.clip(image, -125, 275) + 125.0) / 400).astype(np.float32)
        if number == 1:
            found = read_h5(output / "test_vol_h5" / "case0001.npy.h5")
            assert found["label"].dtype == np.uint8
        else:
            names = [name for name in slices if name.startswith("case0005")]
            files = [output / "train_npz" / f"{name}.npz" for name in names]
            parts = [load_arrays(file, ("image", "label")) for file in files]
            found = {key: np.stack([part[key] for part in parts]) for key in ("image", "label")}
            assert found["label"].dtype == np.float32
        assert found["image"].dtype == np.float32
        assert np.abs(found["image"] - expected).max() <= 1e-7
        assert found["image"].min() == 0 and found["image"].max() == 1
        assert np.array_equal(found["label"], table[label])


def test_geometry_and_summary(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert prepare(raw / "Training", tmp_path / "out") == 0
    found = read_h5(tmp_path / "out" / "test_vol_h5" / "case0001.npy.h5")
    stored = Geometry(*(tuple(found[name]) for name in ("spacing", "origin", "direction")))
    assert stored == read_volume(raw / "Training" / "img" / "img0001.nii.gz")[1]
    assert stored.matches(OBLIQUE)

    summary = json.loads((tmp_path / "out" / "preprocess.json").read_text())
    first = summary["cases"][0]
    assert (first["case"], first["roles"], first["shape"]) == ("case0001", ["test"], list(SHAPE))
    assert tuple(first["direction"]) == stored.direction
    assert first["limits"] == [-125, 275] and summary["flags"]["label_values"] == "raw"
    spec = stored_spec(tmp_path / "out")
    # All scans have the same orientation and keep it; later scans must have it too.
    known = {"size": None, "orientation": orientation_of(stored), "raw_range": (-1024.0, 3000.0)}
    assert spec == replace(SYNAPSE, **known)
    assert sum(first["voxels"].values()) == np.prod(SHAPE)
    assert first["voxels"]["pancreas"] == (scan(1)[1] == 11).sum()
    printed = capsys.readouterr().out
    assert all(f"case{n:04d}" in printed for n in (1, 5, 31, 50)) and "2.500" in printed


def test_the_data_set_reads_what_was_written(raw: Path, tmp_path: Path):
    prepare(raw, tmp_path / "out")
    for split, count in (("train", 12), ("test_vol", 1)):
        dataset = Synapse_dataset(tmp_path / "out", None, split)
        dataset.check()
        assert len(dataset) == count
    assert Geometry(**dataset.geometry(0)).matches(OBLIQUE)


@pytest.mark.parametrize("shape", [SHAPE, (1, 480, 480)])
def test_resizing_equals_scipys_zoom(tmp_path: Path, shape: tuple[int, ...]):
    size = 224 if shape[1] == 480 else 7
    image, label = scan(7, shape)
    add_case(tmp_path / "raw", 7, image, label % 9)
    flags = ("--label_values", "classes", "--test_cases", 7, "--train_cases", 7)
    assert prepare(tmp_path / "raw", tmp_path / "out", *flags, "--size", size) == 0
    native = read_h5(tmp_path / "out" / "test_vol_h5" / "case0007.npy.h5")
    assert native["image"].shape == shape
    factors = (size / shape[1], size / shape[2])
    for index in range(shape[0]):
        path = tmp_path / "out" / "train_npz" / f"case0007_slice{index:03d}.npz"
        found = load_arrays(path, ("image", "label"))
        expected = ndimage.zoom(native["image"][index], factors, order=3)
        assert np.abs(found["image"] - expected).max() <= 1e-5
        assert np.array_equal(found["label"], ndimage.zoom((label % 9)[index], factors, order=0))
        if size == 224:  # the published numbers contain this property
            assert not found["image"][-1].any() and not found["label"][:, -1].any()
            assert found["image"].max() > 1.05  # overshoot is not clipped


def test_roles():
    numbers = [1, 2, 5, 31, 50]
    file = ScanFile("img0001", Path("img0001.nii.gz"), ".nii.gz")
    names = dict(zip(case_names(*numbers), numbers, strict=True))
    data = RawData(SYNAPSE, {name: RawCase(name, file, file, name) for name in names})

    def split(train: list[int] | None, test: list[int] | None) -> tuple[list[int], list[int]]:
        named = (None if cases is None else list(map(str, cases)) for cases in (train, test))
        roles = choose_roles(data, Split(*named, 0.2, None, 0, 1234))
        return tuple(
            [number for name, number in names.items() if role in roles[name]]
            for role in ("train", "test")
        )

    assert split(None, None) == ([5, 31, 50], [1, 2])
    assert split(None, [5]) == ([1, 2, 31, 50], [5])
    # Case 1 belongs to the published test cases, but here it is trained on.
    assert split([1, 5], None) == ([1, 5], [2])
    # A case has both roles only on request.
    assert split([5], [5]) == ([5], [5])
    assert split(None, []) == (numbers, [])


def test_rerun_keeps_finished_cases(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    rewritten = {"lists/train.txt", "lists/test_vol.txt", "preprocess.json", SPEC_FILE, JOURNAL}

    def changed(*flags: str | int) -> set[str]:
        before = files_of(output)
        assert prepare(raw, output, *flags) == 0
        after = files_of(output)
        both = before.keys() & after.keys()
        return {n for n in both if before[n] != after[n]} | (before.keys() ^ after.keys())

    prepare(raw, output)
    assert changed() <= rewritten
    assert "kept" in capsys.readouterr().out
    assert {n for n in changed("--size", 8) if "case0001" in n} == set()  # volumes stay native
    assert load_arrays(output / "train_npz" / "case0005_slice000.npz", ("image",))[
        "image"
    ].shape == (8, 8)

    image, label = scan(5)
    add_case(raw, 5, image[:2], label[:2])  # fewer slices: the old ones must go
    touched = changed("--size", 8) - rewritten
    assert touched and all("case0005" in name for name in touched)
    assert len(list((output / "train_npz").glob("case0005*"))) == 2
    assert "case0005_slice002" not in (output / "lists" / "train.txt").read_text()

    (output / "train_npz" / "case0031_slice001.npz").unlink()
    assert "train_npz/case0031_slice001.npz" in changed("--size", 8)
    # Case 31 moves to the test cases: a volume replaces its slices.
    moved = changed("--size", 8, "--test_cases", 31)
    assert not list((output / "train_npz").glob("case0031*"))
    assert "test_vol_h5/case0031.npy.h5" in moved
    assert len(changed("--size", 8, "--test_cases", 31, "--overwrite") - rewritten) > 14


@pytest.mark.slow
def test_bad_case_among_good_ones(raw: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    image, label = scan(5)
    add_case(raw, 5, image, label + 200)
    add_case(raw, 50, image / np.float32(1000))
    assert prepare(raw, output, "--workers", 2) == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 2 and "label0005.nii.gz" in told[0] and "img0050.nii.gz" in told[1]
    files = files_of(output)
    assert {".done/case0001.json", ".done/case0031.json"} <= files.keys()
    assert not [f for f in files if "0005" in f or "0050" in f or "lists" in f]
    assert "preprocess.json" not in files

    add_case(raw, 5)
    add_case(raw, 50)
    assert prepare(raw, output) == 0
    after = files_of(output)
    assert all(after[name] == written for name, written in files.items())
    assert {"lists/train.txt", "preprocess.json", ".done/case0005.json"} <= after.keys()

    # A list must go with the slices that it names.
    add_case(raw, 5, image, label + 200)
    assert prepare(raw, output) == 2
    left = files_of(output)
    assert not {"lists/train.txt", "lists/test_vol.txt", "preprocess.json"} & left.keys()
    assert not [name for name in left if "case0005" in name]


def test_interrupted(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "out"
    fsync, calls = os.fsync, []

    def interrupt(descriptor: int) -> None:
        fsync(descriptor)
        if ".partial." in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            calls.append(descriptor)
            if len(calls) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    assert prepare(raw, output) == 130
    monkeypatch.undo()
    names = files_of(output)
    assert not [name for name in names if "partial" in name or "lists" in name]
    assert ".done/case0005.json" not in names


KILLED = """
import os, signal, sys
from preprocess.prepare import main
fsync, calls = os.fsync, []
def fatal(descriptor):
    fsync(descriptor)
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    if ".partial." in name and name.endswith(".npz"):
        calls.append(name)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fatal
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_killed(raw: Path, tmp_path: Path):
    output = tmp_path / "out"
    flags = ["--input", str(raw), "--output", str(output), "--workers", "1"]
    run = subprocess.run([sys.executable, "-c", KILLED, *flags], cwd=REPOSITORY, check=False)
    assert run.returncode == -signal.SIGKILL
    left = [path for path in (output / "train_npz").iterdir() if ".partial." not in path.name]
    assert len(left) == 2
    for path in left:
        load_arrays(path, ("image", "label"))  # raises an error if the file is damaged
    assert not (output / "lists" / "train.txt").exists()
    assert prepare(raw, output) == 0
    assert not [name for name in files_of(output) if "partial" in name]
    Synapse_dataset(output, None, "train").check()


def damaged(number: int, kind: str, change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Return a function that changes a file of the raw data."""
    return lambda raw: change(raw / "Training" / kind / f"{kind}{number:04d}.nii.gz")


def with_image(image: np.ndarray) -> Callable[[Path], None]:
    return lambda raw: add_case(raw, 5, image)


def with_label(label: np.ndarray) -> Callable[[Path], None]:
    return lambda raw: add_case(raw, 5, label=label)


def with_nan(image: np.ndarray) -> np.ndarray:
    image = image.astype(np.float32)
    image[2, 0, 0] = np.nan
    return image


UNIT = np.linspace(0, 1, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
IMAGE, LABEL = scan(5)
BAD_RAW = {
    "no image folder": (lambda raw: (raw / "Training" / "img").rename(raw / "img"), "img"),
    "no label": (damaged(5, "label", Path.unlink), "img0005.nii.gz; every"),
    "no image": (damaged(5, "img", Path.unlink), "label0005.nii.gz; every"),
    "two files": (
        lambda raw: write_image(raw / "Training" / "img" / "img5.nii", IMAGE),
        "two files of one case",
    ),
    "other shape": (with_label(LABEL[:3]), "shape (D, H, W) (4, 12, 10) and (3, 12, 10)"),
    "other place": (
        lambda raw: add_case(raw, 5, label_geometry=Geometry.unknown()),
        "spacing (0.7, 0.9, 2.5) and (1, 1, 1)",
    ),
    "cut image": (damaged(5, "img", cut), "cut short"),
    "cut label": (damaged(5, "label", cut), "label0005.nii.gz is damaged or cut short"),
    "junk": (damaged(5, "img", junk), "not a readable scan"),
    "4-D": (damaged(5, "img", lambda path: write_image(path, np.zeros((2, *SHAPE)))), "4 dim"),
    "NaN": (with_image(with_nan(IMAGE)), "first in slice 2"),
    "in [0, 1]": (with_image(UNIT), "from 0 to 1, which do not look like Hounsfield"),
    "8 bit": (with_image((UNIT * 255).astype(np.uint8)), "from 0 to 255"),
    "MR": (with_image((UNIT * 880 - 47).astype(np.int16)), "from -47 to 833"),
    "standardised": (with_image(UNIT * 6 - 3), "from -3 to 3"),
    "all air": (with_image(np.full(SHAPE, -1000, np.int16)), "from -1000 to -1000"),
    "label 255": (with_label(np.where(LABEL == 3, 255, LABEL).astype(np.uint8)), "values 255, exp"),
    "label -1": (with_label(np.where(LABEL == 3, -1, LABEL.astype(np.int16))), "values -1, exp"),
    "fraction": (with_label(LABEL.astype(np.float32) + 0.5 * (LABEL == 3)), "values 3.5, exp"),
}


@pytest.mark.parametrize("name", BAD_RAW)
def test_bad_scans(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str):
    change, told = BAD_RAW[name]
    add_case(tmp_path / "raw", 5)
    change(tmp_path / "raw")
    assert_refused(tmp_path / "raw", tmp_path / "out", capfd, told)


def assert_refused(
    raw: Path, output: Path, capfd: pytest.CaptureFixture[str], told: str, *flags: str | int
) -> None:
    """Require exit code 2, one error line with `told` in it, and no lists."""
    capfd.readouterr()
    assert prepare(raw, output, *flags) == 2
    shown = capfd.readouterr().err
    lines = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and told in lines[0] and "Traceback" not in shown
    assert not (output / "lists" / "train.txt").exists()


BAD_FLAGS = {
    "classes beyond": (("--label_values", "classes"), "values 9, 10, 11, 12, 13, expected"),
    "unknown case": (("--train_cases", 5, 77), "names 77"),
    "no case": (("--train_cases", "--test_cases"), "name no case"),
    "unknown data set": (("--dataset", "Synapes"), "unknown data set 'Synapes'"),
    "size": (("--size", 0), "--size is 0"),
    "workers": (("--workers", 0), "--workers is 0"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str):
    flags, told = BAD_FLAGS[name]
    add_case(tmp_path / "raw", 5)
    assert_refused(tmp_path / "raw", tmp_path / "out", capfd, told, *flags)


def test_bad_folders(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    raw, output = tmp_path / "raw", tmp_path / "out"
    assert_refused(raw, output, capfd, "does not exist; expected dataset.json with imagesTr/")
    for kind in ("img", "label"):
        (raw / kind).mkdir(parents=True)
    assert_refused(raw, output, capfd, "holds no img0001.nii.gz")
    (raw / "img").rmdir()
    (raw / "label").rmdir()
    add_case(raw, 5)
    (tmp_path / "file").touch()
    assert_refused(raw, tmp_path / "file", capfd, "pass another --output")

    foreign = output / "train_npz" / "case0005_slice009.npz"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"made elsewhere")
    assert_refused(raw, output, capfd, "made elsewhere")
    assert foreign.read_bytes() == b"made elsewhere"
    assert prepare(raw, output, "--overwrite") == 0
    assert not foreign.exists()


def test_warnings(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    raw = tmp_path / "raw"
    add_case(raw, 5, label=np.zeros(SHAPE, np.uint8))
    add_case(raw, 6, label=LABEL % 9)
    (raw / "Training" / "img" / "notes.txt").touch()
    (raw / "Training" / "img" / "._img0005.nii.gz").touch()  # some systems leave hidden files
    assert prepare(raw, tmp_path / "out", "--train_cases", 5, 6, "--test_cases", 6) == 0
    shown = capfd.readouterr().err
    for told in ("case0006 both train and test", "labels of case0005", "notes.txt", "above 8"):
        assert f"{told}" in shown
    assert "._img" not in shown
    assert prepare(raw, tmp_path / "out", "--train_cases", 5, "--size", 8) == 0
    shown = capfd.readouterr().err
    assert "left out: case0006" in shown and "not square" in shown


@pytest.mark.slow
def test_command(tmp_path: Path):
    command = [sys.executable, "-m", "preprocess.prepare", "--output", str(tmp_path / "out")]
    run = subprocess.run(
        [*command, "--input", str(tmp_path / "none")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert run.returncode == 2 and run.stdout == ""
    assert len(run.stderr.splitlines()) == 1 and run.stderr.startswith("error: --input")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not REAL_CT.is_dir(), reason=f"no sample scans in {REAL_CT}")
def test_real_scan(tmp_path: Path):
    for kind, name in (("img", "abdomen_full"), ("label", "abdomen_full_label")):
        (tmp_path / "raw" / kind).mkdir(parents=True)
        link = tmp_path / "raw" / kind / f"{kind}0001.nii.gz"
        link.symlink_to(REAL_CT / f"{name}.nii.gz")
    flags = ("--label_values", "classes", "--train_cases", 1, "--test_cases", 1)
    assert prepare(tmp_path / "raw", tmp_path / "out", *flags) == 0
    image, geometry = read_volume(REAL_CT / "abdomen_full.nii.gz")
    found = read_h5(tmp_path / "out" / "test_vol_h5" / "case0001.npy.h5")
    assert Geometry(*(tuple(found[n]) for n in ("spacing", "origin", "direction"))) == geometry
    assert np.array_equal(found["label"], read_volume(REAL_CT / "abdomen_full_label.nii.gz")[0])
    assert np.abs(found["image"] - (image.clip(-125, 275) + 125) / 400).max() <= 1e-6
    assert len(list((tmp_path / "out" / "train_npz").iterdir())) == len(image)
    Synapse_dataset(tmp_path / "out", None, "train").check()
