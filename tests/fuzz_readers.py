"""What is fuzzed: for each kind of file a sound sample, its reader, and how samples are changed."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import safetensors.torch
import SimpleITK as sitk
import torch
from conftest import tiny_model
from dicom_files import STORED, slice_tags, write_dicom_file
from fuzz_changes import (
    ODD_TEXTS,
    Change,
    change_bytes,
    change_deflated,
    change_gzipped,
    change_json,
    change_json_lines,
    change_text_header,
    change_zipped,
)
from PIL import Image
from wrong_input import USUAL_FLAGS, make_good, quiet, run

import train
from common.errors import InputError
from config.flags import predict_parser, test_parser
from config.settings import parse_args
from datasets.dataset_synapse import Synapse_dataset
from datasets.scans.files import find_scans, read_scan, read_scan_header
from datasets.scans.pictures import read_index_picture, read_picture
from evaluation import test_runs
from lora.adapter_file import read_adapter
from segment_anything.base_weights import read_base_weights
from tools import adapter as adapter_tool

SHAPE = (4, 12, 10)  # (D, H, W)
SPACING = (0.9, 0.8, 3.0)
SECRET = np.full(1 << 16, 0xA5, np.uint8)  # a file beside the folder that no header may point at


@dataclass(frozen=True)
class Reader:
    """A kind of file.

    Args:
        write: writes a sound sample into a folder and returns the file that is changed.
        read: the reader of the product; what it returns stands for what was read.
        changes: ways to change the file; one is drawn for each try.
        checked: the format has checksums, so that changed bytes are refused or change nothing.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    changes: tuple[Change, ...] = (change_bytes,)
    checked: bool = False


def voxels() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)


def write_scan(name: str, *, compressed: bool = True) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        image = sitk.GetImageFromArray(voxels())
        image.SetSpacing(SPACING)
        sitk.WriteImage(image, str(folder / name), useCompression=compressed)
        return folder / name

    return write


def write_series(folder: Path) -> Path:
    for index in range(3):
        tags = slice_tags(STORED[index], position=(0, 0, 3 * index), number=index + 1)
        write_dicom_file(folder / "series" / f"{index}.dcm", tags)
    return folder / "series" / "1.dcm"


def change_dicom_element(content: bytes, rng: random.Random) -> bytes:
    """Write one slice again with an odd value, another length or without one of its elements."""
    tags = slice_tags(STORED[1], position=(0, 0, 3), number=2)
    name = rng.choice(sorted(tags))
    group, number, kind, value = tags[name]
    if rng.random() < 0.2:
        del tags[name]
    elif kind in ("OW", "OB"):
        tags[name] = (group, number, kind, change_bytes(value, rng))
    elif kind == "US":
        tags[name] = (group, number, kind, rng.choice((0, 1, 2, 8, 12, 17, 4096, 65535)))
    else:
        count = rng.choice((1, 1, 2, 3, 6))
        parts = [rng.choice(ODD_TEXTS).decode("latin-1") for _ in range(count)]
        tags[name] = (group, number, kind, "\\".join(parts).encode("latin-1"))
    if "kind" not in tags or "instance" not in tags:
        return content[: rng.randrange(len(content))]
    path = Path(f"changed_{os.getpid()}.dcm").resolve()
    try:
        return write_dicom_file(path, tags).read_bytes()
    except (AttributeError, TypeError):  # the identifiers in front cannot be written
        return change_bytes(content, rng)
    finally:
        path.unlink(missing_ok=True)


def write_picture(name: str, mode: str, **options: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        values = np.random.default_rng(0).integers(0, 3, (12, 10))
        dtype = {"I;16": np.uint16, "1": np.bool_}.get(mode, np.uint8)
        picture = Image.fromarray((values * (100 if mode != "P" else 1)).astype(dtype))
        if mode == "P":
            picture = picture.convert("P")
        elif mode not in ("I;16", "L"):
            picture = picture.convert(mode)
        picture.save(folder / name, **options)
        return folder / name

    return write


def read_found_scan(path: Path) -> Any:
    """Read a scan as predict.py does: searched, its header, its voxels and geometry."""
    (scan, *_) = find_scans(path.parent if path.suffix == ".dcm" else path)
    shape, place = read_scan_header(scan)
    array, geometry = read_scan(scan)
    if array.shape[-len(shape) :] != shape and array.shape[0] != shape[0]:
        raise AssertionError(f"header {shape}, voxels {array.shape}")
    if place is not None and place.spacing != geometry.spacing:
        raise AssertionError(f"header {place}, voxels {geometry}")
    if (array == 0xA5).all() or (array == -0x5A5B).all():
        raise AssertionError("another file of the machine was read")
    return array, repr(geometry)


def read_both_pictures(path: Path) -> Any:
    """Read a picture as an image and, if it can be one, as a label."""
    image = read_picture(path)
    try:
        return image, read_index_picture(path)
    except InputError:
        return image, None


def write_npz(folder: Path) -> Path:
    label = np.zeros((8, 8), np.float32)
    label[2:5, 2:5] = 1
    image = np.random.default_rng(0).random((8, 8), dtype=np.float32)
    np.savez(folder / "s_slice000.npz", image=image, label=label)
    (folder / "train.txt").write_text("s_slice000\n")
    return folder / "s_slice000.npz"


def read_npz(path: Path) -> Any:
    data = Synapse_dataset(path.parent, path.parent, "train", num_classes=2)
    data.check()
    return [data.read(0)[key] for key in ("image", "label")]


def write_h5(folder: Path) -> Path:
    label = np.zeros(SHAPE, np.uint8)
    label[:, 2:5, 2:5] = 1
    (folder / "test_vol.txt").write_text("a\n")
    with h5py.File(folder / "a.npy.h5", "w") as file:
        file["image"] = np.random.default_rng(0).random(SHAPE, dtype=np.float32)
        file.create_dataset("label", data=label, compression="gzip")
        file.attrs.update({"spacing": SPACING, "origin": (0.0, 0.0, 0.0)})
        file.attrs["direction"] = np.eye(3).ravel()
        file.attrs["orientation"] = "LPS"
    return folder / "a.npy.h5"


def read_h5_volume(path: Path) -> Any:
    data = Synapse_dataset(path.parent, path.parent, "test_vol", num_classes=2)
    data.check()
    sample = data[0]
    return sample["image"], repr((data.geometry(0), data.orientation(0)))


def write_adapter(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        settings = {"vit_name": "vit_tiny", "img_size": 64, "num_classes": 2, "rank": 2}
        tiny_model(num_classes=2).save_lora_parameters(folder / "adapter.pth", settings)
        if name.endswith(".safetensors"):
            adapter_tool.main(["convert", str(folder / "adapter.pth"), str(folder / name)])
        return folder / name

    return write


def read_whole_adapter(path: Path) -> Any:
    """Read an adapter as predict.py does, its settings as flags included."""
    state, settings = read_adapter(path)
    parse_args(predict_parser(), ["--input", "x", "--output", "y", "--lora_ckpt", str(path)])
    return [state[key] for key in sorted(state)], repr(settings)


def write_base_weights(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        state = tiny_model(num_classes=2).sam.state_dict()
        if name.endswith(".safetensors"):
            safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, folder / name)
        else:
            torch.save(state, folder / name)
        return folder / name

    return write


def read_base(path: Path) -> Any:
    return read_base_weights(path, name="vit_tiny", widths={"vit_tiny": (192, 4)}, public=None)


@cache
def _good_files() -> Path:
    """Write what every program leaves, once: raw and prepared data, a run, labels, results."""
    made = Path(tempfile.mkdtemp(prefix="fuzz_good_"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    with contextlib.chdir(made), quiet():
        make_good(made)
        train.main([*TRAIN, "--stop_epoch", "1"])
        for program in ("predict.py", "test.py"):
            if run(program, USUAL_FLAGS[program])[0]:
                raise AssertionError(f"{program} fails on sound files")
    return made


def good_file(place: str) -> Callable[[Path], Path]:
    """Write valid input for every program; the file at `place` is the one that is changed."""

    def write(folder: Path) -> Path:
        shutil.copytree(_good_files(), folder, dirs_exist_ok=True)
        return folder / place

    return write


def by_program(program: str, *flags: str) -> Callable[[Path], Any]:
    """Run a whole program in the folder that holds the file."""

    def read(path: Path) -> str:
        os.chdir(next(p for p in path.parents if (p / "adapter.pth").exists()))
        code, told = run(program, [*USUAL_FLAGS.get(program, []), *flags])
        odd = [letter for letter in told if letter not in "\r\n" and not letter.isprintable()]
        if code not in (0, 2, 3) or "Traceback" in told or "this is a bug" in told or odd:
            raise AssertionError(f"exit code {code}: {told[-300:]!r}")
        if code:
            raise InputError(told.strip().splitlines()[-1])
        return "done"

    return read


def read_results(path: Path) -> Any:
    test_runs.read_json(path)
    return by_program("evaluation", "tested", "--output", "page.html")(path)


def read_config(path: Path) -> Any:
    """Read the configuration of a run as test.py and as a run that continues does."""
    os.chdir(path.parents[2])
    flags = ["--volume_path", "data", "--config", str(path)]
    return repr(sorted(vars(parse_args(test_parser(), flags)).items(), key=str))


TRAIN = (
    "--root_path data --output runs --name run --vit_name vit_tiny --ckpt none --img_size 64 "
    "--rank 2 --n_gpu 1 --batch_size 4 --device cpu --AdamW --base_lr 1e-4 --max_epochs 2"
).split()
CHECK = [*TRAIN, "--check"]
RESUME = [*TRAIN, "--resume", "runs/run", "--stop_epoch", "1"]
TEXT = (change_text_header, change_bytes)
JSON = (change_json,)
LINES = (change_json_lines, change_bytes)
FILE_READERS: dict[str, Reader] = {
    "nii": Reader(write_scan("s.nii"), read_found_scan),
    "nii.gz": Reader(write_scan("s.nii.gz"), read_found_scan, (change_gzipped,)),
    "nii.gz, as it lies": Reader(write_scan("s.nii.gz"), read_found_scan, checked=True),
    "nrrd": Reader(write_scan("s.nrrd", compressed=False), read_found_scan, TEXT),
    "nrrd, gzip": Reader(write_scan("s.nrrd"), read_found_scan, TEXT),
    "nhdr": Reader(write_scan("s.nhdr", compressed=False), read_found_scan, TEXT),
    "mha": Reader(write_scan("s.mha", compressed=False), read_found_scan, TEXT),
    "mha, zlib": Reader(write_scan("s.mha"), read_found_scan, (*TEXT, change_deflated)),
    "mhd": Reader(write_scan("s.mhd", compressed=False), read_found_scan, TEXT),
    "mhd, zraw": Reader(write_scan("s.mhd"), read_found_scan, TEXT),
    "dicom": Reader(write_series, read_found_scan, (change_dicom_element, change_bytes)),
    "png": Reader(write_picture("p.png", "L"), read_both_pictures),
    "png, 16 bits": Reader(write_picture("p.png", "I;16"), read_both_pictures),
    "png, palette": Reader(write_picture("p.png", "P"), read_both_pictures),
    "png, colour": Reader(write_picture("p.png", "RGBA"), read_both_pictures),
    "tiff": Reader(write_picture("p.tif", "I;16"), read_both_pictures),
    "tiff, deflated": Reader(
        write_picture("p.tif", "L", compression="tiff_adobe_deflate"), read_both_pictures
    ),
    "jpeg": Reader(write_picture("p.jpg", "RGB"), read_both_pictures),
    "bmp": Reader(write_picture("p.bmp", "L"), read_both_pictures),
    "npz": Reader(write_npz, read_npz, (change_zipped, change_bytes)),
    "h5": Reader(write_h5, read_h5_volume),
    "pth": Reader(write_adapter("adapter.pth"), read_whole_adapter, (change_bytes, change_zipped)),
    "safetensors": Reader(write_adapter("adapter.safetensors"), read_whole_adapter),
    "base weights": Reader(
        write_base_weights("base.pth"), read_base, (change_bytes, change_zipped)
    ),
    "base weights, safetensors": Reader(write_base_weights("base.safetensors"), read_base),
}
# By a whole program, or from the files of a whole run.
PROGRAM_READERS: dict[str, Reader] = {
    "config.json": Reader(good_file("runs/run/config.json"), read_config, JSON),
    "config.json, resumed": Reader(
        good_file("runs/run/config.json"), by_program("train.py", *RESUME), JSON
    ),
    "environment.json": Reader(
        good_file("runs/run/environment.json"), by_program("train.py", *RESUME), JSON
    ),
    "metrics.jsonl": Reader(
        good_file("runs/run/metrics.jsonl"), by_program("train.py", *RESUME), LINES
    ),
    "train.txt": Reader(good_file("data/lists/train.txt"), by_program("train.py", *CHECK), LINES),
    "dataset.json": Reader(good_file("raw/dataset.json"), by_program("preprocess.prepare"), JSON),
    "dataset_spec.json": Reader(
        good_file("data/dataset_spec.json"), by_program("train.py", *CHECK), JSON
    ),
    "preprocess.json": Reader(
        good_file("data/preprocess.json"), by_program("train.py", *CHECK), JSON
    ),
    "record of prepare": Reader(
        good_file("data/.done/s0.json"), by_program("preprocess.prepare", "--output", "data"), JSON
    ),
    "record of predict": Reader(good_file("out/.done/scan.json"), by_program("predict.py"), JSON),
    "results.json": Reader(good_file("tested/results.json"), read_results, JSON),
}
READERS = FILE_READERS | PROGRAM_READERS
