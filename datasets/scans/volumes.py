"""Reading and writing of scans with their geometry, so that a prediction lies where its scan lies.

Arrays are (slice, row, column). Geometry is in SimpleITK's order (x, y, z). Both orders are those
of `SimpleITK.GetArrayFromImage` and `GetSpacing`.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import IO

import numpy as np
import SimpleITK as sitk

from common.errors import InputError
from common.files import atomic_path, require_file
from datasets.scans.errors import (
    reporting_itk_errors,
    reporting_os_errors,
    short_reason,
    utf8_path,
    without_itk_warnings,
)

SPACING_TOLERANCE = 1e-3  # relative
ORIGIN_TOLERANCE = 1e-2  # mm
DIRECTION_TOLERANCE = 1e-3  # of each cosine
GZIP_MAGIC = b"\x1f\x8b"
NIFTI_FLOATS = {16: "f4", 64: "f8"}  # `datatype` in the header -> numpy type
# First number in the header of NIfTI-1 and NIfTI-2; it shows the byte order.
NIFTI_HEADER_SIZES = (348, 540)


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a scan lie in the patient, in SimpleITK's order."""

    spacing: tuple[float, ...]  # (x, y, z), mm
    origin: tuple[float, ...]  # (x, y, z) of the centre of the first voxel, mm
    direction: tuple[float, ...]  # 3 × 3 cosines, row-major; the columns are the axes x, y, z
    # How far rounding in the file may have moved origin and spacing, mm. It is no part of where the
    # voxels lie, so it is neither compared nor stored.
    rounding: InitVar[tuple[float, float]] = (0.0, 0.0)

    def __post_init__(self, rounding: tuple[float, float]) -> None:
        object.__setattr__(self, "rounding", rounding)

    @classmethod
    def unknown(cls) -> Geometry:
        """Return the geometry for an array without one: 1 mm voxels along the axes."""
        return cls((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))

    @property
    def voxel_spacing(self) -> tuple[float, ...]:
        """Spacing in mm along (slice, row, column), the axes of an array."""
        return self.spacing[::-1]

    def matches(self, other: Geometry) -> bool:
        """Return whether both place voxels alike, up to the rounding of file headers."""
        return not self.differences(other)

    def differences(self, other: Geometry) -> list[str]:
        """Return what differs, e.g. `spacing (1, 1, 3) and (1, 1, 5)`."""
        origin_error, spacing_error = map(max, zip(self.rounding, other.rounding, strict=True))
        close = {
            "spacing": _all_close(
                self.spacing, other.spacing, relative=SPACING_TOLERANCE, absolute=spacing_error
            ),
            "origin": _all_close(
                self.origin, other.origin, absolute=ORIGIN_TOLERANCE + origin_error
            ),
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
    """Read a scan with one value per voxel, in any format that SimpleITK knows.

    Args:
        channel: index of the volume to read from a 4-D file; None: the file must be 3-D.

    Raises:
        MissingFileError: the file does not exist.
        InputError: the file is unreadable, cut short, not 3-D, has several values per voxel, or
            holds NaN or infinite values.
    """
    path = Path(path)
    reader = _open(path, channel)
    _check_nifti(path, reader)
    with reporting_itk_errors(path):
        image = reader.Execute()
    array = sitk.GetArrayFromImage(image)
    if array.dtype.kind == "f":
        bad = [index for index, plane in enumerate(array) if not np.isfinite(plane).all()]
        _refuse_bad_slices(path, bad, len(array))
    return array, geometry_of(image)


def read_header(
    path: str | Path, channel: int | None = None
) -> tuple[tuple[int, ...], Geometry]:  # (D, H, W)
    """Read shape and geometry of a scan without its voxels; raises as `read_volume` does."""
    reader = _open(path, channel)
    return tuple(reader.GetSize()[2::-1]), geometry_of(reader)


def write_volume(
    path: str | Path,
    array: np.ndarray,
    geometry: Geometry,
    finish: Callable[[Path], object] | None = None,
) -> None:
    """Write (D, H, W) voxels in their dtype, with their geometry; whole or not at all.

    Args:
        finish: changes or checks the temporary file before it gets its final name.

    Raises:
        InputError: the array is not 3-D, scan formats cannot hold its dtype, the suffix is not the
            suffix of a format, or the file cannot be written.
    """
    if array.ndim != 3 or not array.size:
        raise InputError(
            f"cannot write {path}: the array has shape {array.shape}, expected non-empty (D, H, W)"
        )
    utf8_path(path)
    try:
        image = sitk.GetImageFromArray(array, isVector=False)
    except TypeError:
        raise InputError(
            f"cannot write {path}: scan files cannot hold values of type {array.dtype}; convert "
            "labels to uint8, or intensities to float32"
        ) from None
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    try:
        with without_itk_warnings(), atomic_path(path) as temporary:
            sitk.WriteImage(image, temporary, useCompression=True)
            if finish is not None:
                finish(temporary)
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"cannot write {path} ({short_reason(error)}); check that the folder is writable and "
            "that the name has the suffix of a scan, e.g. .nii.gz"
        ) from None


def _open(path: str | Path, channel: int | None = None) -> sitk.ImageFileReader:
    """Read the header, and set the reader to one 3-D volume of one real number per voxel."""
    with reporting_os_errors(path):
        path = require_file(path, what="scan", remedy="check the path")
        path.open("rb").close()  # SimpleITK would not report why it cannot open the file
    reader = sitk.ImageFileReader()
    reader.SetFileName(utf8_path(path))
    with reporting_itk_errors(path):
        reader.ReadImageInformation()
    if channel is not None and reader.GetDimension() == 4:
        *size, count = reader.GetSize()
        if channel >= count:
            raise InputError(
                f"{path} holds {count} channels, numbered 0…{count - 1}, but channel {channel} is "
                "needed; pass another --channel"
            )
        reader.SetExtractSize((*size, 0))
        reader.SetExtractIndex((0, 0, 0, channel))
    elif reader.GetDimension() != 3:
        raise InputError(
            f"{path} has {reader.GetDimension()} dimensions of size {reader.GetSize()[::-1]}, "
            "expected 3 (slice, row, column); save one scan per file"
        )
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if reader.GetNumberOfComponents() != 1 or "complex" in kind:
        raise InputError(f"{path} holds voxels of {kind}, expected one real number per voxel")
    return reader


def _check_nifti(path: Path, reader: sitk.ImageFileReader) -> None:
    """Refuse faults of a NIfTI file that SimpleITK hides.

    SimpleITK reads missing voxels at the end, NaN and infinite values of NIfTI files as 0. In
    other formats it reports missing voxels and keeps NaN. Only NIfTI has a `vox_offset`.
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
            f"{path} is damaged or cut short ({short_reason(error)}); fetch it again"
        ) from None
    _refuse_bad_slices(path, bad, slices)


def unpacked(path: Path) -> IO[bytes]:
    """Open a file for reading, through gzip if its content is packed, whatever its suffix is."""
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
    """Return the geometry of an image, or of one volume of a 4-D file.

    Some headers hold a negative spacing. It becomes a positive spacing along the opposite axis,
    because SimpleITK reads the voxels in that way.
    """
    dimension = source.GetDimension()
    spacing = np.array(source.GetSpacing()[:3])
    signs = np.where(spacing < 0, -1.0, 1.0)
    axes = np.reshape(source.GetDirection(), (dimension, dimension))[:3, :3] * signs
    return Geometry(
        spacing=tuple((spacing * signs).tolist()),
        origin=source.GetOrigin()[:3],
        direction=tuple(axes.ravel().tolist()),
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
