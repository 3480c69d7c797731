"""What a NIfTI header says of where its voxels lie; SimpleITK hides some of it.

SimpleITK takes the size of voxels from `pixdim` alone, reads a size of 0 or NaN as 1 mm, reads no
NIfTI-2, and refuses an sform that is at right angles up to rounding.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from nibabel import Nifti1Header, Nifti1Image, Nifti2Header, Nifti2Image
from nibabel.spatialimages import HeaderDataError

from common.errors import InputError
from datasets.scans.errors import short_reason
from datasets.scans.geometry import SKEWED
from datasets.scans.stored_data import BLOCK, DEFLATE_RATIO, refuse_beyond_memory

GZIP_MAGIC = b"\x1f\x8b"
QFORM = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
LARGEST_START = 1 << 30  # bytes of a header and its extensions
MOST_REST = 16 << 20  # bytes behind the voxels, which nothing tells of
GZIP_LEVEL = 1  # the fastest level shrinks labels a hundredfold already
# Codes of extensions with a table of labels. TotalSegmentator writes and reads the first, through
# nibabel, which cannot read the second; Connectome Workbench reads the second alone.
TABLE_CODES = (0, 30)  # NIFTI_ECODE_IGNORE, NIFTI_ECODE_CARET
MAGIC_1, MAGIC_2 = slice(344, 348), slice(4, 8)  # of the header's bytes
MILLIMETRES = {1: 1000.0, 3: 1e-3}  # `xyzt_units` -> mm; all others are taken for mm
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
STRAIGHTEN = (
    "resample the scan and its label onto straight axes, e.g. with "
    "nibabel.processing.resample_to_output (order=0 for the label) or 3D Slicer"
)


def unpacked(path: Path) -> IO[bytes]:
    """Open a file for reading, through gzip if its content is packed, whatever its suffix is."""
    return gzip.open(path) if is_packed(path) else path.open("rb")


def is_packed(path: Path) -> bool:
    """Return whether a file is packed by gzip, whatever its suffix is."""
    with path.open("rb") as file:
        return file.read(2) == GZIP_MAGIC


def nifti_header(path: Path) -> Nifti1Header | None:
    """Return the header of a NIfTI-1 or NIfTI-2 file, as it is; None for other files."""
    try:
        with unpacked(path) as stream:
            start = stream.read(Nifti2Header.sizeof_hdr)
    except (OSError, EOFError, zlib.error):
        return None
    if start[MAGIC_1] in (b"n+1\0", b"ni1\0"):
        return Nifti1Header(start[: Nifti1Header.sizeof_hdr], check=False)
    if start[MAGIC_2] in (b"n+2\0", b"ni2\0"):
        return Nifti2Header(start, check=False)
    return None


def write_nifti(path: Path, header: Nifti1Header, voxels: bytes, extension: bytes = b"") -> None:
    """Write a NIfTI file: header, extensions, voxels. Equal content gives equal files.

    Args:
        path: packed by gzip if its suffix is .gz.
        header: its `vox_offset` is set.
        voxels: as they lie in the file.
        extension: table of labels, which is written once for each of `TABLE_CODES`; empty: none.
            It is filled up with blanks, because the size of an extension is a multiple of 16.
    """
    size = -(-(len(extension) + 8) // 16) * 16
    parts = [
        struct.pack(f"{header.endianness}2i", size, code) + extension.ljust(size - 8)
        for code in (TABLE_CODES if extension else ())
    ]
    # Four bytes say whether extensions follow.
    content = b"".join([b"\1\0\0\0" if extension else b"\0\0\0\0", *parts])
    header["vox_offset"] = header.sizeof_hdr + len(content)
    content = header.binaryblock + content
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("wb"))
        if path.suffix == ".gz":  # no name and no time, so that equal labels give equal files
            file = stack.enter_context(gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0))
        file.write(content)
        file.write(voxels)


def insert_extension(path: Path, extension: bytes) -> None:
    """Give a NIfTI file this table of labels alone; header fields and voxels stay as they are."""
    header = nifti_header(path)
    with unpacked(path) as stream:
        stream.seek(int(header["vox_offset"]))
        voxels = stream.read()
    write_nifti(path, header, voxels, extension)


def nifti_affines(path: Path, header: Nifti1Header) -> list[np.ndarray]:  # of (4, 4)
    """Return the affine matrices to LPS in mm that a header gives: of the sform, then the qform.

    Raises:
        InputError: the header gives no size of the voxels, two sizes, or axes that are not at right
            angles.
    """
    unit = MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    counts, given = np.ones(3), header["dim"][1 : int(header["dim"][0]) + 1][:3]
    counts[: len(given)] = given
    pixdim = np.abs(header["pixdim"][1:4].astype(float)) * unit
    known = np.isfinite(pixdim) & (pixdim > 0)
    size = np.where(known, pixdim, 1.0)
    if not (known | (counts == 1)).all():  # a single slice may have no thickness
        axes = ", ".join(axis for axis, good in zip("xyz", known, strict=True) if not good)
        raise InputError(
            f"{path} gives no size of its voxels along {axes} (pixdim {header['pixdim'][1:4]}); "
            "write the real size into the header, e.g. with nibabel's header.set_zooms"
        )

    sform = qform = None
    if header["sform_code"] > 0 and np.isfinite(header.get_sform()).all():
        sform = _in_mm(header.get_sform(), unit)
        if not np.isfinite(sform).all() or abs(np.linalg.det(sform[:3, :3])) < 1e-12:
            sform = None
    if header["qform_code"] > 0:
        qform = _qform(path, header, size, unit)
    if sform is None and header["sform_code"] > 0 and qform is None:
        raise InputError(
            f"{path} has an sform that gives no place to its voxels ({sform_text(header)}); export "
            "it again from the program that made it, or set the sform code to 0 to use no place"
        )
    if sform is not None and skew(sform[:3, :3]) > SKEWED:
        if qform is None or _largest_shift(sform, qform, counts) > 0.5 * size.min():
            raise InputError(
                f"{path} has an sform whose axes are not at right angles (off by "
                f"{np.degrees(np.arcsin(min(skew(sform[:3, :3]), 1.0))):.2g}°: gantry tilt or "
                f"registration); {STRAIGHTEN}"
            )
        sform = None
    if sform is not None:
        by_sform = np.linalg.norm(sform[:3, :3], axis=0)
        if not np.allclose(by_sform[counts > 1], size[counts > 1], rtol=5e-3, atol=0):
            raise InputError(
                f"{path} gives two sizes of its voxels, {by_sform.round(5)} mm by the sform and "
                f"{size.round(5)} mm by pixdim; correct the header, e.g. save it again "
                "with nibabel from the affine that is right"
            )
    return [affine for affine in (sform, qform) if affine is not None]


def _qform(path: Path, header: Nifti1Header, size: np.ndarray, unit: float) -> np.ndarray:
    """Return the affine matrix of the qform to LPS in mm for this size of voxels, in mm."""
    straight = header.copy()
    # A handedness of 0 means 1, by the standard.
    straight["pixdim"][:4] = [-1 if header["pixdim"][0] < 0 else 1, *size / unit]
    try:
        if not np.isfinite([header[name] for name in QFORM]).all():
            raise ValueError("NaN or infinite values")
        return _in_mm(straight.get_qform(), unit)
    except (HeaderDataError, ValueError) as error:
        raise InputError(
            f"{path} has an unreadable qform ({short_reason(error)}); export the scan again"
        ) from None


def sform_text(header: Nifti1Header) -> str:
    """Return the rows of the sform as one line."""
    return "; ".join(str(header[f"srow_{axis}"]) for axis in "xyz")


def skew(axes: np.ndarray) -> float:
    """Return the largest product of two of the columns, each made to a length of 1."""
    axes = axes / np.linalg.norm(axes, axis=0)
    return float(np.abs(axes.T @ axes - np.eye(len(axes))).max())


def straightened(affine: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return spacing (3,), origin (3,) and the nearest axes at right angles (3, 3)."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)
    return spacing, affine[:3, 3], left @ right


def read_with_nibabel(path: Path, header: Nifti1Header) -> np.ndarray:
    """Return the voxels (…, z, y, x) of a file that SimpleITK cannot read, without axes of size 1.

    Raises:
        InputError: the file is damaged or cut short.
    """
    kind = Nifti2Image if isinstance(header, Nifti2Header) else Nifti1Image
    try:
        with unpacked(path) as stream:
            array = np.asanyarray(kind.from_stream(stream).dataobj)
            while stream.read(1 << 20):  # gzip verifies its checksum at the end
                pass
    except Exception as error:  # on damaged bytes nibabel raises nearly anything
        raise InputError(
            f"{path} is damaged or cut short ({short_reason(error)}); fetch it again"
        ) from None
    shape = list(array.shape) + [1] * (3 - array.ndim)
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    return array.reshape(shape).transpose()


def _in_mm(affine: np.ndarray, unit: float) -> np.ndarray:
    return TO_LPS @ np.diag([unit, unit, unit, 1.0]) @ affine


def _largest_shift(first: np.ndarray, second: np.ndarray, counts: np.ndarray) -> float:
    """Return how far two affine matrices place the corners of a volume from each other, mm."""
    corners = np.stack(np.meshgrid(*[(0, count - 1) for count in counts]), -1).reshape(-1, 3)
    shifts = (first - second) @ np.column_stack([corners, np.ones(len(corners))]).T
    return float(np.linalg.norm(shifts[:3], axis=0).max())


def refuse_missing_voxels(path: Path, header: Nifti1Header) -> None:
    """Refuse a header that no voxels can follow, or that declares more than the file can hold.

    Raises:
        InputError: see above; no voxel is read.
    """
    start, wanted = float(header["vox_offset"]), math.prod(_sizes(path, header)) * _width(header)
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if header["magic"].item() in (b"ni1", b"ni2"):
        what = "is the header of a pair of files (.hdr and .img), expected header and voxels in one"
    elif not header.sizeof_hdr <= start <= LARGEST_START:
        what = f"has its voxels at byte {start:.6g} by its vox_offset, expected behind the header"
    elif wanted == 0:
        what = f"has voxels of the type {int(header['datatype'])}, which NIfTI does not know"
    elif math.isinf(slope) or (math.isfinite(slope) and slope and not math.isfinite(intercept)):
        what = f"scales its voxels by {slope:.6g} and {intercept:.6g}, expected finite numbers"
    elif (slope == 0 or math.isnan(slope)) and intercept and math.isfinite(intercept):
        what = f"scales its voxels by {slope:.6g} and adds {intercept:.6g}, which by the standard "
        what += "means nothing, and which some programs add"
    else:
        refuse_beyond_memory(path, wanted)
        there = path.stat().st_size
        if int(start) + wanted > there * (DEFLATE_RATIO if is_packed(path) else 1):
            raise InputError(
                f"{path} is damaged or cut short (its header declares {wanted} bytes of voxels, "
                f"and the file has {there} bytes); fetch it again"
            )
        return
    raise InputError(f"{path} {what}; export the scan again")


def _sizes(path: Path, header: Nifti1Header) -> list[int]:
    """Return the sizes of the axes, x first; axes after the third may have a size of 0 for 1."""
    count = int(header["dim"][0])
    sizes = [int(size) for size in header["dim"][1 : count + 1]]
    if not 1 <= count <= 7 or min(sizes[:3]) < 1 or min(sizes) < 0:
        raise InputError(
            f"{path} has the sizes {header['dim'].tolist()} in its header (their number first), "
            "expected 1 to 7 sizes above 0; export the scan again"
        )
    return [max(1, size) for size in sizes]


def _width(header: Nifti1Header) -> int:
    """Return how many bytes a voxel has; 0: the type is unknown."""
    try:
        return header.get_data_dtype().itemsize
    except (HeaderDataError, KeyError):
        return 0


def refuse_hidden_faults(path: Path, header: Nifti1Header) -> None:
    """Refuse faults of a NIfTI file that SimpleITK hides.

    SimpleITK reads missing voxels at the end, NaN and infinite values of NIfTI files as 0. In
    other formats it reports missing voxels and keeps NaN.
    """
    columns, rows, *stack = [*_sizes(path, header), 1][: max(2, int(header["dim"][0]))]
    slices = math.prod(stack)  # of all channels
    kind = header.get_data_dtype()
    plane_bytes = rows * columns * kind.itemsize
    bad, rest = [], 0
    try:
        with unpacked(path) as stream:
            stream.seek(int(header["vox_offset"]))
            for index in range(slices):
                plane = stream.read(plane_bytes)
                if len(plane) < plane_bytes:
                    raise EOFError(f"the file ends in slice {index} of {slices}")
                if kind.kind == "f" and not np.isfinite(np.frombuffer(plane, kind)).all():
                    bad.append(index)
            while part := stream.read(BLOCK):  # gzip verifies its checksum at the end
                rest += len(part)
                if rest > MOST_REST:
                    raise EOFError(f"{rest >> 20} MiB follow behind the voxels of the header")
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(
            f"{path} is damaged or cut short ({short_reason(error)}); fetch it again"
        ) from None
    refuse_bad_slices(path, bad, slices)


def refuse_bad_slices(path: Path, bad: list[int], slices: int) -> None:
    if bad:
        raise InputError(
            f"{path} holds NaN or infinite values in {len(bad)} of {slices} slices, first in "
            f"slice {bad[0]}; export the scan again"
        )
