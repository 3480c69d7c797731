"""Pictures keep every bit of their files, or are refused with the true cause and a remedy."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures_by_hand import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGBA,
    chunk,
    write_png,
    write_tiff,
)
from PIL import ExifTags, Image
from test_own_data import run_prepare

from common.errors import InputError
from datasets.registry import stored_spec
from datasets.scans import pictures
from datasets.scans.files import find_scans, read_scan_header
from datasets.scans.pictures import read_index_picture, read_picture
from datasets.scans.volumes import read_volume

SIDE = (6, 7)  # (H, W)


def values(dtype: str, *channels: int, top: int | None = None) -> np.ndarray:
    """Return random values (H, W) or (H, W, C) over the whole range of a dtype."""
    rng = np.random.default_rng(len(dtype) + sum(channels))
    if dtype.startswith("f"):
        return rng.normal(size=(*SIDE, *channels)).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, top or limits.max, (*SIDE, *channels)).astype(dtype)


def shown(array: np.ndarray) -> np.ndarray:
    """Return what `read_picture` is expected to return for these values."""
    return array[None] if array.ndim == 2 else array[..., :3].transpose(2, 0, 1)[None]


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("kind", "channels"), [(GREY, ()), (RGB, (3,)), (RGBA, (4,))])
def test_png_of_16_bits(tmp_path: Path, kind: int, channels: tuple[int, ...], interlaced: bool):
    array = values("u2", *channels)
    path = write_png(tmp_path / "a.png", array, 16, kind, interlaced=interlaced)
    found = read_picture(path)
    assert found.dtype == np.uint16 and np.array_equal(found, shown(array))
    assert read_scan_header(find_scans(path)[0])[0] == (1, *SIDE)


def test_ancillary_chunks_change_no_value(tmp_path: Path):
    gamma = chunk(b"gAMA", (100_000).to_bytes(4, "big"))
    for kind, channels in ((GREY, ()), (RGB, (3,))):
        array = values("u2", *channels)
        clear = chunk(b"tRNS", array[0, 0].astype(">u2").tobytes())
        path = write_png(tmp_path / f"{kind}.png", array, 16, kind, gamma, clear)
        assert np.array_equal(read_picture(path), shown(array))


@pytest.mark.parametrize("kind", [RGB, RGBA])
def test_the_count_of_significant_bits_shifts_no_value(tmp_path: Path, kind: int):
    array = values("u2", 3 if kind == RGB else 4) >> 4  # as a camera of 12 bits writes them
    significant = chunk(b"sBIT", bytes([12] * array.shape[-1]))
    path = write_png(tmp_path / "a.png", array, 16, kind, significant)
    assert np.array_equal(read_picture(path), shown(array))


def test_grey_with_opacity_of_16_bits_is_refused(tmp_path: Path):
    path = write_png(tmp_path / "a.png", values("u2", 2), 16, GREY_ALPHA)
    with pytest.raises(InputError, match=r"16 bits per channel .* without opacity"):
        read_picture(path)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("kind", [GREY, PALETTE])
def test_labels_of_few_bits_are_not_spread(tmp_path: Path, bits: int, kind: int):
    array = np.arange(48).reshape(6, 8) % 2**bits
    colours = [chunk(b"PLTE", bytes(range(3 * 2**bits)))] if kind == PALETTE else []
    path = write_png(tmp_path / "a.png", array, bits, kind, *colours)
    assert np.array_equal(read_index_picture(path)[0], array)
    if kind == GREY:  # an image is spread over 0…255, as it is displayed
        assert np.array_equal(read_picture(path)[0], array * (255 // (2**bits - 1)))
        path = write_tiff(tmp_path / "a.tif", [array.astype(np.uint8)], bits=bits)
        assert np.array_equal(read_index_picture(path)[0], array)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "i4", "f4"])
def test_grey_tiff_of_every_type(tmp_path: Path, dtype: str, order: str):
    array = values(dtype)
    path = write_tiff(tmp_path / "a.tif", [array], order=order)
    for read in (read_picture, read_index_picture):
        found = read(path)
        assert np.array_equal(found[0], array) and found.dtype.isnative


def test_large_unsigned_values_do_not_wrap(tmp_path: Path):
    array = values("u4")
    assert array.max() > 2**31
    assert np.array_equal(read_picture(write_tiff(tmp_path / "a.tif", [array]))[0], array)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("dtype", "channels"), [("u1", 3), ("u2", 3), ("u2", 4)])
def test_colour_tiff(tmp_path: Path, dtype: str, channels: int, order: str):
    array = values(dtype, channels)
    found = read_picture(write_tiff(tmp_path / "a.tif", [array], order=order))
    assert found.dtype == dtype and np.array_equal(found, shown(array))


def test_twelve_bits_that_are_packed(tmp_path: Path):
    array = values("u2", top=4096)[:, :6]
    assert np.array_equal(read_picture(write_tiff(tmp_path / "a.tif", [array], bits=12))[0], array)


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_tiff_that_shows_0_as_white(tmp_path: Path, dtype: str):
    array = values(dtype)
    path = write_tiff(tmp_path / "a.tif", [array], white_is_zero=True)
    assert np.array_equal(read_picture(path)[0], np.iinfo(dtype).max - array)
    with pytest.raises(InputError, match="shows 0 as white"):
        read_index_picture(path)


REFUSED = {
    "64 bits": lambda path: write_tiff(path, [values("f8")]),
    "colours as fractions": lambda path: write_tiff(path, [values("f4", 3)]),
    "16 bits on the side": lambda path: write_tiff(path, [values("u2", 3)], tags=[(274, 3, [3])]),
    "LAB": lambda path: Image.new("LAB", (4, 4)).save(path),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_decoder_reads_in_full_is_refused(tmp_path: Path, name: str):
    REFUSED[name](tmp_path / "a.tif")
    with pytest.raises(InputError, match="save it"):
        read_picture(tmp_path / "a.tif")


def test_big_tiff_and_compression(tmp_path: Path):
    array = values("u2")
    for name, how in (("big", {"big_tiff": True}), ("lzw", {"compression": "tiff_lzw"})):
        Image.fromarray(array).save(tmp_path / f"{name}.tif", **how)
        assert np.array_equal(read_picture(tmp_path / f"{name}.tif")[0], array)


def test_cmyk(tmp_path: Path):
    ink = values("u1", 4).astype(int)
    Image.fromarray(ink.astype(np.uint8), "CMYK").save(tmp_path / "a.tif")
    expected = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    assert np.abs(read_picture(tmp_path / "a.tif") - shown(expected)).max() <= 1


NOT_PICTURES = {
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
    "a text page": b"<!DOCTYPE html><html>log in</html>",
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\n",
    "the file is empty": b"",
    "DICOM": bytes(128) + b"DICM",
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "begins with": b"\x01\x02\x03\x04",
}


@pytest.mark.parametrize("told", NOT_PICTURES)
def test_the_message_says_what_a_file_is(tmp_path: Path, told: str):
    (tmp_path / "a.png").write_bytes(NOT_PICTURES[told])
    with pytest.raises(InputError, match=told):
        read_picture(tmp_path / "a.png")


def test_the_main_picture_of_a_phone_and_of_a_pyramid(tmp_path: Path, capfd: pytest.CaptureFixture):
    main = np.arange(64 * 48).reshape(48, 64).astype(np.uint8)
    picture = Image.fromarray(np.full((48, 64, 3), 90, np.uint8))
    other = Image.fromarray(np.full((24, 32, 3), 200, np.uint8))
    picture.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[other])
    assert np.abs(read_picture(tmp_path / "phone.jpg")[0].astype(int) - 90).max() <= 2
    assert "holds 2 pictures (MPO)" in capfd.readouterr().err
    write_tiff(tmp_path / "pyramid.tif", [main, main[::2, ::2], main[::4, ::4]])
    assert np.array_equal(read_picture(tmp_path / "pyramid.tif")[0], main)
    assert "holds 3 pictures (TIFF)" in capfd.readouterr().err
    pages = [main[::2, ::2], main, main // 2]  # a smaller copy first, a mask last
    write_tiff(tmp_path / "marked.tif", pages, subfiles=(1, 0, 4))
    assert np.array_equal(read_picture(tmp_path / "marked.tif")[0], main)


def ran(message: str) -> None:
    """Run the command at the end of a message, as a user would copy it."""
    command = shlex.split(message[message.index("python -c") :])
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=60)


@pytest.mark.parametrize(("dtype", "order"), [("u1", "<"), ("u2", ">"), ("i2", "<"), ("f4", ">")])
def test_the_command_that_makes_a_volume_of_a_stack(tmp_path: Path, dtype: str, order: str):
    stack = np.stack([values(dtype), values(dtype).T.reshape(SIDE), values(dtype)[::-1]])
    path = write_tiff(tmp_path / "a b's.tif", list(stack), order=order)
    with pytest.raises(InputError, match=r"a stack of 3 pictures.*a volume of it") as caught:
        read_picture(path)
    ran(str(caught.value))
    found, geometry = read_volume(tmp_path / "a b's.nii.gz")
    assert np.array_equal(found, stack) and geometry.spacing == (1, 1, 1)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".tif"])
def test_the_command_that_makes_pictures_of_frames(tmp_path: Path, suffix: str):
    index = [values("u1", top=4), values("u1", top=4).T.reshape(SIDE)]
    frames = [Image.fromarray(frame) for frame in index]
    for frame in frames:
        frame.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = [np.asarray(frame.convert("RGB")) for frame in frames]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=r"of 2 pictures.*single pictures of it") as caught:
        read_picture(tmp_path / f"a{suffix}")
    ran(str(caught.value))
    for number, colour in enumerate(colours):
        assert np.array_equal(read_picture(tmp_path / f"a_{number:03}.png"), shown(colour))


def write_pairs(root: Path, picture: np.ndarray, ending: str) -> Path:
    """Write four pictures of 16 bits with masks of one class."""
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    mask = np.zeros(picture.shape[:2], np.uint8)
    mask[2:5, 1:5] = 1
    for name in "abcd":
        path = root / "images" / f"{name}{ending}"
        write_png(path, picture, 16, RGB) if ending == ".png" else write_tiff(path, [picture])
        Image.fromarray(mask).save(root / "labels" / f"{name}.png")
    return root


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_colours_of_16_bits_are_prepared_in_full(tmp_path: Path, ending: str):
    picture = values("u2", 3, top=4096)
    root = write_pairs(tmp_path / "raw", picture, ending)
    assert run_prepare(root, tmp_path / "data", "--window", "0", "4095", "--test_cases", "d") == 0
    with np.load(tmp_path / "data" / "train_npz" / "a_slice000.npz") as file:
        found = file["image"]
    assert np.allclose(found, shown(picture)[0] / 4095, atol=1e-6)
    assert stored_spec(tmp_path / "data").channels == 3


def test_pictures_that_are_stored_turned_are_warned_of(
    tmp_path: Path, capfd: pytest.CaptureFixture
):
    root = write_pairs(tmp_path / "raw", values("u2", 3), ".png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    for name in "abcd":
        (root / "images" / f"{name}.png").unlink()
        Image.fromarray(values("u1")).save(root / "images" / f"{name}.png", exif=exif)
    assert run_prepare(root, tmp_path / "data") == 0
    assert "a.png, b.png, c.png, d.png are stored turned" in capfd.readouterr().err


@pytest.fixture(autouse=True)
def every_warning_is_said():
    pictures._warn_of_other_pages.cache_clear()
