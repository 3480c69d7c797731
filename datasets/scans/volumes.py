"""Reading and writing of scans with their geometry, so that a prediction lies where its scan lies.

Arrays are (slice, row, column). Geometry is in SimpleITK's order (x, y, z). Both orders are those
of `SimpleITK.GetArrayFromImage` and `GetSpacing`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nibabel import Nifti1Header

from common.errors import InputError, warn
from common.files import require_file
from common.names import utf8_path
from common.writing import atomic_path, require_room, require_same
from datasets.scans.errors import (
    reporting_itk_errors,
    reporting_os_errors,
    short_reason,
    unreadable,
    without_itk_warnings,
)
from datasets.scans.formats import checked_reader, refuse_bad_voxels
from datasets.scans.geometry import SKEWED, Geometry, geometry_of
from datasets.scans.nifti import (
    STRAIGHTEN,
    nifti_affines,
    nifti_header,
    read_with_nibabel,
    refuse_bad_slices,
    skew,
    straightened,
    unpacked,
)

# Formats that SimpleITK writes as two files, of which only one could get its name at once.
TWO_FILES = (".mhd", ".nhdr", ".hdr", ".img", ".img.gz")


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
    image = _read(path, channel)
    array = sitk.GetArrayFromImage(image)
    array = array[None] if array.ndim == 2 else array
    if array.dtype.kind == "f":
        bad = [index for index, plane in enumerate(array) if not np.isfinite(plane).all()]
        refuse_bad_slices(path, bad, len(array))
    return array, _place(path, image, tell=True)


def read_layers(path: Path) -> tuple[np.ndarray, Geometry]:  # (layers, D, H, W)
    """Read a file whose voxels may have several values, as layers of a segmentation have them.

    Raises as `read_volume` does.
    """
    image = _read(path, layered=True)
    array = sitk.GetArrayFromImage(image)
    array = array[None] if image.GetNumberOfComponentsPerPixel() == 1 else np.moveaxis(array, -1, 0)
    return (array[:, None] if array.ndim == 3 else array), _place(path, image, tell=True)


def read_header(
    path: str | Path, channel: int | None = None, *, layered: bool = False
) -> tuple[tuple[int, ...], Geometry]:  # (D, H, W)
    """Read shape and geometry of a scan without its voxels; raises as `read_volume` does.

    Args:
        layered: whether voxels may have several values, see `read_layers`.
    """
    source = _open(path, channel, layered=layered)
    return (1, *source.GetSize()[2::-1])[-3:], _place(Path(path), source)


def write_volume(
    path: str | Path,
    array: np.ndarray,
    geometry: Geometry,
    finish: Callable[[Path], object] | None = None,
) -> None:
    """Write (D, H, W) voxels in their dtype, with their geometry; whole or not at all.

    SimpleITK does not tell of a full disk in every format, so the file is read back.

    Args:
        finish: changes or checks the temporary file before it gets its final name.

    Raises:
        InputError: the array is not 3-D, scan formats cannot hold its dtype, the suffix is not the
            suffix of a format with one file, or the file cannot be written.
    """
    if str(path).lower().endswith(TWO_FILES):
        raise InputError(
            f"cannot write {path}: the format has two files; choose one that has a single file, "
            "e.g. .nii.gz, .nrrd or .mha"
        )
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
    with without_itk_warnings(), atomic_path(path) as temporary:
        try:
            sitk.WriteImage(image, temporary, useCompression=True)
        except RuntimeError as error:
            if temporary.exists():
                require_room(temporary)  # tells the reason if it is a full disk
            raise InputError(
                f"cannot write {path} ({short_reason(error)}); check that the folder is writable "
                "and that the name has the suffix of a scan, e.g. .nii.gz"
            ) from None
        if finish is not None:
            require_room(temporary)
            finish(temporary)
        refuse_other_voxels(path, temporary, array)


def refuse_other_voxels(path: str | Path, temporary: Path, array: np.ndarray) -> None:
    """Raise an error if a file that was just written does not hold these voxels (D, H, W).

    Args:
        path: the name that the file will get.

    Raises:
        InputError: it reads back differently.
        OSError: the disk is full.
    """
    require_room(temporary)
    try:
        same = all(
            np.asarray(given, found.dtype).tobytes() == found.tobytes()  # NaN equals NaN
            for given, found in zip(array, _written_planes(temporary, array.shape), strict=True)
        )
    except (InputError, OSError, EOFError, ValueError, zlib.error):
        same = False
    require_same(path, same)


def _written_planes(path: Path, shape: tuple[int, ...]) -> Iterator[np.ndarray]:  # (H, W)
    """Yield the slices of a file that was written with this shape."""
    header = nifti_header(path)
    if header is None:
        image = _read(path)
        yield from sitk.GetArrayViewFromImage(image).reshape(shape)
        return
    dtype = header.get_data_dtype()
    with unpacked(path) as file:  # faster than SimpleITK, and compares the checksum at its end
        file.read(int(header["vox_offset"]))
        while content := file.read(dtype.itemsize * shape[1] * shape[2]):
            yield np.frombuffer(content, dtype).reshape(shape[1:])


def _read(path: Path, channel: int | None = None, *, layered: bool = False) -> sitk.Image:
    """Read all voxels, or those of one channel."""
    source = _open(path, channel, layered=layered)
    if not isinstance(source, sitk.ImageFileReader):
        return source
    refuse_bad_voxels(Path(path))
    with reporting_itk_errors(path):
        return source.Execute()


def _open(
    path: str | Path, channel: int | None = None, *, layered: bool = False
) -> sitk.ImageFileReader | sitk.Image:
    """Read the header, and set the reader to one volume of one real number per voxel.

    Args:
        layered: allow several numbers per voxel.

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
    if (reader.GetNumberOfComponents() != 1 and not layered) or "complex" in kind:
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
