"""The slices of a DICOM series by their own tags: place, spacing, and checks that they fit."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import InputError, first_few
from datasets.scans.dicom_pixels import COLUMNS, ROWS, count_frames
from datasets.scans.dicom_tags import INSTANCE, DicomFile, Tags
from datasets.scans.geometry import Geometry

POSITION, ORIENTATION, PIXEL_SPACING = 0x00200032, 0x00200037, 0x00280030
THICKNESS, INTERCEPT, SLOPE = 0x00180050, 0x00281052, 0x00281053
DETECTOR_SPACINGS = (0x00181164, 0x00182010)  # of X-rays and scanned films, at the detector
IMAGE_TYPE, PHOTOMETRIC, MODALITY_LUT = 0x00080008, 0x00280004, 0x00283000
SHARED, PER_FRAME, DETECTORS = 0x52009229, 0x52009230, 0x00540022
# The sequence of a frame that holds the tag.
GROUPS = {
    POSITION: 0x00209113,
    ORIENTATION: 0x00209116,
    PIXEL_SPACING: 0x00289110,
    THICKNESS: 0x00289110,
    SLOPE: 0x00289145,
    INTERCEPT: 0x00289145,
}
COUNTS = {POSITION: 3, ORIENTATION: 6, PIXEL_SPACING: 2, THICKNESS: 1, SLOPE: 1, INTERCEPT: 1}
# Tags that tell images of one place apart.
REPEATS = {
    0x00180081: "echo time",
    0x00180086: "echo number",
    0x00189087: "b-value",
    0x00200100: "temporal position",
    0x00181060: "trigger time",
    0x00200012: "acquisition number",
    0x00080008: "image type",
    0x00080032: "acquisition time",
}

SAME_PLACE = 1e-3  # mm; nearer slices have the same position
SAME_ANGLE = 1e-3  # of each cosine
UNEVEN = 0.02  # largest deviation of a distance between slices, as a share of the spacing
SHEARED = 0.1  # mm; largest distance of a slice from the normal through the first slice
ROUNDED, DECIMALS = 0.1, 1  # mm; how far rounded coordinates of two slices move to each other
CERTAIN = 0.25  # spacings; rounding is never blamed for more: a lost slice leaves a gap of two


@dataclass(frozen=True)
class Slice:
    """One slice, or one frame of a file of several."""

    file: DicomFile
    frame: int
    position: np.ndarray | None  # (3,), mm, of the centre of the first pixel
    axes: np.ndarray | None  # (6,), cosines along a row and along a column
    spacing: tuple[float, ...] | None  # mm between rows, and between columns
    thickness: float | None  # mm
    slope: float
    intercept: float

    @property
    def name(self) -> str:
        return self.file.path.name + (f" frame {self.frame}" if self.frame else "")


def slices_of(file: DicomFile) -> list[Slice]:
    """Return the slices of a file, in the order of its pixels.

    Raises:
        InputError: a tag is no number, two places in the file give different values, or pixels are
            missing.
    """
    count = count_frames(file)
    shared, frames = file.items(SHARED), file.items(PER_FRAME)
    found = []
    for frame in range(count):
        groups = [*frames[frame : frame + 1], *shared]

        def read(tag: int, groups: list[Tags] = groups) -> np.ndarray | None:
            return _value(file, tag, groups, alone=count == 1)

        spacing, axes = read(PIXEL_SPACING), read(ORIENTATION)
        if axes is not None:
            axes = _unit(file, axes)
        if spacing is not None and not (spacing > 0).all():
            raise InputError(f"{file.path} has a pixel spacing of {spacing} mm, expected above 0")
        thickness, slope, intercept = read(THICKNESS), read(SLOPE), read(INTERCEPT)
        if slope is not None and slope[0] == 0:
            raise InputError(f"{file.path} has a rescale slope of 0; export the series again")
        found.append(
            Slice(
                file=file,
                frame=frame,
                position=read(POSITION),
                axes=axes,
                spacing=None if spacing is None else tuple(spacing.tolist()),
                thickness=float(thickness[0])
                if thickness is not None and thickness[0] > 0
                else None,
                slope=1.0 if slope is None else float(slope[0]),
                intercept=0.0 if intercept is None else float(intercept[0]),
            )
        )
    return found


def _value(file: DicomFile, tag: int, groups: Sequence[Tags], *, alone: bool) -> np.ndarray | None:
    """Return the value of a tag for a frame, wherever the file gives it.

    Args:
        alone: the file holds no other frame, so that its own position, or that of its detector, is
            the frame's.
    """
    count = COUNTS[tag]
    places = [item for group in groups for item in [*file.items(GROUPS[tag], group), group]]
    if alone or tag != POSITION:
        places += [*file.items(DETECTORS), file.tags]
    try:
        values = [value for place in places if (value := file.floats(tag, count, place))]
    except ValueError as error:
        raise InputError(
            f"{file.path} has an unreadable tag ({tag >> 16:04X},{tag & 0xFFFF:04X}): {error}; "
            "export the series again"
        ) from None
    if any(not np.allclose(value, values[0], rtol=1e-3, atol=1e-3) for value in values):
        raise InputError(
            f"{file.path} gives the tag ({tag >> 16:04X},{tag & 0xFFFF:04X}) twice, as "
            f"{' and '.join(map(str, values[:2]))}; export the series again"
        )
    return np.array(values[0]) if values else None


def _unit(file: DicomFile, axes: np.ndarray) -> np.ndarray:
    """Return the axes of a slice with a length of 1."""
    lengths = np.linalg.norm(axes.reshape(2, 3), axis=1)
    if np.abs(lengths - 1).max() > 0.01 or abs(axes[:3] @ axes[3:]) > SAME_ANGLE:
        raise InputError(
            f"{file.path} has an orientation whose axes are not at right angles ({axes}); export "
            "the series again"
        )
    return axes / np.repeat(lengths, 3)


def in_order(folder: Path, slices: Sequence[Slice]) -> tuple[list[Slice], Geometry]:
    """Order the slices of a series along their normal.

    Returns:
        The slices, and the geometry that their tags give.

    Raises:
        InputError: slices do not fit each other, or are missing, duplicated or unevenly spaced.
    """
    _refuse_mixed(folder, slices)
    if len(slices) == 1:
        return list(slices), _geometry_of_one(slices[0])
    for what, bare in (
        ("position and orientation", [s for s in slices if s.position is None or s.axes is None]),
        ("pixel spacing", [s for s in slices if s.spacing is None]),
    ):
        if bare:
            one_file = len({s.file.path for s in slices}) == 1
            raise InputError(
                f"{folder} has slices without a {what}: {first_few([s.name for s in bare])}; "
                + (
                    "convert the file with dcm2niix or 3D Slicer and pass what they write"
                    if one_file
                    else "if they are separate pictures, put each into a folder of its own"
                )
            )
    axes = slices[0].axes
    normal = np.cross(axes[:3], axes[3:])
    ordered = sorted(slices, key=lambda one: one.position @ normal)
    positions = np.array([one.position for one in ordered])  # (N, 3)
    _refuse_repeated(folder, ordered, positions @ normal)
    moved = _refuse_uneven(folder, positions, normal)
    gap = float((positions[-1] - positions[0]) @ normal) / (len(ordered) - 1)
    rounding = (moved, moved / (len(ordered) - 1))
    return ordered, _geometry(ordered[0], ordered[0].spacing, gap, rounding)


def _geometry(
    first: Slice, spacing: Sequence[float], gap: float, rounding: tuple[float, float] = (0.0, 0.0)
) -> Geometry:
    axes = np.array([first.axes[:3], first.axes[3:], np.cross(first.axes[:3], first.axes[3:])])
    return Geometry(
        spacing=(spacing[1], spacing[0], gap),
        origin=tuple(first.position.tolist()),
        direction=tuple(axes.T.ravel().tolist()),
        rounding=rounding,
    )


def _geometry_of_one(one: Slice) -> Geometry:
    """Return the geometry of a single slice; what its tags do not give is as in `unknown`."""
    spacing = one.spacing or spacing_at_detector(one.file) or (1.0, 1.0)
    gap = one.thickness or 1.0
    if one.position is None or one.axes is None:
        return replace(Geometry.unknown(), spacing=(spacing[1], spacing[0], gap))
    return _geometry(one, spacing, gap)


def spacing_at_detector(file: DicomFile) -> tuple[float, ...] | None:
    """Return the spacing (rows, columns) of an X-ray or scanned film in mm, if it is given."""
    for tag in DETECTOR_SPACINGS:
        try:
            if (spacing := file.floats(tag, 2)) and min(spacing) > 0:
                return spacing
        except ValueError:
            continue
    return None


def _refuse_mixed(folder: Path, slices: Sequence[Slice]) -> None:
    """Refuse slices that differ from most of their series in what the whole series must share."""
    same: dict[str, Callable[[Slice], tuple]] = {
        "size": lambda one: (one.file.whole(ROWS), one.file.whole(COLUMNS)),
        "photometric interpretation": lambda one: (one.file.text(PHOTOMETRIC),),
        "orientation": lambda one: () if one.axes is None else tuple(one.axes),
        "pixel spacing": lambda one: one.spacing or (),
    }
    for what, read in same.items():
        values = [read(one) for one in slices]
        usual = Counter(values).most_common(1)[0][0]
        odd = [one for one, value in zip(slices, values, strict=True) if not _alike(value, usual)]
        if not odd:
            continue
        scouts = all("LOCALIZER" in one.file.text(IMAGE_TYPE).upper() for one in odd)
        raise InputError(
            f"{folder} has slices whose {what} differs from the other slices' ({_shown(usual)}): "
            f"{first_few([f'{one.name} ({_shown(read(one))})' for one in odd])}; "
            + ("they are localizer images (scouts): " if scouts else "")
            + "put them into a separate folder"
        )


def _alike(value: tuple, usual: tuple) -> bool:
    if len(value) != len(usual) or any(isinstance(part, str) for part in value):
        return value == usual
    return bool(np.allclose(value, usual, rtol=SAME_ANGLE, atol=SAME_ANGLE * max(usual, default=1)))


def _shown(value: tuple) -> str:
    parts = [part if isinstance(part, str) else f"{part:.4g}" for part in value]
    return " × ".join(parts) if len(parts) < 3 else ", ".join(parts)


def _refuse_repeated(folder: Path, ordered: Sequence[Slice], along: np.ndarray) -> None:
    """Refuse slices at one place, and say what tells them apart."""
    places = defaultdict(list)
    place = 0
    for index, one in enumerate(ordered):
        place += index > 0 and along[index] - along[index - 1] >= SAME_PLACE
        places[place].append(one)
    twice = {key: same for key, same in places.items() if len(same) > 1}
    if not twice:
        return
    where = [f"{same[0].position @ np.cross(same[0].axes[:3], same[0].axes[3:]):.2f} mm"
             for same in twice.values()]  # fmt: skip
    start = f"{folder} has duplicate slices at {first_few(where)}"
    pair = next(iter(twice.values()))
    instances = [(one.file.text(INSTANCE), one.frame) for one in pair]
    if len(set(instances)) == 1:
        raise InputError(
            f"{start}: {first_few([one.name for one in pair])} are copies of one image; remove one "
            "of each pair"
        )
    if {len(same) for same in places.values()} == {len(pair)}:
        by = _told_apart(pair)
        apart = "put each of them into a separate folder"
        if len({one.file.path for one in ordered}) == 1:
            apart = "write each of them into a file of its own, e.g. with dcm2niix, and pass one"
        raise InputError(
            f"{start}: each position is there {len(pair)} times, as in a series of several "
            f"phases, echoes or time points{by}; {apart}"
        )
    raise InputError(f"{start}: {first_few([one.name for one in pair])}; remove one of each pair")


def _told_apart(same: Sequence[Slice]) -> str:
    """Return how the images of one place differ, e.g. ` (their echo time is 4, 8)`."""
    for tag, name in REPEATS.items():
        values = [one.file.text(tag) for one in same]
        if all(values) and len(set(values)) == len(values):
            return f" (their {name} is {first_few(sorted(values))})"
    return ""


def _refuse_uneven(folder: Path, positions: np.ndarray, normal: np.ndarray) -> float:
    """Refuse missing slices, uneven distances, and slices shifted against each other.

    Some scanners round positions to 0.1 mm. Then distances of 0.6, 0.6 and 0.7 mm are even.

    Returns:
        How far rounding may have moved the slices, mm.
    """
    along = positions @ normal
    gaps = np.diff(along)
    mean, usual = float(gaps.mean()), float(np.median(gaps))
    rounded = np.allclose(positions, positions.round(DECIMALS), rtol=0, atol=1e-6)
    slack = ROUNDED * float(np.abs(normal).sum()) + SAME_PLACE if rounded else 0.0
    most = max(UNEVEN * mean, min(slack, CERTAIN * mean))
    drift = np.abs(along - np.linspace(along[0], along[-1], len(along))).max()
    if np.abs(gaps - mean).max() > most or drift > CERTAIN * mean:
        off = np.abs(gaps - usual)
        where = [
            f"between {along[i]:.2f} and {along[i + 1]:.2f} mm"
            for i in np.flatnonzero(off > min(most, 0.999 * off.max()))
        ]
        raise InputError(
            f"{folder} has missing or unevenly spaced slices: {first_few(where)}, expected a "
            f"distance of {usual:.2f} mm; complete the series"
        )
    beside = positions - positions[0] - np.outer(along - along[0], normal)
    if np.linalg.norm(beside, axis=1).max() > SHEARED + slack:
        raise InputError(
            f"{folder} was scanned with a tilted gantry, so its slices are shifted against each "
            "other; resample the scan to a straight grid first, e.g. with dcm2niix, and pass what "
            "it writes"
        )
    return slack if np.abs(gaps - mean).max() > UNEVEN * mean else 0.0
