"""Segmentations as other programs read them: label files in the scan's own geometry, and the
tables of names and colours of ITK-SNAP and 3D Slicer.
"""

from __future__ import annotations

import contextlib
import gzip
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nibabel import Nifti1Header
from PIL import Image

from common.errors import InputError
from common.files import atomic_path
from datasets.colours import label_colours
from datasets.registry import DatasetSpec
from datasets.scans.files import DICOM, ScanFile
from datasets.scans.volumes import Geometry, read_header, unpacked, write_volume

NIFTI = (".nii.gz", ".nii")
# What a segmentation of another format is written as; the others keep theirs. NIfTI rounds
# geometry to 32 bits, which a DICOM series' is not.
FORMATS = {".nhdr": ".nrrd", ".mhd": ".mha", DICOM: ".mha"}
NIFTI_GEOMETRY = (
    *("pixdim", "xyzt_units", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x"),
    *("qoffset_y", "qoffset_z", "sform_code", "srow_x", "srow_y", "srow_z"),
)
GZIP_LEVEL = 1  # labels shrink a hundredfold all the same
NRRD_GEOMETRY = (b"space:", b"space dimension:", b"space directions:", b"space origin:")


def label_suffix(scan: ScanFile, wanted: str | None = None) -> str:
    """The suffix of a scan's label file."""
    if scan.is_picture:
        return ".png"
    return wanted or FORMATS.get(scan.suffix, scan.suffix)


def write_labels(
    path: Path, labels: np.ndarray, scan: ScanFile, geometry: Geometry | None, spec: DatasetSpec
) -> None:
    """Write a segmentation with the values of its data set, where the scan lay.

    In the scan's own format the geometry is the scan's to the last bit: what its header says is
    taken over, not computed anew.

    Args:
        labels: classes (D, H, W), of a picture (1, H, W), uint8.
        geometry: of the scan; None: a picture.
    """
    values = np.array((0, *spec.predicted_values))
    values = values.astype(np.uint8 if values.max() < 256 else np.uint16)
    if geometry is None:
        write_index_picture(path, labels[0], values, spec)
    else:
        write_like(path, values[labels], scan, geometry)


def write_like(path: Path, array: np.ndarray, scan: ScanFile, geometry: Geometry) -> None:
    """Write (D, H, W) voxels where the scan lies, or nothing.

    Where the formats agree its header's geometry is taken over; another format may round it.

    Raises:
        InputError: the file cannot be written, or would not lie where the scan lies.
    """
    both_nifti = path.name.endswith(NIFTI) and scan.suffix in NIFTI
    exact = both_nifti or path.name.endswith(label_suffix(scan))

    def finish(temporary: Path) -> None:
        if exact and path.suffix == ".nrrd":
            _take_over_nrrd_geometry(temporary, scan.path)
        _, found = read_header(temporary)
        if found != geometry if exact else not found.matches(geometry):
            told = "; ".join(found.differences(geometry)) or "its last digits are lost"
            raise InputError(
                f"{path} would not lie where {scan.path} lies ({told}); pass another --format, "
                f"{'.nrrd' if path.suffix == '.mha' else '.mha'}"
            )

    if both_nifti:
        with atomic_path(path) as temporary:
            _write_nifti_like(temporary, array, scan.path)
            finish(temporary)
    else:
        write_volume(path, array, geometry, finish)


def write_index_picture(
    path: Path, labels: np.ndarray, values: np.ndarray, spec: DatasetSpec
) -> None:
    """Write classes (H, W) as a PNG of their values, in their colours where they fit a palette."""
    picture = Image.fromarray(values[labels])
    if values.dtype == np.uint8:
        palette = np.zeros((256, 3), dtype=np.uint8)
        palette[values] = label_colours(spec.num_classes)
        picture.putpalette(palette.ravel().tolist())
    with atomic_path(path) as temporary:
        picture.save(temporary)


def write_label_tables(folder: Path, spec: DatasetSpec) -> None:
    """Write `labels.txt` for ITK-SNAP and `labels.ctbl` for 3D Slicer."""
    colours = label_colours(spec.num_classes).tolist()
    rows = list(zip((0, *spec.predicted_values), ("background", *spec.class_names), colours,
                    strict=True))  # fmt: skip
    snap = [
        "# ITK-SnAP label description file: index, red, green, blue, opacity, visible, mesh, name",
        *(
            f"{value:5d} {r:5d} {g:4d} {b:4d} {int(value > 0):8d} {int(value > 0):2d} "
            f'{int(value > 0):2d}    "{name}"'.replace("\n", " ")
            for value, name, (r, g, b) in rows
        ),
    ]
    slicer = [
        "# 3D Slicer colour table: index, name, red, green, blue, opacity",
        *(
            f"{value} {'_'.join(name.split())} {r} {g} {b} {255 * (value > 0)}"
            for value, name, (r, g, b) in rows
        ),
    ]
    for file, lines in (("labels.txt", snap), ("labels.ctbl", slicer)):
        with atomic_path(folder / file) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_nifti_like(path: Path, array: np.ndarray, source: Path) -> None:
    """Write a NIfTI file with the geometry fields of another: their bits, signs included.

    Nothing else of its header goes along: its texts may tell of the patient.
    """
    with unpacked(source) as stream:
        start = stream.read(Nifti1Header.sizeof_hdr)  # SimpleITK reads no NIfTI-2
    given = Nifti1Header(start, check=False)  # a check would mend the signs
    header = Nifti1Header(endianness="<")
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape[::-1])
    for field in NIFTI_GEOMETRY:
        header[field] = given[field]
    header["vox_offset"] = Nifti1Header.single_vox_offset
    voxels = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("wb"))
        if path.suffix == ".gz":  # without name and time, so that equal labels are equal files
            file = stack.enter_context(gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0))
        file.write(header.binaryblock.ljust(header.single_vox_offset, b"\0"))
        file.write(voxels.data)


def _take_over_nrrd_geometry(path: Path, source: Path) -> None:
    """Replace the geometry lines of an NRRD header by those of another, as they stand."""
    with source.open("rb") as file:
        theirs = _header_lines(file.read(1 << 20))
    given = [line for line in theirs if _is_geometry(line)]
    if not any(line.lower().startswith(b"space directions:") for line in given):
        return  # it has none: SimpleITK's says the same
    if not any(re.fullmatch(rb"dimension:\s*3\s*", line.lower()) for line in theirs):
        return  # of one more axis: a channel was chosen
    content = path.read_bytes()
    head, body = content.split(b"\n\n", 1)
    lines = [line for line in head.split(b"\n") if not _is_geometry(line)]
    path.write_bytes(b"\n".join([*lines, *given]) + b"\n\n" + body)


def _header_lines(content: bytes) -> Sequence[bytes]:
    head = content.replace(b"\r\n", b"\n").split(b"\n\n", 1)[0]
    return head.split(b"\n")


def _is_geometry(line: bytes) -> bool:
    return line.lower().startswith(NRRD_GEOMETRY)
