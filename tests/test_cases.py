"""Which files form a case: names, `--group`, and slices that leak into the test."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import write_slices
from PIL import Image
from test_datasets import write_volume_h5
from test_own_data import run_prepare as prepare
from test_scans import placed

from common.files import load_arrays
from datasets.dataset_synapse import Synapse_dataset
from datasets.digests import slice_digests
from datasets.names import group_names
from datasets.scans.volumes import write_volume
from evaluation.groups import with_groups
from evaluation.tables import CaseResult
from training.data_check import check_page
from training.validation import hold_out

SCANS = 6


def write_pictures(root: Path, names: list[str]) -> Path:
    """Write a different picture for each name, with a mask of one class."""
    for index, name in enumerate(names):
        picture = np.random.default_rng(index).integers(0, 256, (8, 9), np.uint8)
        for kind, array in (("images", picture), ("labels", (picture > 99).astype(np.uint8))):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / kind / f"{name}.png")
    return root


def sides(output: Path) -> tuple[set[str], set[str]]:
    """Return the source files of the training cases and of the test cases."""
    cases = json.loads((output / "preprocess.json").read_text("utf-8"))["cases"]
    return tuple(
        {Path(case["sources"][0]).stem for case in cases if role in case["roles"]}
        for role in ("train", "test")
    )


PATTERNS = {  # how the slice {s} of scan {c} is named -> what scan 2 is called
    "case{c:04d}_slice{s:03d}": "case0002",
    "scan{c}_slice_{s}": "scan2",
    "P{c}-Slice{s}": "P2",
    "P{c}slice{s}": "P2",
    "patient{c:03d}_frame01_slice_{s}": "patient002_frame01",
    "P{c}_slice{s:02d}_ct": "P2",
    "img_{c:04d}_{s:04d}": "img_0002",
    "P{c}-s{s}": "P2",
    "P{c}_z{s:03d}": "P2",
    "P{c}.{s}": "P2",
    "P{c} ({s})": "P2",
    "IM-{c:04d}-{s:04d}": "IM-0002",
    "v{c}_frame{s}": "v2",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_slices_of_a_scan_are_on_one_side_of_every_split(tmp_path: Path, pattern: str):
    names = [pattern.format(c=c, s=s) for c in range(SCANS) for s in (1, 2, 3)]
    scan_of = {name: index // 3 for index, name in enumerate(names)}  # as the names were made
    root, output = write_pictures(tmp_path / "raw", names), tmp_path / "data"
    assert prepare(root, output) == 0
    train, test = sides(output)
    assert train | test == set(names) and not train & test
    tested = {scan_of[name] for name in test}
    assert len(tested) == round(0.2 * SCANS) and not tested & {scan_of[name] for name in train}

    dataset = Synapse_dataset(output, None, "train", num_classes=1)
    number = {digest: scan_of[name] for name, digest in pixels(root, names).items()}
    left, held_out = hold_out(dataset, 2, seed=3)

    def scans(part: Synapse_dataset) -> set[int]:
        read = [load_arrays(path, ("image",))["image"] for path in part.paths]
        return {number[(image * 255).round().astype(np.uint8).tobytes()] for image in read}

    held = [scans(part) for part in held_out.values()]
    assert [len(found) for found in held] == [1, 1]
    assert not scans(left) & set.union(*held)

    again = tmp_path / "named"
    assert prepare(root, again, "--test_cases", PATTERNS[pattern]) == 0
    assert {scan_of[name] for name in sides(again)[1]} == {2}
    results = [
        CaseResult(case, [], slices=1)
        for case in (again / "lists" / "test_vol.txt").read_text("utf-8").splitlines()
    ]
    groups = {result.group for result in with_groups(results, again / "test_vol_h5")}
    assert len(results) == 3 and len(groups) == 1


def pixels(root: Path, names: list[str]) -> dict[str, bytes]:
    return {n: np.asarray(Image.open(root / "images" / f"{n}.png")).tobytes() for n in names}


CLASSES = ("benign", "malignant", "normal")


@pytest.mark.parametrize("pattern", ["{word}_{n}", "{word}-{n}", "{word} ({n})", "{word}_{n:03d}"])
def test_words_are_classes_and_not_scans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pattern: str
):
    names = [pattern.format(word=word, n=n) for word in CLASSES for n in range(1, 11)]
    root, output = write_pictures(tmp_path / "raw", names), tmp_path / "data"
    assert prepare(root, output) == 0
    told = capsys.readouterr()
    assert "benign (10), malignant (10), normal (10) have no number" in told.err
    assert "--group" in told.err and "each of 30 pictures is a case" in told.out
    train, test = sides(output)
    assert len(test) == 6  # a fifth
    assert all(any(name.startswith(word) for name in train) for word in CLASSES)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([f"img{n}" for n in range(9)], ""),
        ([f"img_{n:04d}" for n in range(9)], ""),
        ([f"covid-{n}" for n in range(9)], ""),
        ([f"ISIC_{n:07d}" for n in range(9)], ""),
        ([f"frame_{n:06d}" for n in range(9)], "names like frame_000000 name no scan"),
        ([f"slice_{n}" for n in range(9)], "names like slice_0 name no scan"),
        ([f"video1_frame{n}" for n in range(9)], "all begin with video1 and count as separate"),
    ],
)
def test_counted_pictures_are_cases(names: list[str], told: str):
    found = group_names(names, slices=True)
    assert found.groups == {name: name for name in names} and not found.slices
    assert told in " ".join(found.doubts) and bool(told) == bool(found.doubts)


@pytest.mark.parametrize(
    "pattern",
    ["P{p}_{s}_CC", "{p:04d}_{s}", "case{p}_T{s}", "sub-{p:02d}_ses-{s}", "A{p}S9V9_sa_{s}"],
)
@pytest.mark.parametrize("slices", [True, False])
def test_pictures_and_scans_of_a_patient_stay_together(pattern: str, slices: bool):
    names = {pattern.format(p=p, s=s): p for p in range(5) for s in ("left", "right")}
    found = group_names(list(names), slices=slices).groups
    assert len(set(found.values())) == 5
    assert all(
        len({found[n] for n, p in names.items() if p == patient}) == 1 for patient in range(5)
    )


def test_the_number_of_the_slice_may_come_first():
    names = {f"slice{n:03d}_patient{p}": f"patient{p}" for p in range(4) for n in range(3)}
    assert group_names(list(names), slices=True).groups == names


def test_few_groups_are_doubted():
    names = [f"covid19_{n}" for n in range(5)] + [f"ncov2_{n}" for n in range(3)]
    found = group_names(names, slices=True)
    assert set(found.groups.values()) == {"covid19", "ncov2"}
    assert "only 2 scan(s) were found" in found.doubts[0] and "covid19 (5)" in found.doubts[0]
    sites = [f"site{s}_{n:02d}" for s in (1, 2) for n in range(5)]  # whole scans
    found = group_names(sites, slices=False)
    assert found.groups == {name: name for name in sites}
    assert "may be scans of the same patients" in found.doubts[0]


def test_group_takes_a_pattern_or_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names = [f"{view}_{p}{s}" for p in "kmnqz" for s in (1, 2) for view in ("ap", "pa")]
    root = write_pictures(tmp_path / "raw", names)
    table = tmp_path / "groups.csv"
    rows = [f"{name}.png,patient {name[3]}" for name in names]
    table.write_text("\n".join(["file,group", *rows]), encoding="utf-8")
    for index, rule in enumerate((r"_([a-z])\d", str(table))):
        output = tmp_path / f"{index}"
        assert prepare(root, output, "--group", rule) == 0
        train, test = ({name[3] for name in side} for side in sides(output))
        assert len(test) == 1 and len(train) == 4 and not train & test
        assert "20 pictures of 5 scans were found" in capsys.readouterr().out
        summary = json.loads((output / "preprocess.json").read_text("utf-8"))
        assert summary["groups"] == 5 and summary["flags"]["group"] == rule
        _, held_out = hold_out(Synapse_dataset(output, None, "train"), 1, seed=0)
        (part,) = held_out.values()
        assert len(part) == 4 and len({name[3] for name in part.sample_list}) == 1

    for rule, told in (
        ("(", "not a regular expression"),
        ("patient", "0 parts in parentheses"),
        ("(a)(p)", "2 parts in parentheses"),
        ("ap_([a-z])", "finds no scan in 10 of 20 names, e.g. pa_k1"),
        (str(tmp_path / "none.csv"), "does not exist"),
    ):
        assert prepare(root, tmp_path / "bad", "--group", rule) == 2
        assert told in capsys.readouterr().err
    table.write_text("\n".join(["name,group", *rows]), encoding="utf-8")
    assert prepare(root, tmp_path / "bad", "--group", str(table)) == 2
    assert "has the columns name, group, expected file and group" in capsys.readouterr().err
    table.write_text("\n".join(["file,group", *rows[:-2], "x.png,y"]), encoding="utf-8")
    assert prepare(root, tmp_path / "bad", "--group", str(table)) == 2
    assert "gives no group for 2 of 20 files, e.g. ap_z2, pa_z2" in capsys.readouterr().err
    table.write_text("\n".join(["file,group", *rows, "ap_k1.png,patient q"]), encoding="utf-8")
    assert prepare(root, tmp_path / "bad", "--group", str(table)) == 2
    assert "gives ap_k1.png the groups patient k and patient q" in capsys.readouterr().err
    table.write_text("\n".join(["File; Group", *rows]).replace(",", ";"), encoding="utf-8")
    assert prepare(root, tmp_path / "semicolons", "--group", str(table)) == 0
    assert sides(tmp_path / "semicolons") == sides(tmp_path / "1")


def test_a_split_that_cuts_a_scan_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names = [f"P{c}_slice{s}" for c in range(4) for s in range(3)]
    root = write_pictures(tmp_path / "raw", names)
    assert prepare(root, tmp_path / "data", "--test_cases", "P1_slice0") == 0
    assert "some of their cases in training and some in the test: P1" in capsys.readouterr().err
    # The other slices of a scan that trains are never drawn for the test.
    flags = ("--train_cases", *(f"P{c}_slice0" for c in range(2)))
    assert prepare(root, tmp_path / "drawn", *flags) == 0
    drawn = sides(tmp_path / "drawn")[1]
    assert len(drawn) == 3 and {name[:2] for name in drawn} in ({"P2"}, {"P3"})
    one = write_pictures(tmp_path / "one", [f"P1_slice{s}" for s in range(5)])
    assert prepare(one, tmp_path / "none") == 2
    assert "cannot split 1 group (P1, 5 cases)" in capsys.readouterr().err


def write_scans(root: Path, images: dict[str, np.ndarray]) -> Path:
    for name, image in images.items():
        write_volume(root / "images" / f"{name}.nii.gz", image, placed("RAS"))
        label = (np.indices(image.shape).sum(0) % 2).astype(np.uint8)
        write_volume(root / "labels" / f"{name}.nii.gz", label, placed("RAS"))
    return root


def test_slices_under_another_name_are_found_in_the_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 900, (2, 5, 8, 9)).astype(np.int16)
    first[0] = second[0] = 0  # empty slices are equal by nature
    copy = second.copy().astype(np.float32)
    copy[3:] = first[3:]  # two slices of another scan, stored in another type
    root = write_scans(tmp_path / "raw", {"anna": first, "bert": second})
    flags = ("--test_cases", "bert")
    assert prepare(root, tmp_path / "clean", *flags) == 0
    assert "trained on" not in capsys.readouterr().err
    write_scans(root, {"bert": copy})
    for _ in range(2):  # the second time from the records
        assert prepare(root, tmp_path / "data", *flags) == 0
        told = capsys.readouterr().err
        assert "under other names: bert (test) has 2 slice(s) of anna (training)" in told
    summary = json.loads((tmp_path / "data" / "preprocess.json").read_text("utf-8"))
    assert len(summary["leaks"]) == 1
    # An overfit check that the user asked for is not reported again.
    assert prepare(root, tmp_path / "over", "--train_cases", "anna", "--test_cases", "anna") == 0
    told = capsys.readouterr().err
    assert "overfit check" in told and "under other names" not in told


def test_a_record_of_an_earlier_version_is_made_again(tmp_path: Path):
    image = np.random.default_rng(0).integers(0, 900, (5, 8, 9)).astype(np.int16)
    root = write_scans(tmp_path / "raw", {"anna": image, "bert": image[::-1].copy()})
    output, flags = tmp_path / "data", ("--test_cases", "bert")
    assert prepare(root, output, *flags) == 0
    before = {}
    for path in (output / ".done").glob("*.json"):
        record = json.loads(path.read_text("utf-8"))
        before[path] = record["result"].pop("digests")
        path.write_text(json.dumps(record), encoding="utf-8")
    assert prepare(root, output, *flags) == 0
    for path, digests in before.items():
        assert json.loads(path.read_text("utf-8"))["result"]["digests"] == digests
    assert len(json.loads((output / "preprocess.json").read_text("utf-8"))["leaks"]) == 1


def test_digests_are_those_of_the_pixels():
    image = np.random.default_rng(0).integers(0, 99, (3, 4, 5)).astype(np.int16)
    image[1] = 7
    found = slice_digests(image)
    assert found == slice_digests(image.astype(np.float64)) and found[1] == ""
    content = image[2].astype("<f4").tobytes() + b"(4, 5)"
    assert found[2] == hashlib.blake2b(content, digest_size=16).hexdigest() != found[0]
    assert slice_digests(image[:, ::-1])[2] != found[2]


def test_the_check_before_training_finds_the_same_leaks(tmp_path: Path):
    data = write_slices(tmp_path, count=3, cases=2)
    train = Synapse_dataset(data, None, "train", num_classes=8)
    sample = train.read(0)
    other = np.random.default_rng(5).random((2, 40, 40), dtype=np.float32)
    image = np.stack([other[0], sample["image"], np.zeros_like(other[0])])
    for name in ("other", "case0005"):
        with h5py.File(write_volume_h5(data, name), "w") as file:
            file["image"], file["label"] = image, np.stack([sample["label"]] * 3)
    (data / "lists" / "test_vol.txt").write_text("other\ncase0005\n")
    facts = train.check(), Synapse_dataset(data, None, "test_vol", num_classes=8).check()
    page = check_page(*facts, [f"class {i}" for i in range(1, 9)], {"": 1.0}, folder=data)
    told = " ".join(page.warnings)
    assert "1 case(s) are trained on and tested: case0005" in told
    assert "other (test) has 1 slice(s) of case0005 (training)" in told


@pytest.mark.parametrize(
    ("names", "slices", "told"),
    [
        ([f"{kind}_{i}" for kind in "akiec bcc bkl df mel nv vasc scc".split() for i in range(9)],
         True, "may be classes"),
        ([f"s{site}_{i:03}" for site in range(1, 5) for i in range(4)], False, "sites or classes"),
        ([f"{10000 + scan}_{i}" for scan in range(9) for i in range(9)], True, None),
        ([f"P{patient}_{side}" for patient in range(20) for side in "LR"], False, None),
    ],
)  # fmt: skip
def test_groups_that_may_be_classes_or_sites_are_doubted(names: list[str], slices: bool, told):
    doubts = " ".join(group_names(names, slices=slices).doubts)
    assert told in doubts if told else not doubts
