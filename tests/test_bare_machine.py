"""A machine with PyTorch and the usual packages, but without those that only some input needs.

There everything imports, training on slices and testing of volumes work, and input that needs an
absent package ends at once with one sentence.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import TINY_FLAGS, write_slices
from scipy.spatial.transform import Rotation

import utils
from common.errors import OPTIONAL
from datasets.scans.geometry import Geometry
from datasets.scans.orientation import orientation_of
from datasets.scans.volumes import write_volume

REPOSITORY = Path(__file__).resolve().parent.parent
ABSENT = (*OPTIONAL, "pydicom")
# Python runs this at the start of every process, also of the processes that programs start.
HOOK = f"""
import sys
class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent)
"""
# Modules that only input or flags reach which need one of the packages.
NEEDING = {
    "benchmarks.many_cases",
    "datasets.scans.formats",
    "datasets.scans.label_names",
    "datasets.scans.nifti",
    "datasets.scans.volumes",
    "training.events",
}
IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error.name)
"""


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds none of the packages."""
    folder = tmp_path_factory.mktemp("hook")
    (folder / "sitecustomize.py").write_text(HOOK)
    path = os.pathsep.join([str(folder), str(REPOSITORY), str(REPOSITORY / "tests")])
    return os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def python(environment: dict[str, str], *argv: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python on the bare machine, in the repository."""
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines on stderr but for warnings, after an exit with code 2."""
    assert done.returncode == 2, done.stderr
    return [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]


def absent(package: str) -> list[str]:
    return [f"error: {package} is not installed; run: pip install -r requirements.txt"]


def module_names() -> list[str]:
    """Every module of the project, and the tests of the GPU."""
    packages = [path.parent for path in REPOSITORY.glob("*/__init__.py")]
    files = [*REPOSITORY.glob("*.py"), *itertools.chain(*(p.rglob("*.py") for p in packages))]
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in files]
    return [*(name.removesuffix(".__init__") for name in names), "conftest", "test_gpu"]


def test_everything_imports(without: dict[str, str]):
    names = module_names()
    assert {"train", "preprocess.prepare", "benchmarks.plain"} < set(names)
    done = python(without, "-c", IMPORT_ALL, *names)
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert found.keys() == NEEDING, done.stdout
    assert {package.split(".")[0] for package in found.values()} == {
        "SimpleITK",
        "nibabel",
        "tensorboardX",
    }


def test_gpu_and_golden_tests_are_collected(without: dict[str, str]):
    files = ["tests/test_gpu.py", *REPOSITORY.glob("tests/test_golden_*.py")]
    done = python(without, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert collected == {
        "tests/test_gpu.py",
        "tests/test_golden_data.py",
        "tests/test_golden_model.py",
        "tests/test_golden_training.py",
    }
    assert "could not import 'SimpleITK'" in done.stdout  # test_golden_volume.py


@pytest.fixture(scope="module")
def trained(
    without: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """A data folder with one volume, the run of an epoch on it, and how its process ended."""
    folder = tmp_path_factory.mktemp("bare")
    data = write_slices(folder / "data")
    rng = np.random.default_rng(0)
    (data / "test_vol_h5").mkdir()
    with h5py.File(data / "test_vol_h5" / "case0001.npy.h5", "w") as file:
        file["image"] = rng.random((3, 20, 24), dtype=np.float32)
        file["label"] = rng.integers(0, 9, (3, 20, 24)).astype(np.uint8)
        oblique = Geometry((0.8, 0.7, 3.0), (10, -20, 5), (0.6, -0.8, 0, 0.8, 0.6, 0, 0, 0, 1))
        file.attrs.update(vars(oblique), orientation="LPS")
    (data / "lists" / "test_vol.txt").write_text("case0001\n")
    flags = ["--batch_size", "2", "--max_epochs", "1", "--stop_epoch", "1", "--AdamW"]
    places = ["--root_path", data, "--output", folder / "out"]
    done = python(without, "train.py", *places, *TINY_FLAGS, *flags)
    assert done.returncode == 0, done.stderr
    return data, next((folder / "out").iterdir()), done


@pytest.mark.slow
def test_training_works_and_warns_once(trained):
    _, run, done = trained
    assert [line for line in done.stderr.splitlines() if "tensorboard" in line.lower()] == [
        "warning: tensorboardX is not installed, so no files for TensorBoard are written; "
        "metrics.jsonl has the same numbers"
    ]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in record for record in records) == 3  # five slices in batches of two
    assert not list(run.rglob("*tfevents*"))


@pytest.mark.slow
def test_a_volume_with_geometry_is_tested(trained, without: dict[str, str], tmp_path: Path):
    data, run, _ = trained
    where = ["--config", run, "--volume_path", data, "--output_dir", tmp_path / "test"]
    done = python(without, "test.py", *where, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "test" / "results.json").read_text())
    # Turned from PRS to LPS, so that the axes y and x of the scan become columns and rows.
    assert results["cases"][0]["spacing"] == [3.0, 0.8, 0.7]


@pytest.mark.slow
def test_nifti_files_are_refused_before_the_work(trained, without: dict[str, str], tmp_path: Path):
    data, run, _ = trained
    for name in ("images", "labels"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        scan = tmp_path / "raw" / name / "a.nii.gz"
        write_volume(scan, np.zeros((2, 8, 8), np.int16), Geometry.unknown())
    for argv in (
        ["test.py", "--config", run, "--volume_path", data, "--is_savenii"],
        ["predict.py", "--config", run, "--input", tmp_path / "raw" / "images"],
        ["-m", "preprocess.prepare", "--input", tmp_path / "raw"],
        ["-m", "preprocess.phantom"],
    ):
        output = "--output_dir" if argv[0] == "test.py" else "--output"
        assert told(python(without, *argv, output, tmp_path / "out")) == absent("SimpleITK")
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_flags_that_need_a_package_are_refused_before_the_work(
    trained, without: dict[str, str], tmp_path: Path
):
    data, run, _ = trained
    where = ["--config", run, "--volume_path", data, "--output_dir", tmp_path / "out"]
    assert told(python(without, "test.py", *where, "--check_with_medpy")) == absent("medpy")
    shown = without | {"SAMED_DEBUG": "1"}
    assert told(python(shown, "test.py", *where)) == absent("icecream")
    assert not (tmp_path / "out").exists()


def test_the_environment_names_no_version_of_an_absent_package(monkeypatch: pytest.MonkeyPatch):
    known = importlib.metadata.version

    def version(package: str) -> str:
        if package == "nibabel":
            raise importlib.metadata.PackageNotFoundError(package)
        return known(package)

    monkeypatch.setattr(utils, "version", version)
    assert utils.environment()["nibabel"] is None
    assert utils.environment()["numpy"] == np.__version__


def test_orientations_are_those_of_simpleitk():
    """48 along the axes, ties of 45° and 60°, and oblique ones: found without SimpleITK."""
    turns = [Rotation.from_euler(axis, 45, degrees=True).as_matrix() for axis in "xyz"]
    turns += [np.eye(3), np.array([[2, -1, 2], [2, 2, -1], [-1, 2, 2]]) / 3]
    axes = [
        turn @ np.eye(3)[:, list(order)] * signs
        for turn in turns
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
    ]
    axes += [*Rotation.random(200, random_state=0).as_matrix()]
    for one in axes:
        cosines = tuple(one.ravel().tolist())
        expected = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(cosines)
        assert orientation_of(Geometry((1, 1, 1), (0, 0, 0), cosines)) == expected
