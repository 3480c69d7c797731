"""Segmentations of 3D Slicer: NRRD files whose header names the labels (`.seg.nrrd`).

Segments that overlap lie in several layers of a 4-D file, and each segment has a label value in
its layer. https://slicer.readthedocs.io/en/latest/developer_guide/modules/segmentations.html
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import InputError, first_few
from datasets.scans.geometry import Geometry
from datasets.scans.text_headers import LONGEST

FIELD = re.compile(r"Segment(\d{1,6}|ation)_(\w+):=(.*)")
LABELMAP = "Binary labelmap"
EXPORT = "export it from 3D Slicer as a labelmap (Segmentations, Export, with a colour table)"


@dataclass(frozen=True)
class Segment:
    """A label of a segmentation."""

    name: str
    value: int  # of its voxels
    layer: int


def segments_of(path: Path) -> list[Segment] | None:
    """Return the segments that the header of an NRRD file names; None: it is another file.

    Raises:
        InputError: the header holds no whole numbers where they are needed, or no labels.
    """
    if not path.is_file():
        return None  # the folder of a DICOM series
    with path.open("rb") as file:
        if file.read(7) != b"NRRD000":
            return None
        content = file.read(LONGEST)
    head = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[0].decode("utf-8", "replace")
    found: dict[str, dict[str, str]] = {}
    for line in head.splitlines():
        if match := FIELD.fullmatch(line):
            number, key, text = match.groups()
            found.setdefault(number, {})[key] = text.replace("\\\\", "\\").strip()
    kind = found.pop("ation", {})
    if not found:
        return None
    stored = kind.get("MasterRepresentation") or kind.get("SourceRepresentation") or LABELMAP
    if stored != LABELMAP:
        raise InputError(f"{path} holds a segmentation as {stored:.40}, not as labels; {EXPORT}")
    segments = []
    for number, fields in sorted(found.items(), key=lambda item: int(item[0])):
        name = fields.get("Name") or fields.get("ID") or f"Segment {number}"
        # As Slicer reads files of earlier versions: a layer for each segment, in which it is 1.
        value, layer = fields.get("LabelValue", "1"), fields.get("Layer", number)
        if not re.fullmatch(r"\d{1,5}", value) or not re.fullmatch(r"\d{1,5}", layer):
            raise InputError(
                f"{path} gives the segment {name:.60} the label value {value:.20} in layer "
                f"{layer:.20}, expected whole numbers; save it again with 3D Slicer 5"
            )
        segments.append(Segment(name, int(value), int(layer)))
    _refuse_one_value_for_two(path, segments)
    return segments


def _refuse_one_value_for_two(path: Path, segments: list[Segment]) -> None:
    """Refuse segments that merging their layers would make one, or background."""
    by_value: dict[int, str] = {0: "the background"}
    for segment in segments:
        if other := by_value.get(segment.value):
            raise InputError(
                f"{path} gives the segment {segment.name:.60} the label value {segment.value}, "
                f"which is that of {other:.60}, so their voxels cannot be told apart in one label "
                f"file; {EXPORT}, or give each segment a value of its own"
            )
        by_value[segment.value] = segment.name


def read_segmentation(path: Path) -> tuple[np.ndarray, Geometry]:  # (D, H, W)
    """Read a segmentation as label values; its layers are merged.

    The grid is that of the file, which may be a part of the scan's.

    Raises:
        InputError: the file is damaged, segments overlap, or voxels belong to no segment.
    """
    from datasets.scans.volumes import read_layers

    segments = segments_of(path)
    layers, geometry = read_layers(path)
    merged = np.zeros_like(layers[0])
    for index, layer in enumerate(layers):
        known = [segment.value for segment in segments if segment.layer == index]
        values = np.unique(layer)
        strange = [f"{value:g}" for value in values[~np.isin(values, [0, *known])]]
        if strange:
            raise InputError(
                f"{path} has voxels of the values {first_few(strange)} in layer {index}, which no "
                f"segment of its header has ({first_few(known) or 'none'}); save it again with 3D "
                "Slicer"
            )
        inside = layer != 0
        overlap = inside & (merged != 0)
        if overlap.any():
            pair = np.stack([merged[overlap], layer[overlap]])[:, 0]
            names = {segment.value: segment.name for segment in segments}
            first, second = (names.get(int(value), f"value {value}") for value in pair)
            raise InputError(
                f"{path} has {int(overlap.sum())} voxels of which each lies in two segments (e.g. "
                f"{first} and {second}), expected one class for each voxel; remove the overlap in "
                "the Segment Editor of 3D Slicer (Masking, Modify other segments: Overwrite all)"
            )
        merged[inside] = layer[inside]
    return merged, geometry
