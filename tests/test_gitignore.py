"""`git add .` takes no scan, no segmentation and no weights, but every file of the project."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATIENTS = """
scan.nii scan.nii.gz SCAN.NII.GZ scan.nrrd scan.nhdr scan.mha scan.mhd scan.dcm scan.DCM
hospital/patient7/IM0001 hospital/patient7/IM_0001 hospital/patient7/DICOMDIR
hospital/1.2.840.113619.2.55.3 hospital/CT.1.2.840.7.dcm scan.hdr scan.img scan.ima
mine/train_npz/case1_slice000.npz mine/test_vol_h5/case1.npy.h5 ACDC/patient001.h5 scan.npy
photo.png photo.JPG scan.tif scan.TIFF polyps/1.bmp
output/run/config.json runs/x/log.txt data/lists/train.txt segmentations/volumes.csv
mine/volumes.csv mine/predictions.json mine/.done/scan.json mine/overlays/scan.png
mine/.written.jsonl mine/report.html comparison.html mine/viewer.html
corrected/images/abdomen/slice0 corrected/dataset_spec.json seg_2/labels.txt
best.pth checkpoints/sam_vit_b_01ec64.pth adapter.safetensors
""".split()


def git(*arguments: str, text: str | None = None) -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("the project is not in a git repository")
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def test_nothing_of_a_patient_is_added():
    ignored = git("check-ignore", "--no-index", "--stdin", text="\n".join(PATIENTS))
    assert sorted(set(PATIENTS) - set(ignored)) == []


def test_no_file_of_the_project_is_ignored():
    assert git("ls-files", "--ignored", "--cached", "--exclude-standard") == []
    new = [
        "evaluation/new.py",
        "tests/test_new.py",
        "docs/new.md",
        "docs/new.png",
        "recipes/x.json",
    ]
    fixtures = ["tests/golden/new.npz", "tests/files_of_1_0/new/adapter.safetensors.xz"]
    assert git("check-ignore", "--no-index", *new, *fixtures) == []
