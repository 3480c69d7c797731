"""Families of phantoms: the default stays as it was, and a family changes what its name says."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from datasets.registry import SYNAPSE
from preprocess.phantom import PHANTOM, main, with_classes
from preprocess.phantom_families import ABSENT_SHARE, LABELLED, PHASES, SCANNERS, Family
from preprocess.phantom_volume import Phantom, make_phantom

SEED = (3, 25)
# SHA-256 of image and label, from the version before there were families.
BEFORE = {
    (0, 1): ("ce97a5c3078997e6", "0dfee9460a32e3a2"),
    (7, 40): ("49dd121ad74187a2", "2de546ad90910e59"),
}


def small(seed: tuple[int, int] = SEED, **family: object) -> Phantom:
    return make_phantom(seed, size=48, slices=12, family=Family(**family))


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def mean_of(phantom: Phantom, organ: str) -> float:
    return float(phantom.image[phantom.label == LABELLED[organ]].mean())


@pytest.mark.parametrize("seed", BEFORE)
def test_the_default_family_is_as_before_bit_by_bit(seed: tuple[int, int]):
    phantom = make_phantom(seed, size=48, slices=12)
    assert (digest(phantom.image), digest(phantom.label)) == BEFORE[seed]
    assert np.array_equal(small(seed).image, phantom.image)


def test_a_phase_changes_intensities_and_no_anatomy():
    portal, arterial, unenhanced = (small(phase=phase) for phase in PHASES)
    assert np.array_equal(portal.label, arterial.label)
    assert np.array_equal(portal.label, unenhanced.label)
    for organ in ("liver", "spleen", "aorta", "right kidney", "pancreas"):
        change = mean_of(arterial, organ) - mean_of(portal, organ)
        # The case's own deviation is the same in both phases, so the difference is the tables'.
        expected = {"liver": -38, "spleen": 16, "aorta": 125, "pancreas": 20}.get(organ)
        assert expected is None or abs(change - expected) < 0.3 * abs(expected), organ
        assert mean_of(unenhanced, organ) < 85 < mean_of(portal, organ), organ
    # In the arterial phase the liver is darker than the spleen; the kidney's cortex is bright.
    assert mean_of(arterial, "spleen") - mean_of(arterial, "liver") > 30
    kidney = arterial.image[arterial.label == LABELLED["right kidney"]]
    assert np.percentile(kidney, 90) - np.percentile(kidney, 10) > 60


def test_a_scanner_changes_level_and_grain_of_the_noise():
    level, grain = {}, {}
    for name in SCANNERS:
        phantom = make_phantom(SEED, size=96, slices=6, family=Family(scanner=name))
        # The liver is all of one tissue but for its vessels.
        noise = np.where(phantom.label == LABELLED["liver"], phantom.image, np.nan)  # (D, H, W)
        one, next_one = noise[:, :, :-1], noise[:, :, 1:]
        both = ~np.isnan(one) & ~np.isnan(next_one)
        level[name] = np.nanstd(noise)
        grain[name] = np.corrcoef(one[both], next_one[both])[0, 1]  # of neighbours in a row
    assert level["standard"] < level["sharp"] and 1.3 * level["standard"] < level["low_dose"]
    assert grain["sharp"] < grain["standard"] < grain["low_dose"]


def test_a_missing_organ_leaves_half_of_the_cases_and_changes_nothing_else():
    missing = ("left kidney", "gallbladder")
    family = Family(missing=missing)
    drawn = [family.absent((5, number)) for number in range(400)]
    for organ in missing:
        share = np.mean([organ in absent for absent in drawn])
        assert abs(share - ABSENT_SHARE) < 0.1
    assert any(set(missing) <= absent for absent in drawn) and set() in drawn
    # The sinus goes with its kidney. Another organ in the list changes no draw.
    assert all(("left kidney's sinus" in absent) == ("left kidney" in absent) for absent in drawn)
    alone = Family(missing=("gallbladder",))
    for number, absent in enumerate(drawn[:50]):
        assert alone.absent((5, number)) == absent & {"gallbladder"}

    number = next(n for n, a in enumerate(drawn) if "left kidney" in a and "gallbladder" not in a)
    whole, lacking = small((5, number)), small((5, number), missing=missing)
    kidney = LABELLED["left kidney"]
    assert (whole.label == kidney).any() and not (lacking.label == kidney).any()
    others = whole.label != kidney
    assert np.array_equal(whole.label[others], lacking.label[others])
    far = np.abs(whole.image.astype(int) - lacking.image) == 0
    assert far.mean() > 0.9  # only the kidney, its fat and the blurred edge differ


def test_classes_are_described_in_their_order():
    assert with_classes(SYNAPSE.class_names) == PHANTOM
    spec = with_classes(("cava", "liver"))
    assert (spec.name, spec.class_names, spec.num_classes) == ("Phantom", ("cava", "liver"), 2)
    assert spec.raw_labels == {9: 1, 6: 2} and spec.predicted_values == (1, 2)
    assert {*spec.raw_labels, *spec.ignored_labels} == set(range(1, 14))


def test_the_command_makes_a_family_that_can_be_prepared(tmp_path: Path):
    from preprocess.prepare import main as prepare

    sizes = ["--cases", "3", "--size", "48", "--slices", "6", "--workers", "1"]
    family = ["--phase", "arterial", "--scanner", "sharp", "--missing", "spleen"]
    raw, data = tmp_path / "raw", tmp_path / "data"
    main(["--output", str(raw), *sizes, *family, "--classes", "aorta", "spleen"])
    flags = ["--workers", "1", "--test_share", "0.3"]
    prepare(["--input", str(raw), "--output", str(data), *flags])
    made = np.load(next(data.glob("train_npz/*slice002.npz")), allow_pickle=False)
    assert set(np.unique(made["label"])) <= {0, 1, 2} and 1 in made["label"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--phase", "late"], "invalid choice: 'late'"),
        (["--scanner", "pet"], "invalid choice: 'pet'"),
        (["--missing", "heart"], "invalid choice: 'heart'"),
        (["--classes", "liver", "aorta", "liver"], "--classes names an organ twice"),
    ],
)
def test_wrong_families_are_refused(flags: list[str], told: str, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--output", str(tmp_path / "out"), *flags])
    assert caught.value.code == 2 and not (tmp_path / "out").exists()
    assert told in capsys.readouterr().err
