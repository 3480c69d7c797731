"""Properties of the phantoms: repeatable, complete, the right way round."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.writing import partial_name
from datasets.registry import SYNAPSE
from datasets.scans.volumes import read_volume
from preprocess.flags import build_parser
from preprocess.jobs import Job
from preprocess.phantom import main
from preprocess.phantom_volume import make_phantom
from preprocess.prepare import plan_jobs

pytestmark = pytest.mark.slow

# Raw label -> smallest and largest volume in ml: generous limits for an adult.
VOLUMES = {
    1: (60, 400),
    2: (60, 350),
    3: (60, 400),
    4: (15, 120),
    6: (600, 2200),
    7: (150, 800),
    8: (35, 180),
    11: (35, 260),
}


@pytest.fixture(scope="module")
def phantoms() -> list:
    return [make_phantom((0, number)) for number in range(1, 9)]


def test_a_seed_makes_the_same_case_again(phantoms: list):
    again = make_phantom((0, 1))
    assert np.array_equal(again.image, phantoms[0].image)
    assert np.array_equal(again.label, phantoms[0].label)
    assert (again.label != phantoms[1].label).mean() > 0.05


def test_every_scored_organ_is_there_at_its_size(phantoms: list):
    assert VOLUMES.keys() == SYNAPSE.raw_labels.keys()
    for phantom in phantoms:
        millilitres = np.prod(phantom.spacing) / 1000
        assert set(np.unique(phantom.label)) <= {0, *SYNAPSE.raw_labels, *SYNAPSE.ignored_labels}
        for value, (low, high) in VOLUMES.items():
            assert low <= (phantom.label == value).sum() * millilitres <= high, value


def test_organs_lie_on_their_side(phantoms: list):
    for phantom in phantoms:
        column = {v: np.argwhere(phantom.label == v)[:, 2].mean() for v in VOLUMES}
        spine = column[8]  # the aorta lies in front of it
        # The liver is on the patient's right, which is the left of the picture.
        assert column[6] < spine < column[1]
        assert column[2] < spine < column[3]
        assert column[4] < spine < column[7]


def test_intensities_are_those_of_ct(phantoms: list):
    for phantom in phantoms:
        assert phantom.image.dtype == np.int16 and phantom.image[:, 0].mean() < -900  # air
        mean = {v: phantom.image[phantom.label == v].mean() for v in VOLUMES}
        assert 60 < mean[6] < 160 and 80 < mean[1] < 170 and -15 < mean[4] < 60
        assert mean[8] > mean[11]  # contrast in the aorta
        # Intensity alone does not separate liver and spleen: they differ by less than their noise.
        assert abs(mean[6] - mean[1]) < 3 * phantom.image[phantom.label == 1].std()


def test_the_command_writes_the_layout_of_btcv(tmp_path: Path):
    main(["--output", str(tmp_path), "--cases", "2", "--size", "48", "--slices", "6"])
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.nii.gz"))
    assert names == [
        "Training/img/img0001.nii.gz",
        "Training/img/img0002.nii.gz",
        "Training/label/label0001.nii.gz",
        "Training/label/label0002.nii.gz",
    ]
    image, geometry = read_volume(tmp_path / names[0])
    label, label_geometry = read_volume(tmp_path / names[2])
    assert image.shape == label.shape == (6, 48, 48) and geometry.matches(label_geometry)
    assert geometry.spacing == pytest.approx((380 / 48, 380 / 48, 5.0))
    assert image.dtype == np.int16 and label.dtype == np.uint8


def test_phantoms_are_called_phantom_and_have_no_published_split(tmp_path: Path):
    main(["--output", str(tmp_path), "--cases", "5", "--size", "48", "--slices", "6"])
    # Either folder may be given, as with the real data.
    for folder in (tmp_path, tmp_path / "Training"):
        jobs = planned(folder)
        spec = jobs[0].spec
        assert (spec.name, spec.train_cases, spec.test_cases) == ("Phantom", (), ())
        assert (spec.class_names, spec.raw_labels) == (SYNAPSE.class_names, SYNAPSE.raw_labels)
        assert sum("test" in job.roles for job in jobs) == 1  # a random share
    assert planned(tmp_path, "--dataset", "Synapse")[0].spec.name == "Synapse"
    (tmp_path / "Training" / "dataset_spec.json").unlink()
    assert planned(tmp_path)[0].spec == replace(SYNAPSE, size=None)


def planned(folder: Path, *flags: str) -> list[Job]:
    """Return the cases that preprocessing would prepare."""
    args = build_parser().parse_args(["--input", str(folder), "--output", "unused", *flags])
    return plan_jobs(args)


@pytest.mark.parametrize("flags", [["--cases", "31"], ["--cases", "0"], ["--size", "8"]])
def test_bad_flags_are_refused(flags: list[str], tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--output", str(tmp_path / "out"), *flags])
    assert caught.value.code == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.startswith("error: ")


def test_organs_without_a_score_are_there_too(phantoms: list):
    smallest = {5: 4, 9: 30, 10: 5, 12: 0.5, 13: 0.5}  # raw label -> smallest volume in ml
    for phantom in phantoms:
        millilitres = np.prod(phantom.spacing) / 1000
        for value, low in smallest.items():
            assert (phantom.label == value).sum() * millilitres >= low, value


def test_real_scans_of_the_same_names_are_kept(tmp_path: Path, capsys):
    flags = ["--output", str(tmp_path), "--cases", "1", "--size", "32", "--slices", "1"]
    real = tmp_path / "Training" / "img" / "img0001.nii.gz"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"a real scan")
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2 and "img0001.nii.gz, which are no" in capsys.readouterr().err
    assert real.read_bytes() == b"a real scan"
    assert not (tmp_path / "Training" / "dataset_spec.json").exists()


def test_phantoms_are_made_again_and_what_a_killed_process_left_goes(tmp_path: Path):
    flags = ["--output", str(tmp_path), "--cases", "1", "--size", "32", "--slices", "1"]
    main(flags)
    left = partial_name(tmp_path / "Training" / "img" / "img0001.nii.gz")
    left = left.with_name(left.name.replace(str(os.getpid()), "4194305"))  # no such process
    left.touch()
    main(flags)
    assert not left.exists()
