"""Reading of `dataset.json`, the description of a data set in nnU-Net and the Decathlon."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import read_json
from datasets.registry import check_class_names

DATASET_JSON = "dataset.json"


@dataclass(frozen=True)
class DatasetJson:
    """The content of `dataset.json`."""

    name: str | None
    values: dict[str, int]  # class name -> label value, ascending by value
    channel: int | None  # the channel in use; None: no choice
    modality: str  # name of this channel; empty: not given
    training: int | None  # numTraining


def read_dataset_json(path: Path, channel: int | None) -> DatasetJson:
    """Read `dataset.json` of nnU-Net or of the Medical Segmentation Decathlon.

    Args:
        channel: the channel that the user chose; None: there must be one channel, or the three
            channels red, green and blue.

    Raises:
        InputError: the file is not a JSON object, its labels or channels are not valid, or the
            user must choose a channel.
    """
    content = read_json(path, remedy="correct it")
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    channels = _channel_names(content, path)
    colour = [name.upper()[:1] for name in channels] == ["R", "G", "B"]
    if channel is None and len(channels) > 1 and not colour:
        listed = ", ".join(f"{index} {name}" for index, name in enumerate(channels))
        raise InputError(
            f"{path} has {len(channels)} channels ({listed}) but the network reads only one; pass "
            "--channel N"
        )
    if channel is not None and channels and channel >= len(channels):
        raise InputError(
            f"--channel is {channel} but {path} has only {len(channels)} channel(s), numbered "
            "from 0"
        )
    training, name = content.get("numTraining"), content.get("name")
    return DatasetJson(
        name=name if isinstance(name, str) else None,
        values=class_values(content.get("labels"), path),
        channel=channel,
        modality=channels[channel or 0] if channels and not colour else "",
        training=training if isinstance(training, int) else None,
    )


def _channel_names(content: dict[str, Any], path: Path) -> list[str]:
    """Return the names of the channels, ascending by number."""
    names = content.get("channel_names", content.get("modality", {}))
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise InputError(f'{path} has "channel_names" {names!r:.60}, expected {{"0": "CT"}}')
    try:
        return [name for _, name in sorted((int(key), name) for key, name in names.items())]
    except ValueError:
        raise InputError(
            f'{path} has the channels {list(names)}, expected the numbers "0", "1", …'
        ) from None


def class_values(labels: Any, path: Path) -> dict[str, int]:
    """Return class names and their label values, ascending by value, without the background.

    Args:
        labels: `{"liver": 1}` as in nnU-Net, or `{"1": "liver"}` as in the Decathlon.

    Raises:
        InputError: the labels have neither form, a value is repeated or is a list (a region), there
            is an ignore label, there is only background, or a name does not fit into tables.
    """
    expected = f'{path} needs "labels" as {{"background": 0, "liver": 1}} or {{"1": "liver"}}'
    if not isinstance(labels, dict) or not labels:
        raise InputError(f"{expected}; it has {labels!r:.80}")
    by_value = all(isinstance(value, str) for value in labels.values())
    pairs = [(str(v), k) if by_value else (str(k), v) for k, v in labels.items()]
    found: dict[str, int] = {}
    for name, value in pairs:
        if isinstance(value, list):
            raise InputError(
                f"{path} has the region {name!r} of the labels {value} but regions are not "
                "supported; give each voxel one class"
            )
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{expected}; the value of {name!r} is {value!r:.40}") from None
        if isinstance(value, (float, bool)) or not 0 <= number < 65536:
            raise InputError(f"{expected}; the value of {name!r} is {value!r}, expected 0…65535")
        if number in found.values() or name in found:
            raise InputError(f"{path} has the label {name!r} or its value {number} twice")
        if name == "ignore":
            raise InputError(
                f'{path} has the label "ignore" but training uses every voxel; annotate these '
                'voxels or set them to background, and remove "ignore"'
            )
        found[name] = number
    classes = {n: v for n, v in sorted(found.items(), key=lambda item: item[1]) if v}
    if not classes:
        raise InputError(f"{expected}; it has no class except background")
    check_class_names(list(classes), path)
    return classes
