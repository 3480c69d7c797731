"""Reading and writing of scans with their geometry, so that a prediction lies where its scan lies.

Arrays are (slice, row, column). Geometry is in SimpleITK's order (x, y, z). Both orders are those
of `SimpleITK.GetArrayFromImage` and `GetSpacing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nibabel import Nifti1Header

from common.errors import InputError, warn
from common.files import require_file
from common.writing import atomic_path
from datasets.scans.errors import (
    reporting_itk_errors,
    reporting_os_errors,
    short_reason,
    unreadable,
    utf8_path,
    without_itk_warnings,
)
from datasets.scans.formats import checked_reader, refuse_bad_voxels
from datasets.scans.nifti import (
    SKEWED,
    STRAIGHTEN,
    nifti_affines,
    nifti_header,
    read_with_nibabel,
    refuse_bad_slices,
    skew,
    straightened,
)

SPACING_TOLERANCE = 1e-3  # relative
ORIGIN_TOLERANCE = 1e-2  # mm
DIRECTION_TOLERANCE = 1e-3  # of each cosine


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
    """Read a scan with one value per voxel: NIfTI, NRRD or MetaImage by its content.

    A 2-D file is read as one slice.

    Args:
        channel: index of the volume to read from a 4-D file; None: the file must be 3-D or 2-D.

    Raises:
        MissingFileError: the file does not exist.
        InputError: the file is unreadable, cut short, not 3-D, has several values per voxel, holds
            NaN or infinite values, or does not tell where its voxels lie.
    """
    path = Path(path)
    source = image = _open(path, channel)
    if isinstance(source, sitk.ImageFileReader):
        refuse_bad_voxels(path)
        with reporting_itk_errors(path):
            image = source.Execute()
    array = sitk.GetArrayFromImage(image)
    array = array[None] if array.ndim == 2 else array
    if array.dtype.kind == "f":
        bad = [index for index, plane in enumerate(array) if not np.isfinite(plane).all()]
        refuse_bad_slices(path, bad, len(array))
    return array, _place(path, image, tell=True)


def read_header(
    path: str | Path, channel: int | None = None
) -> tuple[tuple[int, ...], Geometry]:  # (D, H, W)
    """Read shape and geometry of a scan without its voxels; raises as `read_volume` does."""
    source = _open(path, channel)
    return (1, *source.GetSize()[2::-1])[-3:], _place(Path(path), source)


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


def _open(path: str | Path, channel: int | None = None) -> sitk.ImageFileReader | sitk.Image:
    """Read the header, and set the reader to one volume of one real number per voxel.

    Returns:
        The reader; for a NIfTI file that SimpleITK cannot read, the volume.
    """
    with reporting_os_errors(path):
        path = require_file(path, what="scan", remedy="check the path")
        path.open("rb").close()  # SimpleITK would not report why it cannot open the file
    reader, header = checked_reader(path)
    try:
        with without_itk_warnings():
            reader.ReadImageInformation()
    except RuntimeError as error:
        if header is not None:
            return _by_nibabel(path, header, channel)
        raise unreadable(path, error) from None
    *size, count = reader.GetSize()
    if reader.GetDimension() == 4 and (channel is not None or count == 1):
        channel = channel or 0
        _refuse_missing_channel(path, channel, count)
        reader.SetExtractSize((*size, 0))
        reader.SetExtractIndex((0, 0, 0, channel))
    elif reader.GetDimension() not in (2, 3):
        raise _too_many_dimensions(path, reader.GetSize()[::-1])
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if reader.GetNumberOfComponents() != 1 or "complex" in kind:
        raise InputError(f"{path} holds voxels of {kind}, expected one real number per voxel")
    return reader


def _by_nibabel(path: Path, header: Nifti1Header, channel: int | None) -> sitk.Image:
    """Read a volume that SimpleITK cannot read: NIfTI-2, or axes with an angle of rounding."""
    array = read_with_nibabel(path, header)
    if channel is not None and array.ndim == 4:
        _refuse_missing_channel(path, channel, len(array))
        array = array[channel]
    if array.ndim != 3:
        raise _too_many_dimensions(path, array.shape)
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"{path} holds voxels of {array.dtype}, expected one real number per voxel"
        )
    image = sitk.GetImageFromArray(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))
    affines = nifti_affines(path, header)
    if affines:
        geometry = _from_affine(affines[0])
        image.SetSpacing(geometry.spacing)
        image.SetOrigin(geometry.origin)
        image.SetDirection(geometry.direction)
    else:
        image.SetSpacing([abs(float(size)) or 1.0 for size in header["pixdim"][1:4]])
    return image


def _refuse_missing_channel(path: Path, channel: int, count: int) -> None:
    if channel >= count:
        raise InputError(
            f"{path} holds {count} channels, numbered 0…{count - 1}, but channel {channel} is "
            "needed; pass another --channel"
        )


def _too_many_dimensions(path: Path, shape: tuple[int, ...]) -> InputError:
    return InputError(
        f"{path} has {len(shape)} dimensions of size {shape}, expected 3 (slice, row, column) or "
        "2; save one scan per file"
    )


def _place(
    path: Path, source: sitk.Image | sitk.ImageFileReader, *, tell: bool = False
) -> Geometry:
    """Return where the voxels lie, as SimpleITK has it, unless a NIfTI header says otherwise.

    Args:
        tell: warn of a header that says two things.

    Raises:
        InputError: the axes are not at right angles.
    """
    found = geometry_of(source)
    header = nifti_header(path)
    if header is not None:
        given = [_from_affine(affine) for affine in nifti_affines(path, header)]
        used = next((one for one in given if one.matches(found)), None)
        if tell and len(given) == 2 and (differences := given[0].differences(given[1])):
            name = "qform" if used is given[1] else "sform"
            warn(f"{path} has an sform and a qform of other {'; '.join(differences)}: {name} used")
        return given[0] if given and used is None else found
    axes = np.reshape(found.direction, (3, 3))
    if skew(axes) > SKEWED or np.abs(np.linalg.norm(axes, axis=0) - 1).max() > SKEWED:
        raise InputError(
            f"{path} has axes that are not at right angles or not of length 1; {STRAIGHTEN}"
        )
    return found


def _from_affine(affine: np.ndarray) -> Geometry:
    spacing, origin, axes = straightened(affine)
    return Geometry(tuple(spacing.tolist()), tuple(origin.tolist()), tuple(axes.ravel().tolist()))


def geometry_of(source: sitk.Image | sitk.ImageFileReader) -> Geometry:
    """Return the geometry of an image, or of one volume of a 4-D file.

    Some headers hold a negative spacing. It becomes a positive spacing along the opposite axis,
    because SimpleITK reads the voxels in that way.
    """
    dimension = min(source.GetDimension(), 3)  # 2 for a single slice
    spacing, origin, axes = np.ones(3), np.zeros(3), np.eye(3)
    spacing[:dimension] = source.GetSpacing()[:3]
    origin[:dimension] = source.GetOrigin()[:3]
    full = np.reshape(source.GetDirection(), (source.GetDimension(),) * 2)
    axes[:dimension, :dimension] = full[:3, :3]
    signs = np.where(spacing < 0, -1.0, 1.0)
    return Geometry(
        spacing=tuple((spacing * signs).tolist()),
        origin=tuple(origin.tolist()),
        direction=tuple((axes * signs).ravel().tolist()),
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
