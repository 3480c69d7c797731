"""h5 files that anybody may have written: nothing outside them is read, and nothing too large."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from common.errors import InputError
from datasets.dataset_synapse import Synapse_dataset
from datasets.h5_files import LARGE

SHAPE = (3, 20, 24)
IMAGE = np.random.default_rng(1).random(SHAPE, dtype=np.float32)
LABEL = (IMAGE > 0.5).astype(np.uint8)
STRAIGHT = {"spacing": [1, 1, 3], "origin": [0] * 3, "direction": np.eye(3).ravel()}


def volume(folder: Path, **arrays: Any) -> Path:
    """A data folder of one volume, with only these arrays; return the file of the volume."""
    (folder / "lists").mkdir()
    (folder / "lists" / "test_vol.txt").write_text("case1\n")
    with h5py.File(folder / "case1.npy.h5", "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return folder / "case1.npy.h5"


def check(path: Path) -> None:
    Synapse_dataset(path.parent, path.parent / "lists", "test_vol", num_classes=1).check()


def external_values(file: h5py.File, other: Path) -> None:
    other.write_bytes(bytes(IMAGE.nbytes))
    file.create_dataset("image", SHAPE, "f4", external=[(str(other), 0, IMAGE.nbytes)])


def external_link(file: h5py.File, other: Path) -> None:
    with h5py.File(other, "w") as second:
        second["image"] = IMAGE
    file["image"] = h5py.ExternalLink(str(other), "/image")


def virtual(file: h5py.File, other: Path) -> None:
    with h5py.File(other, "w") as second:
        second["image"] = IMAGE
    layout = h5py.VirtualLayout(SHAPE, "f4")
    layout[:] = h5py.VirtualSource(str(other), "image", SHAPE)
    file.create_virtual_dataset("image", layout)


def soft_link(file: h5py.File, other: Path) -> None:
    file["elsewhere"] = IMAGE
    file["image"] = h5py.SoftLink("/elsewhere")


def a_group(file: h5py.File, other: Path) -> None:
    file.create_group("image")["image"] = IMAGE


def a_type(file: h5py.File, other: Path) -> None:
    file["image"] = np.dtype("f4")


def no_space(file: h5py.File, other: Path) -> None:
    file["image"] = h5py.Empty("f4")


def references(file: h5py.File, other: Path) -> None:
    file.create_dataset("image", SHAPE, h5py.ref_dtype)


def region_references(file: h5py.File, other: Path) -> None:
    file.create_dataset("image", SHAPE, h5py.regionref_dtype)


def texts(file: h5py.File, other: Path) -> None:
    file.create_dataset("image", SHAPE, h5py.string_dtype())


def ragged(file: h5py.File, other: Path) -> None:
    file.create_dataset("image", SHAPE, h5py.vlen_dtype(np.float32))


def foreign_filter(file: h5py.File, other: Path) -> None:
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk(SHAPE)
    settings.set_filter(305, h5py.h5z.FLAG_OPTIONAL)  # a number that a program registers
    space = h5py.h5s.create_simple(SHAPE)
    h5py.h5d.create(file.id, b"image", h5py.h5t.NATIVE_FLOAT, space, settings)


def never_written(file: h5py.File, other: Path) -> None:
    file.create_dataset("image", SHAPE, "f4")


def partly_written(file: h5py.File, other: Path) -> None:
    image = file.create_dataset("image", SHAPE, "f4", chunks=(1, 20, 24), compression="gzip")
    image[:2] = 1


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (external_values, "values of other files as image"),
        (external_link, "a link as image"),
        (virtual, "values of other files as image"),
        (soft_link, "a link as image"),
        (a_group, "no data set named image"),
        (a_type, "no data set named image"),
        (no_space, "no data set named image"),
        (references, "image values of type object"),
        (region_references, "image values of type object"),
        (texts, "image values of type object"),
        (ragged, "image values of type object"),
        (foreign_filter, "HDF5 filter 305"),
        (never_written, "not all written"),
        (partly_written, "not all written"),
    ],
)
@pytest.mark.parametrize("key", ["image", "label"])
def test_only_values_of_the_file_itself_are_read(
    write: Callable[[h5py.File, Path], None], message: str, key: str, tmp_path: Path
):
    path = volume(tmp_path)
    with h5py.File(path, "w") as file:
        write(file, tmp_path / "other.bin")
        if key == "label":
            file.move("image", "label")
        file["label" if key == "image" else "image"] = LABEL if key == "image" else IMAGE
    if key == "label" and "written" in message:  # a label that is zero everywhere may be so
        check(path)
        return
    with pytest.raises(InputError, match=message.replace("image", key)) as caught:
        check(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunks": (1, 64, 64)}, "an image .* and a label"),
        ({"chunks": (1, 64, 64), "same": True}, "not all written"),
        ({"same": True, "values": True, "chunks": (1, 4096, 4096)}, "too few for a picture"),
        ({"small": True, "values": True, "chunks": (8, 4096, 4096)}, "stores image in parts"),
        ({"small": True, "label": (17, 4096, 4096), "chunks": (1, 8, 8)}, "stores label in parts"),
    ],
)
def test_a_small_file_takes_little_memory(options: dict[str, Any], message: str, tmp_path: Path):
    """Shapes are compared before any value is read, and sizes with the space in the file."""
    small, large = (1, 8, 8), (8, 4096, 4096)
    path = volume(tmp_path)
    shape = small if options.get("small") else large
    with h5py.File(path, "w") as file:
        chunks = {"chunks": options["chunks"], "maxshape": (None,) * 3, "compression": "gzip"}
        image = file.create_dataset("image", shape, "f4", **chunks)
        if options.get("values"):
            for index in range(0, shape[0], options["chunks"][0]):
                image.id.write_direct_chunk((index, 0, 0), bytes(100))
        if "label" in options:
            chunks["chunks"] = options["label"]
            image[:] = 1
            file.create_dataset("label", small, "u1", **chunks)
        else:
            shape = shape if "same" in options or shape == small else small
            file.create_dataset("label", shape, "u1")
    assert path.stat().st_size < 64 << 10
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            check(path)
        assert tracemalloc.get_traced_memory()[1] < LARGE / 100
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "attributes",
    [
        {"direction": [0.0] * 9},
        {"direction": [np.nan] * 9},
        {"direction": [1, 0, 0, 1, 0, 0, 0, 0, 1]},
        {"direction": [2, 0, 0, 0, 1, 0, 0, 0, 1]},
        {"direction": [1, 0.1, 0, 0, 1, 0, 0, 0, 1]},
        {"direction": ["1"] * 9},
        {"direction": "LPS"},
        {"direction": np.eye(4).ravel()},
        {"direction": h5py.Empty("f8")},
        {"spacing": [0, 1, 1]},
        {"spacing": [-1, 1, 1]},
        {"spacing": [1e300, 1, 1]},
        {"spacing": [1e-320, 1, 1]},
        {"spacing": [1, 1]},
        {"spacing": np.array([1, 1, 1], complex)},
        {"spacing": np.array([(1, 2)] * 3, "i4,i4")},
        {"origin": [np.inf, 0, 0]},
        {"origin": [1e30, 0, 0]},
        {"origin": np.zeros(7000)},
        {"orientation": "XYZ"},
        {"orientation": ["LPS", "LPS"]},
        {"orientation": 5},
        {"orientation": b"\xff\xfe\xfd"},
        {"orientation": h5py.Empty("f8")},
        {"size_is_stated": [True, False]},
        {"size_is_stated": "maybe"},
        {"size_is_stated": np.nan},
    ],
    ids=str,
)
def test_faulty_attributes_are_refused_before_any_work(attributes: dict[str, Any], tmp_path: Path):
    path = volume(tmp_path, image=IMAGE, label=LABEL)
    with h5py.File(path, "r+") as file:
        file.attrs.update(STRAIGHT | attributes)
    what = next(iter(attributes))
    message = what if what in ("orientation", "size_is_stated") else "invalid geometry"
    with pytest.raises(InputError, match=message):
        check(path)


def test_a_heap_of_texts_without_an_end_is_refused(tmp_path: Path):
    """HDF5 would search for the text in it for ever: its free space has the size 0."""
    path = volume(tmp_path, image=IMAGE, label=LABEL)
    with h5py.File(path, "r+") as file:
        file.attrs.update(STRAIGHT | {"orientation": "LPS"})
    check(path)
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL")
    free = heap + 16 + 24  # after the heap's own 16 bytes, and 16 + 8 of the text
    assert content[free : free + 8] == bytes(8) and content[free + 8] != 0
    content[free + 8 : free + 16] = bytes(8)
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"orientation that is not readable.*its texts are damaged"
    ):
        check(path)


def test_references_and_other_objects_as_attributes_are_refused(tmp_path: Path):
    path = volume(tmp_path, image=IMAGE, label=LABEL)
    for what in STRAIGHT:
        with h5py.File(path, "r+") as file:
            file.attrs.update(STRAIGHT)
            file.attrs[what] = file["image"].ref
        with pytest.raises(InputError, match="invalid geometry"):
            check(path)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        (IMAGE.astype(">f4"), LABEL.astype(">i2")),
        (IMAGE.astype("f2"), LABEL.astype("f8")),
        (IMAGE.astype("f8"), LABEL.astype(bool)),
        (np.asfortranarray(IMAGE), LABEL),
        (np.repeat(IMAGE[:, None], 3, axis=1), LABEL),
    ],
    ids=["big-endian", "half", "double", "Fortran", "colour"],
)
def test_sound_files_of_other_writers_are_read(
    image: np.ndarray, label: np.ndarray, tmp_path: Path
):
    path = volume(tmp_path, label=label)
    with h5py.File(path, "r+") as file:
        packed = {"compression": "gzip", "shuffle": True, "fletcher32": True}
        file.create_dataset("image", data=image, chunks=(2, *image.shape[1:]), **packed)
        file.attrs.update(STRAIGHT | {"orientation": b"LPS", "size_is_stated": 1})
    check(path)
    sample = Synapse_dataset(path.parent, path.parent / "lists", "test_vol")[0]
    assert np.array_equal(sample["image"], image.astype("f4"))
    assert np.array_equal(sample["label"], LABEL)
    assert sample["image"].dtype == np.float32 and sample["image"].dtype.isnative


def test_damage_inside_a_chunk_is_told(tmp_path: Path):
    path = volume(tmp_path, label=LABEL)
    with h5py.File(path, "r+") as file:
        file.create_dataset("image", data=IMAGE, chunks=SHAPE, compression="gzip")
        start = file["image"].id.get_chunk_info(0).byte_offset
    damaged = bytearray(path.read_bytes())
    damaged[start + 900 : start + 950] = bytes(50)
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="not a readable h5 file"):
        check(path)
