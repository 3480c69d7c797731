"""The package that pip installs: what it holds, and that its programs are the flat scripts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from conftest import TINY_FLAGS, write_slices
from test_imports import project_files
from wrong_input import make_good

import predict
import test as testing
import train
from config.source_code import fingerprint_code
from distributed.signals import EXIT_INTERRUPTED

REPOSITORY = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "tests", "quickstart", "__pycache__", "*.egg-info"
)
RUN = [*TINY_FLAGS, "--max_epochs", "1", "--batch_size", "2"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the project, built without a network."""
    return build(REPOSITORY, tmp_path_factory.mktemp("wheel"))


def build(source: Path, folder: Path) -> Path:
    """Build a wheel of a copy of the project, so that nothing is written beside the sources."""
    pytest.importorskip("setuptools", "77", reason="setuptools 77 builds the wheel")
    copy = shutil.copytree(source, folder / "source", ignore=LEFT_OUT)
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    pip("wheel", *flags, "--wheel-dir", str(folder), str(copy))
    return next(folder.glob("samed-*.whl"))


def pip(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the console scripts of an environment that has the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    return installed(folder, str(wheel))


def installed(folder: Path, *what: str) -> Path:
    """Install into a new environment that sees the packages of this one; return its programs."""
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "other.pth").write_text("\n".join(p for p in sys.path if "site-packages" in p))
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    pip("--python", str(folder / "bin" / "python"), "install", *flags, *what)
    return folder / "bin"


def run(
    programs: Path, name: str, *words: str, cwd: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run an installed program outside the checkout."""
    hidden = ("PYTHONPATH", "SAMED_VARIANTS", "SAMED_CHECKPOINTS")
    environment = {key: v for key, v in os.environ.items() if key not in hidden} | variables
    command = [str(programs / name), *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_everything_is_in_one_package(wheel: Path):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"samed"}
    sources = {str(path.relative_to(REPOSITORY)) for path in project_files()}
    wanted = {name for name in sources if not name.startswith("benchmarks/")}
    found = {name for name in names if name.endswith(".py")}
    assert found == {n if n.startswith("samed/") else f"samed/project/{n}" for n in wanted}


def test_no_page_or_table_beside_the_code_is_missing(wheel: Path):
    if not (REPOSITORY / ".git").exists():
        pytest.skip("the project is not in a git repository")
    command = ["git", "-C", str(REPOSITORY), "ls-files"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    parts = {name.split("/")[0] for name in known if name.endswith("/__init__.py")}
    parts = parts - {"benchmarks", "samed"} | {"ablations", "recipes", "lists"}
    wanted = {f"samed/project/{name}" for name in known if name.split("/")[0] in parts}
    assert wanted - set(zipfile.ZipFile(wheel).namelist()) == set()


def test_the_requirements_are_those_of_the_files(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        told = HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist")
    wanted = set(pins("requirements.txt"))
    for extra in ("demo", "dicom", "gpu", "onnx"):
        if (REPOSITORY / f"requirements-{extra}.txt").is_file():
            wanted |= {f'{pin}; extra == "{extra}"' for pin in pins(f"requirements-{extra}.txt")}
    assert set(told) == wanted


def pins(name: str) -> list[str]:
    """The packages of a requirement file, without comments."""
    lines = (line.split("#")[0].strip() for line in (REPOSITORY / name).read_text().splitlines())
    return [line for line in lines if line]


def test_import_samed_gives_a_version_and_nothing_else(programs: Path, tmp_path: Path):
    shown = "import sys, samed; print(samed.__version__, samed.PROJECT, *sys.modules)"
    done = run(programs, "python", "-c", shown, cwd=tmp_path)
    version, project, *modules = done.stdout.split()
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        assert version == tomllib.load(file)["project"]["version"]
    assert not {"torch", "numpy", "common", "utils", "samed.programs"} & set(modules)
    # Adapters that were trained from a checkout are of the same code.
    assert fingerprint_code("sam_lora_image_encoder", Path(project)) == fingerprint_code(
        "sam_lora_image_encoder"
    )


def test_the_programs_compute_what_the_scripts_compute(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From raw scans to segmentations, in a folder that shadows names of the project."""
    monkeypatch.chdir(tmp_path)
    make_good(tmp_path)  # raw/, and data/ by the flat scripts
    (tmp_path / "common.py").write_text("raise SystemExit('the current folder was imported')")
    for name, words, flat in (
        ("samed-prepare", "--input raw --output {}_data --workers 2", None),
        ("samed-train", f"--root_path {{}}_data --output {{}} --name run {' '.join(RUN)}", train),
        ("samed-test", "--config {}/run --volume_path data --is_savenii --device cpu", testing),
        (
            "samed-predict",
            "--config {}/run --input scan.nii.gz --output {}_new --device cpu",
            predict,
        ),
    ):
        done = run(programs, name, *words.format("own", "own").split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        if flat is None:
            shutil.copytree("data", "flat_data")
        else:
            flat.main(words.format("flat", "flat").split())
    assert hashes("own_data", "*.npz") == hashes("flat_data", "*.npz") != []
    assert hashes("own_new", "*.nii.gz") == hashes("flat_new", "*.nii.gz") != []
    assert hashes("own/run", "epoch_0.pth") == hashes("flat/run", "epoch_0.pth") != []
    scores = [json.loads(Path(who, "run/test/results.json").read_text()) for who in ("own", "flat")]
    assert scores[0]["classes"] == scores[1]["classes"]
    assert scores[0]["environment"]["commit"] is None


def test_a_variant_of_ones_own_is_found_where_the_user_says(programs: Path, tmp_path: Path):
    """Never in the current folder, which may hold the data and adapters of others."""
    (tmp_path / "mine.py").write_text(
        "from helper import LoRA_Sam as Base\nclass LoRA_Sam(Base):\n    pass\n"
    )
    (tmp_path / "helper.py").write_text("from sam_lora_image_encoder import LoRA_Sam\n")
    write_slices(tmp_path / "data", num_classes=2)
    words = ["--root_path", "data", "--num_classes", "2", "--module", "mine", "--output", "o", *RUN]
    done = run(programs, "samed-train", *words, cwd=tmp_path)
    assert done.returncode == 2 and "--module mine does not exist" in done.stderr
    done = run(programs, "samed-train", *words, cwd=tmp_path, SAMED_VARIANTS=".")
    assert done.returncode == 0, done.stderr
    found = json.loads(next(tmp_path.glob("o/*/config.json")).read_text())
    assert {"mine.py", "helper.py"} <= found["code"].keys()


def test_two_processes_stop_and_go_on(programs: Path, tmp_path: Path):
    """The installed script starts its ranks, which save after a signal and then go on."""
    write_slices(tmp_path / "data", count=12, num_classes=2)
    words = ["--root_path", "data", "--num_classes", "2", "--output", "o", *TINY_FLAGS]
    words += ["--max_epochs", "3", "--batch_size", "2", "--processes", "2", "--name", "run"]
    part = [str(programs / "samed-train"), *words, "--save_steps", "1"]
    process = subprocess.Popen(part, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while process.poll() is None and not has_steps(tmp_path / "o" / "run"):
        time.sleep(0.02)
    process.terminate()
    assert process.wait() == EXIT_INTERRUPTED
    done = run(programs, "samed-train", *words, "--resume", "o/run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on after step" in (tmp_path / "o" / "run" / "log.txt").read_text()
    assert (tmp_path / "o" / "run" / "epoch_2.pth").is_file()


def has_steps(folder: Path) -> bool:
    """Whether a run has saved a state after its first step."""
    return any(folder.glob("states/step_*[1-9]-*.pth"))


def test_wrong_input_ends_with_code_2_and_one_sentence(programs: Path, tmp_path: Path):
    words = ["--input", "absent.nii.gz", "--output", "new"]
    done = run(programs, "samed-predict", *words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    # Weights are looked for in the current folder and not inside the package.
    assert "error: " in done.stderr and " checkpoints/epoch_159.pth" in done.stderr


def test_every_program_is_reached(programs: Path, tmp_path: Path):
    """Also where the administrator set PYTHONSAFEPATH, and by `python -m samed`."""
    for name in ("samed-prepare", "samed-test", "samed-ablate", "samed-demo"):
        done = run(programs, name, "--help", cwd=tmp_path, PYTHONSAFEPATH="1")
        assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    done = run(programs, "python", "-m", "samed", "--help", cwd=tmp_path)
    listed = done.stdout.split("one of")[1].split()
    assert {"train", "evaluation", "preprocess.phantom", "tools.adapter"} <= set(listed)
    assert "setup" not in listed
    done = run(programs, "python", "-m", "samed", "tools.adapter", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "tools.adapter" in done.stdout, done.stderr
    done = run(programs, "python", "-m", "samed", "os", cwd=tmp_path)
    assert done.returncode == 2 and "'os' is no program of SAMed" in done.stderr


def test_an_editable_install_runs_the_checkout(tmp_path: Path):
    source = shutil.copytree(REPOSITORY, tmp_path / "source", ignore=LEFT_OUT)
    folder = installed(tmp_path / "environment", "--editable", str(source))
    (tmp_path / "elsewhere").mkdir()
    shown = "import samed; print(samed.PROJECT, samed.INSTALLED, samed.__version__ != 'unknown')"
    done = run(folder, "python", "-c", shown, cwd=tmp_path / "elsewhere")
    assert done.stdout.split() == [str(source), "False", "True"]
    done = run(folder, "samed-test", "--volume_path", "x", cwd=tmp_path / "elsewhere")
    assert f"{source}/checkpoints/epoch_159.pth" in done.stderr
    for program in ("samed-test", "samed-prepare"):
        done = run(folder, program, "--help", cwd=tmp_path / "elsewhere")
        assert done.returncode == 0, done.stderr


def test_the_image_gets_all_that_the_wheel_needs(wheel: Path, tmp_path: Path):
    """Only what .dockerignore lets through, and nothing that a user keeps beside it."""
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*" and rules[-1] == "**/__pycache__"
    context = tmp_path / "context"
    context.mkdir()
    for path in (path for rule in rules[1:-1] for path in REPOSITORY.glob(rule.removeprefix("!"))):
        if path.is_dir():
            shutil.copytree(path, context / path.name, ignore=LEFT_OUT)
        else:
            shutil.copy(path, context)
    (tmp_path / "built").mkdir()
    built = build(context, tmp_path / "built")
    assert sorted(zipfile.ZipFile(built).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def hashes(folder: str, pattern: str) -> list[tuple[str, str]]:
    """The names and the SHA-256s of the files of a folder."""
    paths = sorted(Path(folder).rglob(pattern))
    return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]
