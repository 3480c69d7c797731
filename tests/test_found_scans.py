"""Scans with unusual names, places or permissions: none is overlooked or ends the program."""

from __future__ import annotations

import io
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import processes
import pytest
import SimpleITK as sitk
from test_scans import placed, volume, write_dicom

from common.errors import InputError
from datasets.scans.files import DICOM, ScanFile, find_scans, read_scan, read_scan_header
from datasets.scans.stamps import digest, stamp
from datasets.scans.volumes import read_volume, write_volume


def test_names_that_are_not_utf_8(tmp_path: Path):
    """SimpleITK would end the whole process at such a name."""
    write_volume(tmp_path / "a.nii.gz", volume(), placed("LPS"))
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller.nii.gz"))
    (tmp_path / "a.nii.gz").rename(odd)
    below = write_dicom(tmp_path / "series", volume(), placed("LPS"))
    for attempt in (
        lambda: find_scans(tmp_path),
        lambda: read_volume(odd),
        lambda: write_volume(odd.with_suffix(".mha"), volume(), placed("LPS")),
        lambda: find_scans(below.rename(odd.with_suffix(".d")))[0],
        lambda: read_scan(ScanFile("series", odd.with_suffix(".d"), DICOM)),
    ):
        with pytest.raises(InputError, match=r"M\\xfcller.* is not in UTF-8"):
            attempt()


@pytest.mark.parametrize("index", [0, 2, 4])
def test_a_slice_that_is_cut_short_is_not_skipped(tmp_path: Path, index: int):
    folder = write_dicom(tmp_path / "series", volume(), placed("LPS"))
    file = sorted(folder.iterdir())[index]
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(InputError, match=f"cannot be read as slices: {file.name};"):
        read_scan(find_scans(folder)[0])


def test_series_below_a_series_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    top = write_dicom(tmp_path / "series", volume(), placed("LPS"))
    write_dicom(top / "old" / "b", volume(), placed("LPS"))
    assert [scan.name for scan in find_scans(top)] == ["series"]
    assert "1 below the folder of a DICOM series (old/)" in capsys.readouterr().err


def test_files_in_folders_below_are_not_searched(tmp_path: Path):
    write_volume(tmp_path / "p1" / "scan.nii.gz", volume(), placed("LPS"))
    with pytest.raises(InputError, match="in subfolders only DICOM is looked for"):
        find_scans(tmp_path)


def find_without_rights(folder: str, answer: Connection) -> None:
    """Find scans and read their headers as a user without the rights of root."""
    processes.bound_by_permissions()
    sys.stderr = io.StringIO()
    try:
        for scan in find_scans(folder):
            read_scan_header(scan)
            answer.send(scan.name)
    except Exception as error:
        answer.send(error)
    answer.send(sys.stderr.getvalue())
    answer.send(None)


@pytest.mark.slow
def test_files_without_read_permission(tmp_path: Path):
    def found(folder: Path) -> list[Any]:
        ours, theirs = processes.CONTEXT.Pipe()
        child = processes.CONTEXT.Process(target=find_without_rights, args=(str(folder), theirs))
        child.start()
        theirs.close()  # If the child dies, reading ends instead of waiting.
        told = list(iter(ours.recv, None))
        child.join()
        return told

    write_volume(tmp_path / "a.nii.gz", volume(), placed("LPS"))
    write_dicom(tmp_path / "b" / "series", volume(), placed("LPS"))
    (tmp_path / "lost+found").mkdir(mode=0)
    name, series, told = found(tmp_path)
    assert (name, series) == ("a", "b_series")
    assert "1 cannot be read (Permission denied) (lost+found/)" in told
    for path, folder in (
        (tmp_path / "b" / "series" / "000.dcm", tmp_path / "b"),
        (tmp_path / "a.nii.gz", tmp_path / "a.nii.gz"),
        (tmp_path, tmp_path),
    ):
        before = path.stat().st_mode
        path.chmod(0)
        error, *_ = found(folder)
        path.chmod(before)
        assert isinstance(error, InputError), error
        assert f"cannot read {path}" in str(error) and "(Permission denied)" in str(error)


@pytest.mark.parametrize(
    ("suffix", "named"),
    [(".mhd", "ElementDataFile = {}\n"), (".nhdr", "NRRD0004\ndata file: {}\n")],
)
def test_a_stamp_covers_data_beside_the_header(tmp_path: Path, suffix: str, named: str):
    header = tmp_path / f"a{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(volume()), str(header))
    (tmp_path / "other.raw").touch()
    *_, data = (
        file for file in tmp_path.iterdir() if file.name.startswith("a.") and file != header
    )
    before = stamp(header)
    assert {name for name, *_ in before} == {header.name, data.name}
    os.utime(data, (1, 1))
    assert stamp(header) != before
    for text, files in (
        ("LIST\nx 1.raw\ny.raw", ["x 1.raw", "y.raw"]),
        ("s%02d.raw 1 2 1", ["s01.raw", "s02.raw"]),
    ):
        for file in files:
            (tmp_path / file).touch()
        header.write_text(named.format(text))
        assert [name for name, *_ in stamp(header)] == [header.name, *files]


@pytest.mark.parametrize(
    "text",
    [
        "NDims = 3\nElementDataFile = {}\n",
        "NDims = 3\nElementDataFile = LIST 2\n{}\n",
        "NDims = 3\nElementDataFile = {folder}/s%03d.raw 7 7 1\n",
    ],
)
@pytest.mark.parametrize("suffix", [".mhd", ".mha"])
def test_a_stamp_covers_data_in_folders_below(tmp_path: Path, text: str, suffix: str):
    header, data = tmp_path / "raw" / f"a{suffix}", tmp_path / "raw" / "voxels" / "s007.raw"
    data.parent.mkdir(parents=True)
    data.write_bytes(b"1234")
    header.write_text(text.format("voxels/s007.raw", folder="voxels"))
    before, content = stamp(header), digest(header)
    assert [name for name, *_ in before] == [header.name, "voxels/s007.raw"]
    times = data.stat()
    data.write_bytes(b"1235")
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp --preserve` does
    assert stamp(header) != before and digest(header) != content


def test_a_stamp_sees_another_target_of_a_link(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
        os.utime(tmp_path / name, (5, 5))
    link = tmp_path / "scan.nii"
    link.symlink_to("a")
    before = stamp(link)
    link.unlink()
    link.symlink_to("b")
    assert stamp(link) != before


def test_a_stamp_of_a_series_covers_all_slices(tmp_path: Path):
    folder = write_dicom(tmp_path / "series", volume(), placed("LPS"))
    before = stamp(folder)
    assert len(before) == len(volume())
    sorted(folder.iterdir())[2].write_bytes(b"shorter")
    assert stamp(folder) != before
