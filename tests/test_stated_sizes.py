"""From prepare to the scores: distances in mm only where a scan states its size; CT as MR."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from test_own_data import NNUNET, run_prepare, write_set

from datasets.dataset_synapse import Synapse_dataset
from datasets.registry import SYNAPSE
from evaluation.volume_results import read_case, score_case

NRRD = "NRRD0004\ntype: {}\ndimension: 3\nsizes: 24 24 3\n{}encoding: raw\nendian: little\n\n"
VOXELS = np.random.default_rng(0).integers(-900, 900, (3, 24, 24)).astype("<i2")
LABEL = np.zeros((3, 24, 24), np.uint8)
LABEL[:, 6:14, 6:14] = 1


def write_nrrd(root: Path, size: str) -> Path:
    """Write two scans with labels whose headers state this size."""
    for kind, type_name, array in (("images", "short", VOXELS), ("labels", "uchar", LABEL)):
        (root / kind).mkdir(parents=True)
        for case in "ab":
            head = NRRD.format(type_name, size).encode()
            (root / kind / f"{case}.nrrd").write_bytes(head + array.tobytes())
    return root


def score(data: Path):
    """Score the truth, moved by two columns, of the only test volume."""
    case = read_case(Synapse_dataset(data, None, "test_vol", num_classes=1), 0)
    args = Namespace(num_classes=1, nsd_tolerance=2.0, spec=SYNAPSE.of_plain_classes(1).to_json())
    return score_case(case, np.roll(case.label, 2, axis=2), args, data, None)


@pytest.mark.parametrize(("size", "known"), [("", False), ("spacings: 2 2 5\n", True)])
def test_no_distance_in_mm_without_a_stated_size(size: str, known: bool, tmp_path: Path, capfd):
    data = tmp_path / "data"
    assert run_prepare(write_nrrd(tmp_path / "raw", size), data, "--test_cases", "b") == 0
    assert ("gives no distances in mm" in capfd.readouterr().err) != known
    result = score(data)
    (organ,) = result.scores
    assert organ.hd95_voxels == 2 and organ.hd95_mm == (4.0 if known else None)
    assert (result.spacing, organ.nsd is None) == (
        ((5.0, 2.0, 2.0), False) if known else (None, True)
    )


def test_one_slice_needs_no_thickness_for_distances(tmp_path: Path, capfd):
    for kind, array in (("images", VOXELS[0]), ("labels", LABEL[0])):
        (tmp_path / "raw" / kind).mkdir(parents=True)
        for case in "ab":
            image = nibabel.Nifti1Image(array.T, np.diag([0.5, 0.8, 1, 1]))
            nibabel.save(image, tmp_path / "raw" / kind / f"{case}.nii.gz")
    assert run_prepare(tmp_path / "raw", tmp_path / "data", "--test_cases", "b") == 0
    assert "in mm" not in capfd.readouterr().err
    (organ,) = score(tmp_path / "data").scores
    assert organ.hd95_mm == pytest.approx(1.0)  # two columns of 0.5 mm


@pytest.mark.parametrize(("channel", "as_mr"), [("CTA", False), ("NCCT", False), ("scan", True)])
def test_ct_is_recognised_or_asked_about(channel: str, as_mr: bool, tmp_path: Path, capfd):
    told = NNUNET | {"channel_names": {"0": channel}}
    assert run_prepare(write_set(tmp_path / "raw", told), tmp_path / "data") == 0
    assert ("scaled as MR" in capfd.readouterr().err) == as_mr
