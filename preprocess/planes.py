"""The plane of the slices: across the thick axis of the scans, or as `--plane` says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from common.errors import InputError, first_few, warn
from datasets.registry import DatasetSpec
from datasets.scans.geometry import Geometry
from datasets.scans.orientation import orientation_of
from datasets.scans.planes import PLANES, is_cut_across, plane_across, taken_plane
from preprocess.flags import AUTO_PLANE, DESCRIBED_PLANE, STORED_PLANE
from preprocess.jobs import Job, turned

OBLONG_SLICE = 4  # A slice that is so much longer than wide was probably cut across a wrong axis.

Header = tuple[tuple[int, ...], Geometry | None]  # shape (D, H, W) and geometry; None: a picture


def with_plane(jobs: Sequence[Job], headers: Sequence[Header], plane: str) -> list[Job]:
    """Return the jobs with the orientation whose slices lie in the plane of the data set.

    The slices of known data sets, whose orientation is None, stay as they are stored unless the
    user names a plane.

    Args:
        headers: of the image of each job.
        plane: value of `--plane`, or `DESCRIBED_PLANE`.

    Raises:
        InputError: the scans were taken in different planes and the user names none, or the data
            set holds pictures and the user names a plane.
    """
    spec = jobs[0].spec
    if spec.is_pictures:
        if plane not in (AUTO_PLANE, DESCRIBED_PLANE):
            raise InputError(f"--plane is {plane}, but pictures have no other plane; leave it out")
        return list(jobs)
    if plane == STORED_PLANE:
        spec = replace(spec, orientation=None)
    elif plane == DESCRIBED_PLANE:
        pass
    elif plane != AUTO_PLANE:
        spec = replace(spec, orientation=PLANES[plane])
    elif spec.orientation is not None:
        spec = replace(spec, orientation=PLANES[_common_plane(jobs, headers)])
    chosen = [replace(job, spec=spec) for job in jobs]
    _tell(chosen, headers)
    return chosen


def _common_plane(jobs: Sequence[Job], headers: Sequence[Header]) -> str:
    """Return the plane in which the scans were taken; axial if they were taken in no plane."""
    found: dict[str, list[str]] = {}
    for job, (shape, geometry) in zip(jobs, headers, strict=True):
        if geometry and (plane := taken_plane(shape, geometry)):
            found.setdefault(plane, []).append(job.name)
    if len(found) > 1:
        parts = "; ".join(f"{len(n)} {plane} ({first_few(n)})" for plane, n in found.items())
        raise InputError(
            f"the scans were taken in different planes: {parts}; prepare each plane as a data set "
            "of its own, or pass --plane axial, coronal or sagittal to cut all of them alike, or "
            "--plane stored to cut each across the last axis of its file"
        )
    return next(iter(found), "axial")


def _tell(jobs: Sequence[Job], headers: Sequence[Header]) -> None:
    """Print the plane of the slices if it is not axial; warn about slices that look wrong."""
    orientation = jobs[0].spec.orientation
    oblong, long = [], []
    for job, (shape, geometry) in zip(jobs, headers, strict=True):
        shape, place = turned(shape, geometry, orientation)
        _, rows, columns = shape
        if place and is_cut_across(shape, place):
            _, *pixel = place.voxel_spacing
            oblong.append(f"{job.name} {pixel[0]:.3g} × {pixel[1]:.3g} mm")
        elif max(rows, columns) > OBLONG_SLICE * min(rows, columns):
            long.append(f"{job.name} {rows} × {columns}")
    if orientation is not None and (plane := plane_across(orientation[2])) != "axial":
        print(f"the slices are {plane} ({orientation}); --plane chooses another plane")
    remedy = "--plane axial, coronal or sagittal chooses the plane of the slices"
    if oblong:
        warn(
            f"{len(oblong)} of {len(jobs)} scans were taken in another plane than their slices, "
            f"which have pixels of {first_few(oblong, 3)}; {remedy}"
        )
    if long:
        warn(
            f"the slices of {len(long)} of {len(jobs)} scans are very oblong: "
            f"{first_few(long, 3)} pixels; {remedy}"
        )


def with_common_orientation(
    spec: DatasetSpec, geometries: Sequence[Geometry | None]
) -> DatasetSpec:
    """Return the spec with the orientation that all scans have, if they are not turned.

    `predict.py` then turns other scans to the orientation of the training data.
    """
    if spec.orientation is not None or spec.is_pictures:
        return spec
    found = {orientation_of(geometry) for geometry in geometries if geometry}
    if len(found) > 1:
        warn(
            f"the scans have different orientations ({first_few(sorted(found))}) and are not "
            "turned to one of them"
        )
    return replace(spec, orientation=found.pop() if len(found) == 1 else None)
