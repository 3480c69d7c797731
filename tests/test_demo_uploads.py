"""What a browser may send to demo.py: archives that are not safe, uploads that are no scan."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_scans import placed, volume, write_dicom

from common.errors import InputError
from datasets.scans.volumes import write_volume
from demo_page import uploads
from demo_page.uploads import Limits, scan_of_upload, unpack

LIMITS = Limits(file_bytes=1 << 20, voxels=10_000)


def packed(path: Path, entries: dict[str, bytes], **attributes: int) -> Path:
    """Write a zip archive; attributes are those of every entry."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            entry = zipfile.ZipInfo("x")
            entry.filename, entry.compress_type = name, zipfile.ZIP_DEFLATED
            for key, value in attributes.items():
                setattr(entry, key, value)
            archive.writestr(entry, content)
    return path


def series(folder: Path) -> dict[str, bytes]:
    write_dicom(folder, volume(), placed("LPS", oblique=False))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_zipped_series_is_found_whatever_folders_and_notes_lie_around_it(tmp_path: Path):
    slices = series(tmp_path / "dicom")
    deep = {f"patient/study/{name}": content for name, content in slices.items()}
    deep |= {"__MACOSX/patient/._a": b"x", "patient/.DS_Store": b"x"}
    path = packed(tmp_path / "CT 7.zip", deep)
    source, scan = scan_of_upload(tmp_path / "new" / "CT 7", LIMITS, None, path)
    assert scan.path.resolve().is_relative_to(tmp_path / "new")
    assert sorted(file.name for file in scan.path.iterdir()) == sorted(slices)
    assert source.is_relative_to(tmp_path / "new")
    flat = packed(tmp_path / "flat.zip", slices)
    assert scan_of_upload(tmp_path / "flat", LIMITS, None, flat)[1].name == "flat"


LINK = (stat.S_IFLNK | 0o777) << 16
WRONG_ARCHIVES = {
    "up": ({"a/../../evil": b"x"}, {}, "which leads to another folder"),
    "absolute": ({"/tmp/evil": b"x"}, {}, "which leads to another folder"),
    "backslash": ({"..\\evil": b"x"}, {}, "which leads to another folder"),
    "drive": ({"C:/evil": b"x"}, {}, "which leads to another folder"),
    "link": ({"a": b"/etc/passwd"}, {"external_attr": LINK}, "a link or a device"),
    "long name": ({"a" * 250: b"x"}, {}, "which cannot be a file's name"),
    "line break": ({"a\nb": b"x"}, {}, "which cannot be a file's name"),
    "bomb": ({"a": bytes(70 << 20)}, {}, "unpacks to more than"),
    "file as folder": ({"a": b"x", "a/b": b"x"}, {}, "two entries of the name 'a/b'"),
    "nothing": ({"__MACOSX/a": b"x"}, {}, "holds no file"),
}


@pytest.mark.parametrize("name", WRONG_ARCHIVES)
def test_an_unsafe_archive_is_one_sentence_and_leaves_nothing_outside(tmp_path: Path, name: str):
    entries, attributes, told = WRONG_ARCHIVES[name]
    path = packed(tmp_path / "scan.zip", entries, **attributes)
    with pytest.raises(InputError, match=told) as error:
        unpack(tmp_path / "in" / "scan", LIMITS, path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    outside = [one for one in tmp_path.iterdir() if one.name not in ("scan.zip", "in")]
    assert outside == [] and not Path("/tmp/evil").exists()


def test_what_an_archive_says_of_its_sizes_is_not_trusted(tmp_path: Path):
    path = packed(tmp_path / "scan.zip", {"a": bytes(3 << 20)})
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\1\2")  # the size in the list of entries, and the one before the entry
    content[at + 24 : at + 28] = content[22:26] = (5).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable zip archive"):
        unpack(tmp_path / "in", LIMITS, path)
    assert sum(file.stat().st_size for file in (tmp_path / "in").rglob("*")) <= 3 << 20


def test_archives_of_many_entries_encrypted_and_damaged_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = packed(tmp_path / "scan.zip", {f"{i}": b"x" for i in range(30)})
    monkeypatch.setattr(uploads, "MOST_ENTRIES", 20)
    with pytest.raises(InputError, match="30 entries, more than 20"):
        unpack(tmp_path / "in", LIMITS, path)
    with monkeypatch.context() as patch:
        patch.setattr(uploads, "MOST_DIRECTORY", 500)
        with pytest.raises(InputError, match="a list of more than 20 entries"):
            unpack(tmp_path / "in", LIMITS, path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="not a readable zip archive"):
        unpack(tmp_path / "in", LIMITS, path)
    locked = packed(tmp_path / "locked.zip", {"a": b"x"})
    content = bytearray(locked.read_bytes())
    content[content.rindex(b"PK\1\2") + 8] |= 1
    locked.write_bytes(content)
    with pytest.raises(InputError, match="encrypted"):
        unpack(tmp_path / "in", LIMITS, locked)


def test_uploads_that_are_no_scan_too_large_or_several(tmp_path: Path):
    text = tmp_path / "a.txt"
    text.write_text("no scan")
    with pytest.raises(InputError, match=r"not a scan or picture .* or a zip archive of a DICOM"):
        scan_of_upload(tmp_path / "in", LIMITS, None, text)
    notes = packed(tmp_path / "notes.zip", {"a/b.txt": b"x"})
    with pytest.raises(InputError, match=rf"^{notes} holds no scan, .* or a zip archive of a D"):
        scan_of_upload(tmp_path / "notes", LIMITS, None, notes)
    write_volume(tmp_path / "large.nii.gz", np.zeros((40, 20, 20), np.int16), placed("LPS"))
    with pytest.raises(InputError, match="40 × 20 × 20 voxels, more than the 10,000"):
        scan_of_upload(tmp_path / "in", LIMITS, None, tmp_path / "large.nii.gz")
    with pytest.raises(InputError, match="more than the 0 MB that this page takes"):
        scan_of_upload(tmp_path / "in", Limits(5, 10**9), None, tmp_path / "large.nii.gz")
    content = (tmp_path / "large.nii.gz").read_bytes()
    two = packed(tmp_path / "two.zip", {"a.nii.gz": content, "b.nii.gz": content})
    with pytest.raises(InputError, match=r"holds 2 scans \(a, b\), expected one"):
        scan_of_upload(tmp_path / "in", LIMITS, None, two)
