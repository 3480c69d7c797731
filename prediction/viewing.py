"""The cases of an output folder on `viewer.html`: written with each case, put together at the end.

What the page shows of a case stands in a hidden file beside its record. So cases of interrupted
runs, of several processes and of earlier runs are on the page too, and no scan is read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from common.written import Written
from datasets.registry import DatasetSpec
from evaluation.viewer import PAGE, ViewedCase, write_viewer
from evaluation.viewer_case import Picture, encode_case, write_case_part
from prediction.cases import Case
from prediction.records import Record, is_as_recorded, remove_own, view_name

CORRECTED = (
    "the label file was changed after predict.py wrote it; this page shows the labels and volumes "
    "before that"
)
NO_VIEW = (
    "it was segmented with --no_viewer or by an older version; remove its label file and run the "
    "same command again"
)


def write_view(path: Path, spec: DatasetSpec, case: Case, labels: np.ndarray) -> None:
    """Write what the page shows of a case, before its scan leaves memory.

    Args:
        labels: (D, H, W) classes, in the orientation of `case.slices`.
    """
    encoded = encode_case(
        case.scan.name,
        Picture(case.slices.array, spec.intensity, case.slices.limits),
        labels,
        None,
        geometry=case.place,
        voxel_ml=case.voxel_ml,
    )
    write_case_part(path, encoded)


def write_page(
    no_viewer: bool,
    spec: DatasetSpec,
    written: Written,
    records: Mapping[str, Record],
    failures: Mapping[str, str],
) -> list[str]:
    """Write `viewer.html` of all recorded cases; return lines that say so, or why not.

    With --no_viewer, and if no case is left to show, an earlier page is removed, because it would
    show other cases than the tables.
    """
    if no_viewer or not records:
        remove_own(written, [PAGE])
        return []
    folder, cases = written.folder, []
    for name in sorted(records.keys() | failures.keys()):
        if name in failures:
            reason = f"it could not be segmented: {failures[name]}"
            cases.append(ViewedCase(name, folder / "none", missing=reason))
        else:
            notes = case_notes(spec, folder, records[name])
            cases.append(ViewedCase(name, folder / view_name(name), notes, NO_VIEW))
    return write_viewer(folder / PAGE, cases, spec.class_names, f"Segmentations: {spec.name}")


def case_notes(spec: DatasetSpec, folder: Path, record: Record) -> list[str]:
    """Return what the page warns of: doubts, organs at the edge, labels changed since."""
    result = record.result
    notes = list(result["warnings"])
    cut = [name for name, at in zip(spec.class_names, result["cut_by_edge"], strict=True) if at]
    if cut:
        notes.append(f"the edge of the scan cuts: {', '.join(cut)}")
    if not is_as_recorded(folder / result["file"], record):
        notes.append(CORRECTED)
    return notes
