"""`test.py` on small volumes: the files it writes, correct numbers, refused input."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import TINY_FLAGS, write_slices
from PIL import Image
from real_data import REAL_DATA, needs_real_data

import test as test_program
import train
from common.errors import exit_on_bad_input
from common.written import JOURNAL
from datasets.scans.volumes import Geometry, read_volume
from evaluation.__main__ import main as report_main
from evaluation.figures import CASES_A_PAGE, ROWS, save_case, write_pages
from evaluation.metrics import ABSENT, BOTH, FALSE_ORGAN, MISSED, ClassScore, score_volume
from evaluation.overlays import case_panel, choose_slices, overlay
from evaluation.tables import CaseResult, class_means, format_table, total_means, write_json
from evaluation.viewer_library import find_library
from preprocess.prepare import main as prepare
from test import WAITING

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parent.parent
OBLIQUE = Geometry((0.8, 0.7, 3.0), (10.0, -20.0, 5.0), (0.6, -0.8, 0, 0.8, 0.6, 0, 0, 0, 1))


def run_program(*flags: str) -> subprocess.CompletedProcess:
    """Run test.py as a separate program."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "test.py"), "--device", "cpu", *flags],
        capture_output=True,
        text=True,
        check=False,
    )


def run_here(*flags: str) -> int:
    """Run test.py in this process, which has imported everything; return its exit code."""
    try:
        with exit_on_bad_input():
            test_program.main(["--device", "cpu", *flags])
    except SystemExit as stop:
        return int(stop.code)
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A data folder with two volumes, and the run of a network trained on it for three steps."""
    folder = tmp_path_factory.mktemp("test")
    data = write_slices(folder / "data")
    rng = np.random.default_rng(3)
    for case, shape in (("case0001", (5, 20, 24)), ("case0002", (1, 18, 18))):
        path = data / "test_vol_h5" / f"{case}.npy.h5"
        path.parent.mkdir(exist_ok=True)
        with h5py.File(path, "w") as file:
            file["image"] = rng.random(shape, dtype=np.float32)
            file["label"] = rng.integers(0, 9, shape).astype(np.uint8)
            if case == "case0001":
                file.attrs.update(vars(OBLIQUE))
    (data / "lists" / "test_vol.txt").write_text("case0001\ncase0002\n")
    flags = ["--batch_size", "5", "--max_iterations", "3", "--AdamW", "--base_lr", "1e-3"]
    train.main(["--root_path", str(data), "--output", str(folder / "out"), *TINY_FLAGS, *flags])
    return data, next((folder / "out").iterdir())


@pytest.fixture(scope="module")
def tested(trained: tuple[Path, Path]) -> tuple[Path, Path, subprocess.CompletedProcess]:
    data, run = trained
    flags = ["--input_size", "32", "--is_savenii"]
    return data, run, run_program("--config", str(run), "--volume_path", str(data), *flags)


def test_it_writes_every_result(tested):
    _, run, done = tested
    assert done.returncode == 0, done.stderr
    names = {str(p.relative_to(run / "test")) for p in (run / "test").rglob("*") if p.is_file()}
    cases = [
        f"predictions/case000{n}_{kind}.nii.gz" for n in (1, 2) for kind in ("pred", "img", "gt")
    ]
    pages = ["overlays.png", "dsc_per_organ.png"]
    slices = {name for name in names if name.startswith("slices/")}
    assert 1 <= len(slices) <= 4  # at most the worst two of each case
    report = {"report.html", "results.csv", "results.json", "log.txt"}
    report |= {"viewer.html"} if find_library() else set()
    assert names - slices == {*report, *pages, *cases, JOURNAL}
    for page in pages:
        assert min(Image.open(run / "test" / page).size) > 200
    assert "samed DSC %" in done.stdout and "right kidney" in done.stdout
    assert "case0001: slices of 20×24 are squashed" in done.stdout
    assert "warning: NSD's tolerance of 2 mm is below" in done.stderr
    assert "of 1 of 2 cases (up to 3 mm)" in done.stderr


def many_cases(folder: Path, count: int) -> Path:
    """A data folder of small volumes of one slice."""
    (folder / "lists").mkdir(parents=True)
    (folder / "lists" / "test_vol.txt").write_text("".join(f"c{n}\n" for n in range(count)))
    for number in range(count):
        with h5py.File(folder / f"c{number}.npy.h5", "w") as file:
            file["image"] = np.full((1, 16, 16), number / count, np.float32)
            file["label"] = np.eye(16, dtype=np.uint8)[None]
    return folder


def test_pictures_of_cases_do_not_wait_in_memory(trained, tmp_path: Path, monkeypatch):
    _, run = trained
    made, alive = [], []

    def noted(*args, **options):
        panel = case_panel(*args, **options)
        made.append(weakref.ref(panel))
        alive.append(sum(one() is not None for one in made))
        return panel

    monkeypatch.setattr("evaluation.volume_results.case_panel", noted)
    count = 4 * (WAITING + os.cpu_count())
    flags = ["--volume_path", str(many_cases(tmp_path / "data", count)), "--batch_size", "1"]
    assert run_here("--config", str(run), "--output_dir", str(tmp_path / "out"), *flags) == 0
    assert len(made) == count and max(alive) <= WAITING + os.cpu_count()
    pages = list((tmp_path / "out").glob("overlays_*.png"))
    assert len(pages) == -(-count // CASES_A_PAGE) and not (tmp_path / "out" / ROWS).exists()


def test_only_own_files_are_replaced(trained, tmp_path: Path, capfd):
    _, run = trained
    data, out = many_cases(tmp_path / "data", 1), tmp_path / "out"
    flags = ["--config", str(run), "--volume_path", str(data), "--output_dir", str(out)]
    assert run_here(*flags, "--is_savenii") == 0
    (out / "overlays_9.png").write_bytes(b"of the user")
    for name in ("results.csv", "predictions/c0_pred.nii.gz", "slices/c0_000.png", "report.html"):
        kept = (out / name).read_bytes()
        (out / name).write_bytes(b"corrected")
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        capfd.readouterr()
        assert run_here(*flags, "--is_savenii") == 2
        told = capfd.readouterr().err
        assert told.count("\n") == 1 and name in told and "--overwrite" in told
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        (out / name).write_bytes(kept)
    assert run_here(*flags, "--is_savenii") == 0
    (out / "results.csv").write_bytes(b"corrected")
    assert run_here(*flags, "--overwrite") == 0
    assert (out / "results.csv").read_bytes() != b"corrected"
    assert (out / "overlays_9.png").read_bytes() == b"of the user"


def test_a_test_killed_at_any_write_leaves_nothing_mixed(trained, tmp_path: Path, monkeypatch):
    """The second test has other scores; whatever is there belongs to one of both or is refused."""
    _, run = trained
    data, out = many_cases(tmp_path / "data", 1), tmp_path / "out"
    flags = ["--config", str(run), "--volume_path", str(data), "--output_dir", str(out)]
    assert run_here(*flags, "--is_savenii") == 0
    whole = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    scores = json.loads((out / "results.json").read_text())["cases"]
    plain = Path.replace
    for after in range(1, 100):
        left = [after]

        def replace(self: Path, target: Path, left: list[int] = left) -> Path:
            left[0] -= 1
            if left[0] == 0:
                raise SystemExit(9)
            return plain(self, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", replace)
            code = run_here(*flags, "--is_savenii")
        if code == 0:
            break
        assert code == 9 and not (out / "report.html").exists()
        if (out / "results.json").exists():  # complete, only its page is missing
            assert json.loads((out / "results.json").read_text())["cases"] == scores
            assert report_main([str(out)]) is None
    assert after > 8
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == whole
    assert json.loads((out / "results.json").read_text())["cases"] == scores


def test_its_numbers_agree_with_the_written_predictions(tested):
    data, run, _ = tested
    prediction, geometry = read_volume(run / "test" / "predictions" / "case0001_pred.nii.gz")
    image, _ = read_volume(run / "test" / "predictions" / "case0001_img.nii.gz")
    assert prediction.dtype == np.uint8 and geometry.matches(OBLIQUE)
    with h5py.File(data / "test_vol_h5" / "case0001.npy.h5") as file:
        assert np.array_equal(image, file["image"][()])
        scores = score_volume(prediction, file["label"][()], 8, OBLIQUE.voxel_spacing)
    content = json.loads((run / "test" / "results.json").read_text())
    found = list(content["cases"][0]["scores"].values())
    assert found == [vars(score) for score in scores]
    facts = [{k: row[k] for k in ("slices", "spacing", "sides")} for row in content["cases"]]
    assert facts[0] == {"slices": 5, "spacing": [3.0, 0.7, 0.8], "sides": "APRL"}  # rotated by 53°
    assert facts[1] == {"slices": 1, "spacing": None, "sides": None}
    assert content["nsd_tolerance"] == 2 and content["environment"]["tested"].startswith("20")
    assert content["flags"]["img_size"] == 64 and content["environment"]["torch"]
    with (run / "test" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 and rows[0]["name"] == "spleen"
    assert float(rows[3]["samed_dsc"]) == scores[3].samed_dsc
    # The second volume has no geometry, so its distances in mm are unknown.
    assert all(row["hd95_mm"] == "" for row in rows if row["case"] == "case0002")


def test_batches_do_not_change_the_labels(tested, tmp_path: Path):
    data, run, _ = tested
    flags = ["--input_size", "32", "--is_savenii", "--batch_size", "2"]
    flags += ["--output_dir", str(tmp_path)]
    assert run_here("--config", str(run), "--volume_path", str(data), *flags) == 0
    for case in ("case0001", "case0002"):
        name = Path("predictions") / f"{case}_pred.nii.gz"
        assert np.array_equal(read_volume(tmp_path / name)[0], read_volume(run / "test" / name)[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--volume_path", "nowhere"], "nowhere does not exist"),
        (["--rank", "3"], "--rank 2"),
        (["--num_classes", "3"], "label values"),
        (["--vit_name", "vit_b"], "another encoder"),
        (["--img_size", "80"], "--img_size"),
        (["--module", "sam_lora_image_encoder_mask_decoder"], "--module sam_lora_image_encoder"),
        (["--lora_ckpt", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--input_size", "0"], "--input_size is 0"),
        (["--output_dir", "/dev/null/out"], "--output_dir"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(
    flags: list[str], message: str, trained: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
):
    data, run = trained
    assert run_here("--config", str(run), "--volume_path", str(data), *flags) == 2
    told = capfd.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    assert message in told


def test_the_program_exits_with_2_and_one_line(trained: tuple[Path, Path]):
    _, run = trained
    done = run_program("--config", str(run), "--volume_path", "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_faulty_volume_stops_the_run_before_it_starts(
    trained: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    _, run = trained
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "test_vol.txt").write_text("good\nbad\n")
    for name, value in (("good", 0.5), ("bad", -1000.0)):
        with h5py.File(tmp_path / f"{name}.npy.h5", "w") as file:
            file["image"] = np.full((2, 16, 16), value, dtype=np.float32)
            file["label"] = np.zeros((2, 16, 16))
    flags = ["--list_dir", str(tmp_path / "list"), "--output_dir", str(tmp_path / "out")]
    assert run_here("--config", str(run), "--volume_path", str(tmp_path), *flags) == 2
    told = capfd.readouterr().err
    assert "bad.npy.h5" in told and "raw HU" in told
    assert not (tmp_path / "out").exists()


def score(outcome: str, dsc: float | None, hd95: float | None, samed: tuple) -> ClassScore:
    return ClassScore(outcome, *samed, dsc, hd95, None, None)


RESULTS = [
    CaseResult("a", [score(BOTH, 0.8, 4.0, (0.8, 4.0)), score(MISSED, 0.0, None, (0.0, 0.0))]),
    CaseResult("b", [score(BOTH, 0.6, 2.0, (0.6, 2.0)), score(FALSE_ORGAN, 0.0, None, (1.0, 0))]),
    CaseResult("c", [score(BOTH, 1.0, 0.0, (1.0, 0.0)), score(ABSENT, None, None, (0.0, 0.0))]),
]


def test_totals_are_means_over_cases_then_classes(tmp_path: Path):
    first, second = class_means(RESULTS)
    assert (first["dsc"], first["hd95_voxels"]) == pytest.approx((0.8, 2.0))
    assert second["dsc"] == 0 and second["hd95_voxels"] is None
    assert second["samed_dsc"] == pytest.approx(1 / 3)
    total = total_means(RESULTS)
    assert total["dsc"] == pytest.approx(0.4) and total["hd95_voxels"] == pytest.approx(2.0)
    assert total["samed_dsc"] == pytest.approx((0.8 + 1 / 3) / 2)
    assert total["samed_hd95"] == pytest.approx(1.0) and total["hd95_mm"] is None
    table = format_table(RESULTS, ["liver", "spleen"])
    assert "80.00" in table and "56.67" in table
    write_json(tmp_path / "r.json", RESULTS, ["liver", "spleen"], {})
    assert json.loads((tmp_path / "r.json").read_text())["classes"][1]["outcomes"][MISSED] == 1


@pytest.mark.parametrize("shape", [(1, 8, 9), (12, 8, 9)])
def test_panels_of_empty_constant_and_single_slices(shape: tuple[int, int, int]):
    empty = np.zeros(shape, dtype=np.uint8)
    panel = case_panel("a", np.full(shape, 0.5), empty, empty, ["x", "y", "z"])
    assert panel.slices == (shape[0] // 2,) and panel.truth[0].shape == (8, 9, 3)
    assert len(np.unique(panel.truth[0])) == 1


def test_a_case_without_foreground_is_reported(tmp_path: Path):
    empty = np.zeros((2, 8, 8), dtype=np.uint8)
    result = CaseResult("a", score_volume(empty, empty, 2))
    assert total_means([result])["dsc"] is None
    assert "-" in format_table([result], ["liver", "spleen"])
    panel = case_panel("a", empty.astype(np.float32), empty, empty, ["liver", "spleen"])
    save_case(tmp_path, panel, result)
    pages = write_pages(tmp_path, [result] * 7, ["liver", "spleen"])
    names = ["dsc_per_organ.png", "overlays_1.png", "overlays_2.png"]
    assert [page.name for page in pages] == names and all(page.is_file() for page in pages)


def test_panels_show_labels_and_are_upright():
    label = np.zeros((9, 10, 10), dtype=np.uint8)
    label[2:7, 1:4, 1:3] = 1
    assert all(label[index].any() for index in choose_slices(label))
    colours = np.array([[0, 0, 0], [200, 0, 0]], dtype=np.uint8)
    picture = overlay(np.full((10, 10), 0.5), label[3], colours)
    assert (picture[1, 1] == colours[1]).all() and (picture[8, 8] == 128).all()
    turned = Geometry((1.0,) * 3, (0.0,) * 3, (-1, 0, 0, 0, -1, 0, 0, 0, 1))
    turned = case_panel("a", np.full(label.shape, 0.5), label, label, ["x"], geometry=turned)
    assert (turned.truth[0][8, 8] != 128).any() and (turned.truth[0][1, 1] == 128).all()


@needs_real_data
def test_real_ct_from_scan_to_nifti(tmp_path: Path):
    """The README's commands on a real CT, with fewer steps and half the image size."""
    raw = tmp_path / "raw" / "Training"
    for kind, suffix in (("img", ""), ("label", "_label")):
        (raw / kind).mkdir(parents=True)
        source = REAL_DATA / "ct" / f"abdomen_full{suffix}.nii.gz"
        (raw / kind / f"{kind}0001.nii.gz").symlink_to(source)
    data = tmp_path / "data"
    split = ["--train_cases", "1", "--test_cases", "1", "--label_values", "classes"]
    prepare(["--input", str(tmp_path / "raw"), "--output", str(data), *split])
    flags = ["--vit_name", "vit_tiny", "--ckpt", "none", "--img_size", "112", "--batch_size", "8"]
    flags += ["--n_gpu", "1", "--base_lr", "3e-4", "--clip_grad", "0.5", "--warmup", "--AdamW"]
    flags += ["--warmup_period", "20", "--no_augment", "--max_epochs", "12", "--stop_epoch", "12"]
    train.main(["--root_path", str(data), "--output", str(tmp_path / "out"), *flags])
    run = next((tmp_path / "out").iterdir())
    assert run_here("--config", str(run), "--volume_path", str(data), "--is_savenii") == 0
    content = json.loads((run / "test" / "results.json").read_text())
    # After 168 steps the DSC is about 0.64. The whole run in the README reaches 0.87.
    assert content["total"]["dsc"] > 0.5
    liver = next(row for row in content["classes"] if row["name"] == "liver")
    assert liver["mean"]["dsc"] > 0.7 and liver["mean"]["hd95_mm"] is not None
    _, geometry = read_volume(run / "test" / "predictions" / "case0001_pred.nii.gz")
    _, original = read_volume(REAL_DATA / "ct" / "abdomen_full.nii.gz")
    assert geometry == original
