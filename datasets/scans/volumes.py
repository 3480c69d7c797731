"""Reading and writing scans with their geometry, so that a prediction lies where the scan lay.

Arrays are (slice, row, column), geometry is in SimpleITK's order (x, y, z): the order of both is
what `SimpleITK.GetArrayFromImage` and `GetSpacing` give.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import SimpleITK as sitk

from common.errors import InputError
from common.files import atomic_path, require_file

SPACING_TOLERANCE = 1e-3  # relative
ORIGIN_TOLERANCE = 1e-2  # mm
DIRECTION_TOLERANCE = 1e-3  # of each cosine
GZIP_MAGIC = b"\x1f\x8b"
NIFTI_FLOATS = {16: "f4", 64: "f8"}  # by the header's datatype
NIFTI_HEADER_SIZES = (348, 540)  # its first number, of version 1 and 2: tells the byte order


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a scan lie in the patient, as SimpleITK orders it."""

    spacing: tuple[float, ...]  # (x, y, z), mm
    origin: tuple[float, ...]  # (x, y, z) of the first voxel's centre, mm
    direction: tuple[float, ...]  # 3 x 3 cosines, row-major; its columns are the axes x, y, z

    @classmethod
    def unknown(cls) -> Geometry:
        """The geometry of an array that came without one: 1 mm voxels along the axes."""
        return cls((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))

    @property
    def voxel_spacing(self) -> tuple[float, ...]:
        """Spacing in mm along (slice, row, column), the order of an array's axes."""
        return self.spacing[::-1]

    def matches(self, other: Geometry) -> bool:
        """Whether both place voxels alike, up to the rounding of file headers."""
        return not self.differences(other)

    def differences(self, other: Geometry) -> list[str]:
        """Which of spacing, origin and direction differ, as `spacing (1, 1, 3) and (1, 1, 5)`."""
        close = {
            "spacing": _all_close(self.spacing, other.spacing, relative=SPACING_TOLERANCE),
            "origin": _all_close(self.origin, other.origin, absolute=ORIGIN_TOLERANCE),
            "direction": _all_close(self.direction, other.direction, absolute=DIRECTION_TOLERANCE),
        }
        return [
            f"{name} {_numbers(getattr(self, name))} and {_numbers(getattr(other, name))}"
            for name, same in close.items()
            if not same
        ]


def read_volume(
    path: str | Path, channel: int | None = None
) -> tuple[np.ndarray, Geometry]:  # (D, H, W), dtype of the file
    """Read a scan of one value a voxel in any format that SimpleITK knows.

    Args:
        channel: which of the volumes of a 4-D file, from 0; None: the file has to be 3-D.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is unreadable or cut short, not 3-D, of several values a voxel, or holds
            NaN or infinite values.
    """
    path = Path(path)
    reader = _open(path, channel)
    _check_nifti(path, reader)
    with readable(path):
        image = reader.Execute()
    array = sitk.GetArrayFromImage(image)
    if array.dtype.kind == "f":
        bad = [index for index, plane in enumerate(array) if not np.isfinite(plane).all()]
        _refuse_bad_slices(path, bad, len(array))
    return array, geometry_of(image)


def read_header(
    path: str | Path, channel: int | None = None
) -> tuple[tuple[int, ...], Geometry]:  # (D, H, W)
    """Shape and geometry of a scan without reading its voxels; raises as `read_volume` does."""
    reader = _open(path, channel)
    return tuple(reader.GetSize()[2::-1]), geometry_of(reader)


def write_volume(
    path: str | Path,
    array: np.ndarray,
    geometry: Geometry,
    finish: Callable[[Path], object] | None = None,
) -> None:
    """Write (D, H, W) voxels with their geometry, whole or not at all; the dtype is kept.

    Args:
        finish: changes or checks the file before it gets its name.

    Raises:
        InputError: the array is not 3-D, no scan format holds its dtype, the suffix names no
            format, or the file cannot be written.
    """
    if array.ndim != 3 or not array.size:
        raise InputError(
            f"cannot write {path}: the array has shape {array.shape}, expected non-empty (D, H, W)"
        )
    known_name(path)
    try:
        image = sitk.GetImageFromArray(array, isVector=False)
    except TypeError:
        raise InputError(
            f"cannot write {path}: scans do not hold values of type {array.dtype}; convert them, "
            "labels to uint8 and intensities to float32"
        ) from None
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    try:
        with quiet(), atomic_path(path) as temporary:
            sitk.WriteImage(image, temporary, useCompression=True)
            if finish is not None:
                finish(temporary)
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"cannot write {path} ({_meaningful_line(error)}); check that the folder can be "
            "written and that the name ends as a scan's, e.g. .nii.gz"
        ) from None


def _open(path: str | Path, channel: int | None = None) -> sitk.ImageFileReader:
    with accessible(path):
        path = require_file(path, what="scan", remedy="check the path")
        path.open("rb").close()  # SimpleITK would not say why it cannot
    reader = sitk.ImageFileReader()
    reader.SetFileName(known_name(path))
    with readable(path):
        reader.ReadImageInformation()
    if channel is not None and reader.GetDimension() == 4:
        *size, count = reader.GetSize()
        if channel >= count:
            raise InputError(
                f"{path} holds {count} channels, counted from 0; channel {channel} "
                "is not among them"
            )
        reader.SetExtractSize((*size, 0))
        reader.SetExtractIndex((0, 0, 0, channel))
    elif reader.GetDimension() != 3:
        raise InputError(
            f"{path} has {reader.GetDimension()} dimensions of size {reader.GetSize()[::-1]}, "
            "expected 3 (slice, row, column); give one scan a file"
        )
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if reader.GetNumberOfComponents() != 1 or "complex" in kind:
        raise InputError(f"{path} holds voxels of {kind}, expected one real number a voxel")
    return reader


def _check_nifti(path: Path, reader: sitk.ImageFileReader) -> None:
    """Refuse in a NIfTI file what SimpleITK mends in silence.

    Voxels that are missing at the end, and NaN and infinite ones, it reads as 0. Of other formats,
    which carry no `vox_offset`, it refuses the first and keeps the second.
    """
    if not reader.HasMetaDataKey("vox_offset") or path.suffix in (".hdr", ".img"):
        return
    columns, rows, *stack = reader.GetSize()
    slices = math.prod(stack)  # of all channels
    plane_bytes = rows * columns * int(reader.GetMetaData("bitpix")) // 8
    kind = NIFTI_FLOATS.get(int(reader.GetMetaData("datatype")))
    bad = []
    try:
        with unpacked(path) as stream:
            order = "<" if int.from_bytes(stream.read(4), "little") in NIFTI_HEADER_SIZES else ">"
            stream.seek(int(float(reader.GetMetaData("vox_offset"))))
            for index in range(slices):
                plane = stream.read(plane_bytes)
                if len(plane) < plane_bytes:
                    raise EOFError(f"the file ends in slice {index} of {slices}")
                if kind and not np.isfinite(np.frombuffer(plane, order + kind)).all():
                    bad.append(index)
            while stream.read(1 << 20):  # gzip verifies its checksum at the end
                pass
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(
            f"{path} is damaged or cut short ({_meaningful_line(error)}); fetch it again"
        ) from None
    _refuse_bad_slices(path, bad, slices)


def unpacked(path: Path) -> IO[bytes]:
    """Open a file for reading, through gzip if that is what it holds, whatever its name says."""
    with path.open("rb") as file:
        packed = file.read(2) == GZIP_MAGIC
    return gzip.open(path) if packed else path.open("rb")


def _refuse_bad_slices(path: Path, bad: list[int], slices: int) -> None:
    if bad:
        raise InputError(
            f"{path} holds NaN or infinite values in {len(bad)} of {slices} slices, first in "
            f"slice {bad[0]}; export the scan again"
        )


def geometry_of(source: sitk.Image | sitk.ImageFileReader) -> Geometry:
    """The geometry of an image, or of one volume of a 4-D file.

    A negative spacing, as headers may say it, is a positive one along the opposite axis: so
    SimpleITK reads the voxels.
    """
    dimension = source.GetDimension()
    spacing = np.array(source.GetSpacing()[:3])
    signs = np.where(spacing < 0, -1.0, 1.0)
    axes = np.reshape(source.GetDirection(), (dimension, dimension))[:3, :3] * signs
    return Geometry(
        tuple((spacing * signs).tolist()), source.GetOrigin()[:3], tuple(axes.ravel().tolist())
    )


def _all_close(
    first: tuple[float, ...],
    second: tuple[float, ...],
    *,
    relative: float = 0.0,
    absolute: float = 0.0,
) -> bool:
    return len(first) == len(second) and all(
        math.isclose(a, b, rel_tol=relative, abs_tol=absolute)
        for a, b in zip(first, second, strict=True)
    )


def _numbers(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:.5g}' for value in values)})"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep SimpleITK's C++ warnings off stderr; its errors still come as exceptions."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def known_name(path: str | Path) -> str:
    """The path as SimpleITK takes it, in UTF-8; another would end the process."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"the name {os.fsencode(path)!r} is not in UTF-8, as file names are expected; rename it"
        ) from None
    return str(path)


@contextlib.contextmanager
def accessible(path: str | Path) -> Iterator[None]:
    """Turn a file or folder that may not be read into one line that names it."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"cannot read {error.filename or path} ({error.strerror}); give the right to read it, "
            "or another path"
        ) from None


@contextlib.contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turn what SimpleITK raises on a bad file into one line that names it."""
    try:
        with quiet():
            yield
    except RuntimeError as error:
        raise InputError(
            f"{path} is not a readable scan ({_meaningful_line(error)}); it may be damaged or cut "
            "short: fetch or export it again"
        ) from None


def _meaningful_line(error: BaseException) -> str:
    """What went wrong, without the C++ source line and object address that SimpleITK puts first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith("Exception thrown in SimpleITK")]
    first = (telling or lines or [type(error).__name__])[0]
    return re.sub(r"^((s?itk::ERROR|ITK ERROR|\w+\(0x\w+\)|ERROR): )+", "", first)[:200]
