"""What users bring to be segmented: scan files, DICOM series, pictures; found and read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from PIL import Image

from safe_io import InputError, MissingFileError, first_few, safe_name, warn
from volumes import Geometry, geometry_of, quiet, read_header, read_volume, readable

SCANS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
DICOM = "dicom"
EXPECTED = f"{', '.join((*SCANS, *PICTURES))} or a folder of DICOM files"
POSITION, ORIENTATION = "0020|0032", "0020|0037"  # DICOM tags of a slice
SAME_PLACE = 1e-3  # mm: nearer slices are one
UNEVEN = 0.02  # of the spacing: what the distances of slices may differ by
SHEARED = 0.1  # mm: how far a slice may lie beside the normal through the first


@dataclass(frozen=True)
class ScanFile:
    """One thing to segment: a file, or the folder of one DICOM series."""

    name: str  # of what is written for it
    path: Path
    suffix: str  # the format, or DICOM
    channel: int | None = None  # which 3-D volume of a 4-D file; None: it is 3-D

    @property
    def is_picture(self) -> bool:
        return self.suffix in PICTURES


def find_scans(path: str | Path) -> list[ScanFile]:
    """The scans that a path means: a file, a DICOM series, or a folder of either.

    DICOM series are found at any depth, as archives export them (patient/study/series), and named
    by their path below the folder.

    Raises:
        MissingFileError: nothing is there.
        InputError: no scan in it, an unknown format, or two of one name.
    """
    path = Path(path)
    if path.is_file():
        suffix = suffix_of(path)
        if suffix is None:
            raise InputError(f"{path} is no scan or picture by its name; expected {EXPECTED}")
        return [scan_file(path, suffix)]
    if not path.is_dir():
        raise MissingFileError(f"{path} does not exist; expected {EXPECTED}")
    inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    found = [scan_file(p, suffix) for p in inside if p.is_file() and (suffix := suffix_of(p))]
    if _holds_dicom(inside):
        if found:
            others = first_few([scan.path.name for scan in found])
            raise InputError(
                f"{path} holds DICOM slices beside {others}; put them into a folder of their own"
            )
        return [scan_file(path.resolve(), DICOM)]
    for below in sorted(p for p in path.rglob("*") if p.is_dir() and _holds_dicom(p.iterdir())):
        parts = below.relative_to(path).parts
        if not any(part.startswith(".") for part in parts):
            found.append(ScanFile(safe_name("_".join(parts), source=path), below, DICOM))
    if not found:
        raise InputError(f"{path} holds no scan; expected {EXPECTED}")
    names: dict[str, list[str]] = defaultdict(list)
    for scan in found:
        names[scan.name].append(scan.path.name)
    doubled = [" and ".join(files) for files in names.values() if len(files) > 1]
    if doubled:
        raise InputError(
            f"{path} holds {first_few(doubled)}, whose results would have one name; rename them"
        )
    return found


def of_channel(scans: Sequence[ScanFile], channel: int | None) -> list[ScanFile]:
    """What is to be read where the data set has several channels and one was trained on.

    Of files that are named as nnU-Net's channels (`NAME_0000`, `NAME_0001`) those of the channel,
    of 4-D files that volume.

    Args:
        channel: from 0; None: all scans as they are.
    """
    if channel is None:
        return list(scans)
    parts = [re.fullmatch(r"(.+)_(\d{4})", scan.name) for scan in scans]
    has = {match[1] for match in parts if match and int(match[2]) == channel}
    chosen = [
        replace(scan, channel=channel)
        for scan, match in zip(scans, parts, strict=True)
        if match is None or match[1] not in has or int(match[2]) == channel
    ]
    others = [s.name for s in chosen if re.search(r"_000\d$", s.name)
              and not s.name.endswith(f"_{channel:04d}")]  # fmt: skip
    if others:
        warn(f"channel {channel} was trained on; by their names of another: {first_few(others)}")
    return chosen


def suffix_of(path: Path) -> str | None:
    """The known suffix that a file name ends with."""
    name = path.name.lower()
    return next((suffix for suffix in (*SCANS, *PICTURES) if name.endswith(suffix)), None)


def scan_file(path: Path, suffix: str, channel: int | None = None) -> ScanFile:
    """One scan, named as its file without the suffix."""
    name = path.name if suffix == DICOM else path.name[: -len(suffix)]
    return ScanFile(safe_name(name, source=path.parent), path, suffix, channel)


def read_scan(scan: ScanFile) -> tuple[np.ndarray, Geometry | None]:
    """Read one scan, whatever its format.

    Returns:
        (D, H, W) voxels in the file's dtype with their geometry; of a picture (1, H, W) or, in
        colour, (1, 3, H, W) and None.

    Raises:
        InputError: it is damaged, of more than one value a voxel, or a series with missing,
            doubled or uneven slices.
    """
    if scan.is_picture:
        return read_picture(scan.path), None
    if scan.suffix == DICOM:
        return read_dicom(scan.path)
    return read_volume(scan.path, scan.channel)


def read_scan_header(scan: ScanFile) -> tuple[tuple[int, ...], Geometry | None]:  # (D, H, W)
    """Shape and geometry of a scan without its voxels; raises as `read_scan` does."""
    if scan.is_picture:
        with _picture(scan.path) as picture:
            return (1, picture.height, picture.width), None
    if scan.suffix == DICOM:
        files = dicom_files(scan.path)
        shape, first = read_header(files[0])
        if len(files) == 1:
            return shape, first
        origins = [np.array(read_header(file)[1].origin) for file in files[:2]]
        gap = float(np.linalg.norm(origins[1] - origins[0]))
        spacing = (*first.spacing[:2], gap)
        return (len(files), *shape[1:]), Geometry(spacing, first.origin, first.direction)
    return read_header(scan.path, scan.channel)


def read_picture(path: Path) -> np.ndarray:
    """Read a picture: (1, H, W), or (1, 3, H, W) in colour; uint8 or uint16.

    Opacity is dropped, and colour that is grey everywhere is read as grey. Sixteen-bit pictures
    keep their values.
    """
    with _picture(path) as picture:
        if picture.mode in ("P", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "PA", "RGBX"):
            picture = picture.convert("RGB")
        elif picture.mode in ("LA", "1", "La"):
            picture = picture.convert("L")
        array = np.asarray(picture)
    if array.ndim == 3:
        array = array.transpose(2, 0, 1)
        if (array == array[:1]).all():
            array = array[0]
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{path} holds NaN or infinite values; export it again")
    if array.dtype.kind == "i" and array.min() >= 0 and array.max() < 65536:
        array = array.astype(np.uint16)  # as Pillow reads sixteen bits of grey
    return np.ascontiguousarray(array[None])


def read_index_picture(path: Path) -> np.ndarray:  # (1, H, W) uint8 or wider
    """Read a label picture: the index or grey value of each pixel.

    Raises:
        InputError: it is damaged, of a format that changes values, or of colours that are no
            indices.
    """
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise InputError(
            f"label {path} is a JPEG, which blurs values into others; export the labels as PNG"
        )
    with _picture(path) as picture:
        if picture.mode not in ("P", "L", "1", "I", "I;16"):
            raise InputError(
                f"{path} is a picture of mode {picture.mode}, expected class indices (a palette or "
                "grey PNG whose values are 0 for background, then the classes); convert it"
            )
        array = np.asarray(picture)
    return np.ascontiguousarray(
        array[None].astype(np.uint8 if array.dtype == bool else array.dtype)
    )


class _picture:
    """An opened and decoded picture; whatever a damaged one raises becomes one sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Image.Image:
        if not self.path.is_file():
            raise MissingFileError(f"picture {self.path} does not exist; check the path")
        try:
            self.image = Image.open(self.path)
            if getattr(self.image, "n_frames", 1) > 1:
                raise ValueError(f"it holds {self.image.n_frames} pictures, expected one")
            self.image.load()
        except Exception as error:  # on damaged bytes the decoders raise nearly anything
            raise InputError(
                f"{self.path} is not a readable picture ({str(error)[:160]}); export it again"
            ) from None
        return self.image

    def __exit__(self, *_: object) -> None:
        self.image.close()


def read_dicom(folder: Path) -> tuple[np.ndarray, Geometry]:  # (D, H, W)
    """Read the one series of a folder, ordered by position.

    Raises:
        InputError: several series, or slices that are missing, doubled or unevenly spaced.
    """
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in dicom_files(folder)])
    with readable(folder):
        image = reader.Execute()
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetDimension() != 3:
        raise InputError(f"{folder} holds colour or moving DICOM, expected one value a voxel")
    return sitk.GetArrayFromImage(image), geometry_of(image)


def dicom_files(folder: Path) -> list[Path]:
    """The slices of a folder's one series, by their place along its normal, which must be even."""
    with readable(folder), quiet():
        series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        if len(series) > 1:
            raise InputError(
                f"{folder} holds {len(series)} DICOM series: {first_few(list(series))}; put each "
                "into a folder of its own"
            )
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), *series[:1])
    if not names:
        raise InputError(f"{folder} holds no readable DICOM series; export it again")
    files = [Path(name) for name in names]
    axes, positions = zip(*(_place(file) for file in files), strict=True)
    turned_away = [
        f.name for f, own in zip(files, axes, strict=True) if abs(own - axes[0]).max() > 1e-3
    ]
    if turned_away:
        raise InputError(
            f"{folder} has slices turned against the first: {first_few(turned_away)}; remove them"
        )
    return _in_order(folder, files, np.array(positions), np.cross(axes[0][:3], axes[0][3:]))


def _in_order(
    folder: Path, files: Sequence[Path], positions: np.ndarray, normal: np.ndarray
) -> list[Path]:
    along = positions @ normal
    order = np.argsort(along)
    along, positions = along[order], positions[order]
    gaps = np.diff(along)
    doubled = [f"{along[i]:.2f} mm" for i in np.flatnonzero(gaps < SAME_PLACE)]
    if doubled:
        raise InputError(f"{folder} has doubled slices at {first_few(doubled)}; remove one of each")
    usual = float(np.median(gaps)) if gaps.size else 1.0
    uneven = np.flatnonzero(np.abs(gaps - usual) > UNEVEN * usual)
    if uneven.size:
        where = [f"between {along[i]:.2f} and {along[i + 1]:.2f} mm" for i in uneven]
        raise InputError(
            f"{folder} has slices missing or unevenly spaced: {first_few(where)}, where "
            f"{usual:.2f} mm are usual; complete the series"
        )
    beside = positions - positions[0] - np.outer(along - along[0], normal)
    if np.linalg.norm(beside, axis=1).max() > SHEARED:
        raise InputError(
            f"{folder} was scanned with a tilted gantry (its slices lie askew); resample it to a "
            "straight grid first"
        )
    return [files[i] for i in order]


def _place(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Axes (6,) and position (3,) of a DICOM slice."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        with quiet():
            reader.ReadImageInformation()
        axes, position = (
            np.array([float(v) for v in reader.GetMetaData(tag).split("\\")])
            for tag in (ORIENTATION, POSITION)
        )
        if axes.shape != (6,) or position.shape != (3,) or reader.GetSize()[2:] not in ((), (1,)):
            raise ValueError
    except (RuntimeError, ValueError):
        raise InputError(
            f"{file} has no readable position and orientation of one slice; export the series again"
        ) from None
    return axes, position


def _holds_dicom(paths: Sequence[Path]) -> bool:
    """Whether one of the files starts as DICOM does."""
    for path in sorted(paths):
        if path.is_file() and path.name != "DICOMDIR":  # an archive's table of contents
            try:
                with path.open("rb") as file:
                    if file.read(132)[128:] == b"DICM":
                        return True
            except OSError:
                continue
    return False
