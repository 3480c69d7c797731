"""Label files that other programs read.

Segmentations are written with the geometry of their scan. Tables hold the names and colours of the
classes for ITK-SNAP and 3D Slicer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from common.errors import InputError
from common.writing import atomic_path, require_room, require_same, write_text
from datasets.colours import label_colours
from datasets.registry import DatasetSpec
from datasets.scans.files import DICOM, ScanFile
from datasets.scans.geometry import Geometry
from datasets.scans.text_headers import SEGMENTATION

if TYPE_CHECKING:
    from datasets.scans.label_names import NamedLabel

NIFTI = (".nii.gz", ".nii")
# The format of the label file where it is not the format of the scan. A DICOM series does not
# become NIfTI, because NIfTI rounds the geometry to 32 bits.
FORMATS = {".nhdr": ".nrrd", ".mhd": ".mha", DICOM: ".mha"}
NIFTI_GEOMETRY = (
    "pixdim",
    "xyzt_units",
    "qform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "sform_code",
    "srow_x",
    "srow_y",
    "srow_z",
)
NRRD_GEOMETRY = (b"space:", b"space dimension:", b"space directions:", b"space origin:")


def label_suffix(scan: ScanFile, wanted: str | None = None) -> str:
    """Return the suffix of the label file of a scan; pictures do not follow `wanted`.

    Raises:
        InputError: a segmentation of 3D Slicer is wanted of a picture, which has no place in space.
    """
    if scan.is_picture:
        if wanted == SEGMENTATION:
            raise InputError(
                f"--format {SEGMENTATION} is for scans, but {scan.path} is a picture, whose labels "
                "become an index PNG; leave --format out, or segment pictures in a call of their "
                "own"
            )
        return ".png"
    return wanted or FORMATS.get(scan.suffix, scan.suffix)


def write_labels(
    path: Path, labels: np.ndarray, scan: ScanFile, geometry: Geometry | None, spec: DatasetSpec
) -> None:
    """Write a segmentation with the label values of its data set and the geometry of its scan.

    Args:
        labels: classes (D, H, W), or (1, H, W) of a picture, uint8.
        geometry: of the scan; None for a picture.

    Names and colours are inside NIfTI (as TotalSegmentator has them) and `.seg.nrrd` files.
    """
    values = np.array((0, *spec.predicted_values))
    values = values.astype(np.uint8 if values.max() < 256 else np.uint16)
    if geometry is None:
        write_index_picture(path, labels[0], values, spec)
    else:
        from datasets.scans.label_names import named_labels

        write_like(path, values[labels], scan, geometry, named_labels(spec))


def write_like(
    path: Path,
    array: np.ndarray,
    scan: ScanFile,
    geometry: Geometry,
    names: Sequence[NamedLabel] = (),
) -> None:
    """Write (D, H, W) voxels with the geometry of a scan, or no file at all.

    In the format of the scan the geometry is copied from its header, so it is equal to the last
    bit. Another format may round it.

    Args:
        names: of the values, for formats that hold them; empty: the array holds no labels.

    Raises:
        InputError: the file cannot be written, or its geometry would differ from the scan's.
    """
    from datasets.scans.label_names import add_names, caret_extension
    from datasets.scans.volumes import read_header, refuse_other_voxels, write_volume

    both_nifti = path.name.endswith(NIFTI) and scan.suffix in NIFTI
    exact = both_nifti or path.name.endswith(label_suffix(scan))

    def finish(temporary: Path) -> None:
        if exact and path.suffix == ".nrrd":
            _copy_nrrd_geometry(temporary, scan.path)
        if names and not both_nifti:
            add_names(temporary, names, array.shape)
        _, found = read_header(temporary)
        if found != geometry if exact else not found.matches(geometry):
            differences = "; ".join(found.differences(geometry)) or "the last digits would differ"
            raise InputError(
                f"{path} would not have the geometry of {scan.path} ({differences}); pass another "
                f"--format, e.g. {'.nrrd' if path.suffix == '.mha' else '.mha'}"
            )

    if both_nifti:
        with atomic_path(path) as temporary:
            extension = caret_extension(names) if names else b""
            _write_nifti_like(temporary, array, scan.path, extension)
            finish(temporary)
            refuse_other_voxels(path, temporary, array)
    else:
        write_volume(path, array, geometry, finish)


def write_index_picture(
    path: Path, labels: np.ndarray, values: np.ndarray, spec: DatasetSpec
) -> None:
    """Write classes (H, W) as a PNG of their label values, with a palette if these fit 8 bits."""
    picture = Image.fromarray(values[labels])
    if values.dtype == np.uint8:
        palette = np.zeros((256, 3), dtype=np.uint8)
        palette[values] = label_colours(spec.class_names)
        picture.putpalette(palette.ravel().tolist())
    with atomic_path(path) as temporary:
        picture.save(temporary)
        require_room(temporary)
        try:
            with Image.open(temporary, formats=("PNG",)) as written:
                same = written.mode == picture.mode and written.tobytes() == picture.tobytes()
        except (OSError, SyntaxError, ValueError):  # as Pillow has it for damaged files
            same = False
        require_same(path, same)


def write_label_tables(folder: Path, spec: DatasetSpec) -> None:
    """Write `labels.txt` for ITK-SNAP and `labels.ctbl` for 3D Slicer."""
    from datasets.scans.label_names import named_labels

    snap = [
        "# ITK-SnAP label description file: index, red, green, blue, opacity, visible, mesh, name"
    ]
    slicer = ["# 3D Slicer colour table: index, name, red, green, blue, opacity"]
    for label in named_labels(spec):
        value, name, (r, g, b) = label.value, label.name, label.colour
        shown = int(value > 0)
        line = f'{value:5d} {r:5d} {g:4d} {b:4d} {shown:8d} {shown:2d} {shown:2d}    "{name}"'
        snap.append(line.replace("\n", " "))
        slicer.append(f"{value} {'_'.join(name.split())} {r} {g} {b} {255 * shown}")
    for file, lines in (("labels.txt", snap), ("labels.ctbl", slicer)):
        write_text(folder / file, "\n".join(lines) + "\n")


def _write_nifti_like(path: Path, array: np.ndarray, source: Path, extension: bytes) -> None:
    """Write a NIfTI file with the geometry fields of another file, bit for bit.

    Its other header fields and its extensions are not copied, because their texts may identify the
    patient.
    """
    from datasets.scans.nifti import nifti_header, write_nifti

    given = nifti_header(source)  # NIfTI-1 or NIfTI-2, and so is the label
    header = type(given)(endianness="<")
    header.set_data_dtype(array.dtype)
    is_flat = given["dim"][0] == 2  # one slice, read from a 2-D file
    header.set_data_shape(array.shape[:0:-1] if is_flat else array.shape[::-1])
    for field in NIFTI_GEOMETRY:
        header[field] = given[field]
    voxels = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    write_nifti(path, header, voxels.data, extension)


def _copy_nrrd_geometry(path: Path, source: Path) -> None:
    """Replace the geometry lines of an NRRD header with those of another file, unchanged."""
    with source.open("rb") as file:
        source_lines = _header_lines(file.read(1 << 20))
    given = [line for line in source_lines if _is_geometry(line)]
    if not any(line.lower().startswith(b"space directions:") for line in given):
        return  # without geometry in the source, SimpleITK writes the same values
    if not any(re.fullmatch(rb"dimension:\s*3\s*", line.lower()) for line in source_lines):
        return  # the source is 4-D, so its lines do not fit one channel
    content = path.read_bytes()
    head, body = content.split(b"\n\n", 1)
    lines = [line for line in head.split(b"\n") if not _is_geometry(line)]
    path.write_bytes(b"\n".join([*lines, *given]) + b"\n\n" + body)


def _header_lines(content: bytes) -> Sequence[bytes]:
    head = content.replace(b"\r\n", b"\n").split(b"\n\n", 1)[0]
    return head.split(b"\n")


def _is_geometry(line: bytes) -> bool:
    return line.lower().startswith(NRRD_GEOMETRY)
