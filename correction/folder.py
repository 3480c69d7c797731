"""The folder of corrected scans, which `python -m preprocess.prepare --input` takes as it is.

| path | content |
| --- | --- |
| `images/NAME.nii.gz` | the scan's file; of a DICOM series `images/NAME/` with its slices |
| `labels/NAME.nii.gz` | the corrected labels, as `predict.py` writes labels |
| `dataset_spec.json` | what the network calls its classes, and how it saw the scan |

The description makes a network that is trained on the folder go on with the same classes, also with
those that no corrected scan shows, on slices of the same intensities and orientation.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from common.errors import NOT_WRITABLE, InputError, cannot_write, first_few
from common.files import make_folder, read_json
from common.locks import only_user
from common.names import safe_name
from common.writing import (
    atomic_path,
    flush_file,
    flush_folder,
    partial_name,
    remove_partials,
    write_json,
)
from common.written import Written
from datasets.registry import SPEC_FILE, DatasetSpec, spec_from_json
from datasets.scans.dicom import holds_dicom
from datasets.scans.files import (
    DICOM,
    ScanFile,
    read_scan,
    read_scan_header,
    suffix_of,
)
from datasets.scans.labels import FORMATS, label_suffix, write_labels, write_like
from datasets.scans.stamps import files_of, stamp
from prediction.cases import Case
from prediction.results import turned_back

IMAGES, LABELS, LOCK = "images", "labels", ".lock"
_one_thread = threading.Lock()  # a lock on a file does not keep threads of one process apart


def write_corrected(folder: str | Path, spec: DatasetSpec, case: Case, labels: np.ndarray) -> Path:
    """Add a corrected scan, or replace its earlier correction; return the file of the labels.

    Args:
        folder: is made if it is missing.
        spec: of the network.
        case: the scan, from `prediction.cases.read_case`; its files still have to exist.
        labels: (D, H, W) uint8 classes, in the orientation of `case.slices`.

    Raises:
        InputError: another scan there has the name, the folder holds other data or corrections of
            another network, the scan or the label file changed meanwhile, or there is no room or
            no right to write. Nothing new stays in the folder then.
    """
    folder, scan = Path(folder), case.scan
    safe_name(scan.name, source=scan.path)
    _require_labels(spec, case, labels)
    _require_unchanged(case)
    _require_own(folder, spec)
    make_folder(folder / IMAGES, flag="folder")
    taken = f"another program is writing into {folder}; wait a moment and save again"
    with _one_thread, only_user(folder / LOCK, taken=taken):
        _require_own(folder, spec)
        for part in (folder, folder / IMAGES, folder / LABELS):
            _remove_unfinished(part)
        written = Written(folder)
        file = folder / LABELS / f"{scan.name}{label_suffix(scan)}"
        written.refuse_foreign(
            [f"{LABELS}/{file.name}"],
            flag="the folder of corrected scans",
            remedy="move it away, or choose another folder",
        )
        _refuse_same_name(folder / LABELS, scan, file)
        image = _image_file(folder / IMAGES, scan)
        _refuse_same_name(folder / IMAGES, scan, image.path)
        with written.noting(), _removed_if_new(folder / SPEC_FILE), _removed_if_new(image.path):
            _write_image(image, case)
            write_json(folder / SPEC_FILE, _description(spec).to_json())
            voxels = np.ascontiguousarray(turned_back(labels, case))
            write_labels(file, voxels, scan, case.geometry, spec)
    return file


def _require_labels(spec: DatasetSpec, case: Case, labels: np.ndarray) -> None:
    shape = (case.slices.shape[0], *case.slices.shape[-2:])
    if labels.shape != shape or labels.dtype != np.uint8 or labels.max() > spec.num_classes:
        raise InputError(
            f"the labels of {case.scan.name} are {labels.shape} of {labels.dtype} up to "
            f"{labels.max(initial=0)}, expected {shape} of uint8 up to {spec.num_classes}"
        )


def _require_unchanged(case: Case) -> None:
    if stamp(case.scan.path) != case.source:
        raise InputError(
            f"{case.scan.path} was changed or removed since it was read; open it again and correct "
            "what is there now"
        )


def _description(spec: DatasetSpec) -> DatasetSpec:
    """Describe data whose label files hold the values that `write_labels` gives the classes."""
    return replace(
        spec,
        raw_labels={value: index for index, value in enumerate(spec.predicted_values, start=1)},
        ignored_labels=(),
        size=None,
        train_cases=(),
        test_cases=(),
        label_threshold=None,
        raw_range=None,  # preprocess finds it anew
        modality=None,
    )


def _require_own(folder: Path, spec: DatasetSpec) -> None:
    """Raise an `InputError` if a folder holds other files, or scans that another network saw."""
    path, own = folder / SPEC_FILE, _description(spec)
    if path.is_file():
        found = spec_from_json(read_json(path, remedy="choose another folder"), path)
        differing = [
            field.name
            for field in fields(DatasetSpec)
            if getattr(found, field.name) != getattr(own, field.name) and field.name != "name"
        ]
        if differing:
            raise InputError(
                f"{folder} describes data of another network (its {first_few(differing)} differ); "
                "choose another folder for the corrections of this network"
            )
        return
    parts = [folder / IMAGES, folder / LABELS] if folder.is_dir() else []
    inside = [*folder.iterdir()] if folder.is_dir() else []
    inside += [file for part in parts if part.is_dir() for file in part.iterdir()]
    others = [file.name for file in inside if file not in parts and not file.name.startswith(".")]
    if others:
        raise InputError(
            f"{folder} holds {first_few(sorted(others))}, which are no corrections; choose an "
            "empty folder, or one that does not exist"
        )


def _remove_unfinished(folder: Path) -> None:
    """Delete what a killed process left in a folder that is locked for this one."""
    remove_partials(folder)
    for left in folder.glob(".*.partial.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _removed_if_new(path: Path) -> Iterator[None]:
    """Remove a file or folder after an error, if it was not there before."""
    is_new = not path.exists()
    try:
        yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # the first error is the one to report
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _image_file(folder: Path, scan: ScanFile) -> ScanFile:
    """Return what the scan is in the folder `images`: one file with one volume, or a series."""
    if scan.suffix == DICOM:
        return replace(scan, path=folder / scan.name)
    suffix = scan.suffix if _is_one_volume_in_one_file(scan) else label_suffix(scan)
    return ScanFile(scan.name, folder / f"{scan.name}{suffix}", suffix)


def _write_image(image: ScanFile, case: Case) -> None:
    """Copy the scan of a case, unless the folder holds it already.

    Raises:
        InputError: the folder holds another scan, or the scan changed since it was read.
    """
    scan, voxels = case.scan, turned_back(case.slices.array, case)
    if image.path.exists():
        found, geometry = read_scan(image)
        if geometry != case.geometry or not np.array_equal(found, voxels):
            raise _other_scan(image.path)
        return
    if scan.suffix == DICOM:
        _copy_series(scan.path, image.path)
    elif _is_one_volume_in_one_file(scan):
        with atomic_path(image.path) as temporary:
            shutil.copyfile(scan.path, temporary)
    else:
        write_like(image.path, np.ascontiguousarray(voxels), scan, case.geometry)
    _require_unchanged(case)


def _is_one_volume_in_one_file(scan: ScanFile) -> bool:
    """Return whether a copy of the file alone is the scan that was read."""
    if scan.suffix in FORMATS or files_of(scan.path) != [scan.path]:
        return False  # a header whose data are in another file
    if scan.channel is None:
        return True
    try:
        read_scan_header(replace(scan, channel=None))
    except InputError:
        return False  # 4-D
    return True


def _copy_series(source: Path, path: Path) -> None:
    """Copy the slices of a DICOM series into a new folder, all of them or none."""
    temporary = partial_name(path)
    try:
        temporary.mkdir()
        for file in files_of(source):
            if file.is_file() and holds_dicom([file]):
                shutil.copyfile(file, temporary / file.name)
                flush_file(temporary / file.name)
        flush_folder(temporary)
        temporary.rename(path)
        flush_folder(path.parent)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise cannot_write(path, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_same_name(folder: Path, scan: ScanFile, own: Path) -> None:
    """Raise an `InputError` if a folder holds another file of this name, of another format."""
    for path in folder.iterdir() if folder.is_dir() else ():
        suffix = "" if path.is_dir() else suffix_of(path) or ""
        if path.name.removesuffix(suffix) == scan.name and path != own:
            raise _other_scan(path)


def _other_scan(path: Path) -> InputError:
    return InputError(
        f"{path} is another scan of this name; rename the scan that you correct, or choose another "
        "folder"
    )
