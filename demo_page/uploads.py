"""What a browser sends: one file, or a zip archive that is unpacked with limits.

Nothing that an archive says about itself is trusted: names and kinds of its entries are checked
before anything is written, and bytes are counted while they are unpacked.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
import zipfile
import zlib
from dataclasses import dataclass
from io import StringIO
from pathlib import Path, PurePosixPath

from common.errors import InputError, cannot_write
from datasets.scans.files import SERIES, ScanFile, read_scan_header, search, select_channel

ARCHIVE = ".zip"
MOST_ENTRIES = 20_000  # of an archive; a long 4-D series has some thousand slices
MOST_DIRECTORY = 16 << 20  # bytes of the list of an archive's entries
DEEPEST = 16  # folders
LONGEST_PART = 200  # bytes of a name
MOST_RATIO = 200  # unpacked over packed bytes of a whole archive; empty slices pack 1000 times
SMALL = 64 << 20  # bytes below which the ratio does not count
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
BLOCK = 1 << 20  # bytes that are unpacked at once
SEND = "send a zip archive of plain files, as the file manager of the system makes it"


@dataclass(frozen=True)
class Limits:
    """What an upload may be at most."""

    file_bytes: int  # as it is sent
    voxels: int  # of the scan in it

    @property
    def unpacked_bytes(self) -> int:
        """The most bytes that an archive may unpack to: four bytes a voxel, and some for tags."""
        return max(4 * self.voxels, 2 * self.file_bytes)


def scan_of_upload(
    folder: Path, limits: Limits, channel: int | None, path: Path
) -> tuple[Path, ScanFile]:
    """Find the one scan of an upload, whose size is within the limits; unpack an archive first.

    Nothing but headers is read. Call it in a process of its own (`IsolatedReader`), because damaged
    files may end it.

    Args:
        folder: where an archive is unpacked; it does not exist yet.
        channel: of a 4-D file, see `select_channel`.
        path: the file that was sent.

    Returns:
        The input for predict.py, and the scan in it.

    Raises:
        InputError: the upload is no scan, too large, or an archive that is not safe.
    """
    if (size := path.stat().st_size) > limits.file_bytes:
        raise InputError(
            f"{path} has {size >> 20} MB, more than the {limits.file_bytes >> 20} MB that this "
            "page takes; start demo.py with a larger --max_upload_mb"
        )
    source = path
    if path.name.lower().endswith(ARCHIVE):
        unpack(folder, limits, path)
        source = _only_folder(folder)
    try:
        with contextlib.redirect_stderr(StringIO()):  # predict.py gives the same warnings again
            scans = select_channel(search(source, keep_names=False)[0], channel)
    except InputError as error:  # about a folder, where an archive was sent
        told = str(error).replace(str(source), str(path))
        raise InputError(told.replace(SERIES, "a zip archive of a DICOM series")) from None
    if len(scans) > 1:
        names = ", ".join(scan.name for scan in scans[:5])
        raise InputError(
            f"{path} holds {len(scans)} scans ({names}{', …' if len(scans) > 5 else ''}), expected "
            "one; send them one by one"
        )
    shape, _ = read_scan_header(scans[0])
    if math.prod(map(int, shape)) > limits.voxels:
        raise InputError(
            f"{path} has {' × '.join(map(str, shape))} voxels, more than the {limits.voxels:,} "
            "that this page takes; start demo.py with a larger --max_voxels, or use predict.py"
        )
    return source, scans[0]


def _only_folder(folder: Path) -> Path:
    """Return the folder that holds the files, where an archive has one folder within another."""
    inside = list(folder.iterdir())
    while len(inside) == 1 and inside[0].is_dir():
        folder = inside[0]
        inside = list(folder.iterdir())
    return folder


def unpack(folder: Path, limits: Limits, path: Path) -> None:
    """Unpack a zip archive into a new folder.

    Raises:
        InputError: it is damaged, encrypted or too large, an entry leads out of the folder, is a
            link, or has the name of another. The caller deletes what was unpacked before.
    """
    packed = path.stat().st_size
    most = min(limits.unpacked_bytes, max(SMALL, MOST_RATIO * packed))
    left = most
    try:
        with path.open("rb", buffering=0) as raw, zipfile.ZipFile(_Bounded(raw)) as archive:
            entries = archive.infolist()
            if len(entries) > MOST_ENTRIES:
                raise InputError(
                    f"{path} has {len(entries)} entries, more than {MOST_ENTRIES}; send one series"
                )
            targets = [_target(path, entry) for entry in entries]
            folder.mkdir(mode=0o700, parents=True)
            for entry, target in zip(entries, targets, strict=True):
                if target is not None:
                    left = _write(archive, entry, folder / target, left)
                if left < 0:
                    raise InputError(
                        f"{path} unpacks to more than {most >> 20} MB, which is more than a scan "
                        "that this page takes; send the series alone"
                    )
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path} {error}; {SEND}") from None
    except OSError as error:
        raise cannot_write(folder, error) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        told = str(error)[:160]
        raise InputError(f"{path} is not a readable zip archive ({told}); pack it again") from None
    if not any(folder.rglob("*")):
        raise InputError(f"{path} holds no file; pack the scan again")


class _Bounded(io.BufferedReader):
    """A file of which no long part is read at once, so that its list of entries is no bomb."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > MOST_DIRECTORY:
            raise InputError(f"has a list of more than {MOST_ENTRIES} entries")
        return super().read(size)


def _target(path: Path, entry: zipfile.ZipInfo) -> Path | None:
    """Return where an entry is written below the folder; None: it is a folder, or a Mac's note.

    Raises:
        InputError: its name leads out of the folder or cannot be a file's, or it is no plain file.
    """
    name = entry.orig_filename
    shown = repr(name[:80])
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0]:
        raise InputError(f"{path} has the entry {shown}, which leads to another folder; {SEND}")
    too_long = any(len(part.encode(errors="replace")) > LONGEST_PART for part in parts)
    if too_long or len(parts) > DEEPEST or not name.isprintable():
        raise InputError(f"{path} has the entry {shown}, which cannot be a file's name; {SEND}")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise InputError(f"{path} has the entry {shown}, which is a link or a device; {SEND}")
    if entry.flag_bits & 0x1:
        raise InputError(f"{path} is encrypted; send it without a password")
    if entry.compress_type not in METHODS:
        raise InputError(f"{path} is packed by a rare method ({entry.compress_type}); {SEND}")
    if entry.is_dir() or kind == stat.S_IFDIR or any(part.startswith(".") for part in parts):
        return None
    return None if parts[0] == "__MACOSX" else Path(*parts)


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, left: int) -> int:
    """Write an entry, at most `left` bytes of it; return how many bytes are left, or -1.

    Raises:
        InputError: another entry has the same name.
    """
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with archive.open(entry) as source, target.open("xb") as file:
            while block := source.read(BLOCK):
                left -= len(block)
                if left < 0:
                    return -1
                file.write(block)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"has two entries of the name {entry.filename[:80]!r}") from None
    return left
