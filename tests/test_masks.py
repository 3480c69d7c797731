"""Values of masks become classes only if they can be classes, and `--label_threshold` makes one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage
from test_awkward_data import refused
from test_own_data import NNUNET, cases_of, run_prepare, write_set
from test_scans import placed

from datasets.registry import stored_spec
from datasets.scans.volumes import write_volume

ERRORS = pytest.CaptureFixture[str]
SIDE = 48
Save = Callable[[Path], object]


def mask(value: int = 255, seed: int = 0) -> np.ndarray:  # (H, W) uint8
    """Return an ellipse of a value on 0."""
    corner = np.random.default_rng(seed).integers(4, 12, 2).tolist()
    picture = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(picture).ellipse((*corner, corner[0] + 24, corner[1] + 20), fill=value)
    return np.asarray(picture)


def picture_set(root: Path, masks: Sequence[Save], suffix: str = ".png") -> Path:
    """Write noise as images, and masks by the functions given."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for name, save in zip("abcdefghi", masks, strict=False):
        noise = rng.integers(0, 256, (SIDE, SIDE)).astype(np.uint8)
        Image.fromarray(noise).save(root / "images" / f"{name}.png")
        save(root / "labels" / f"{name}{suffix}")
    return root


def png(array: np.ndarray, mode: str | None = None) -> Save:
    """Return a function that saves values losslessly as PNG, whatever the suffix."""
    picture = Image.fromarray(array)
    return lambda path: (picture.convert(mode) if mode else picture).save(path, "PNG")


def scaled(array: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Return a mask that went through a smaller size and back, with grey edges."""
    small = Image.fromarray(array).resize((30, 30), Image.Resampling.BILINEAR)
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def jpeg(array: np.ndarray) -> Save:
    return lambda path: Image.fromarray(array).save(path, "JPEG", quality=90)


def jpeg_as_png(array: np.ndarray) -> Save:
    """Return a function that saves values which were a JPEG once."""

    def save(path: Path) -> None:
        jpeg(array)(path)
        values = np.asarray(Image.open(path))
        Image.fromarray(values).save(path, "PNG")

    return save


def stored_labels(output: Path) -> dict[str, np.ndarray]:
    """Return the labels of all cases that were prepared, by name."""
    found = {}
    for path in (output / "train_npz").iterdir():
        with np.load(path) as file:
            found[path.stem.split("_slice")[0]] = file["label"]
    for path in (output / "test_vol_h5").iterdir():
        with h5py.File(path) as file:
            found[path.name.split(".")[0]] = file["label"][0]
    return found


def grey_masks() -> list[np.ndarray]:
    return [scaled(mask(seed=seed)) for seed in range(4)]


GREY = {
    "scaled": lambda: [png(array) for array in grey_masks()],
    "one of four": lambda: [*(png(mask(seed=seed)) for seed in range(3)), png(grey_masks()[3])],
    "was a JPEG": lambda: [jpeg_as_png(mask(seed=seed)) for seed in range(4)],
    "half-covered pixels": lambda: [
        png(np.maximum(mask(), 128 * ndimage.binary_dilation(mask() > 0)).astype(np.uint8))
        for _ in range(4)
    ],
}


@pytest.mark.parametrize("name", GREY)
def test_grey_edges_are_no_classes(tmp_path: Path, capfd: ERRORS, name: str):
    root = picture_set(tmp_path / "raw", GREY[name]())
    told = refused(root, tmp_path / "data", capfd)
    assert "grey value" in told and "--label_threshold 128" in told
    assert run_prepare(root, tmp_path / "data", "--label_threshold", "128") == 0
    spec = stored_spec(tmp_path / "data")
    assert spec.class_names == ("class 1",) and spec.label_threshold == 128
    found = stored_labels(tmp_path / "data")
    for path in (root / "labels").iterdir():
        assert np.array_equal(found[path.stem], np.asarray(Image.open(path)) >= 128)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_jpeg_is_known_by_its_content(tmp_path: Path, capfd: ERRORS, suffix: str):
    root = picture_set(tmp_path / "raw", [jpeg(mask(seed=seed)) for seed in range(4)], suffix)
    told = refused(root, tmp_path / "data", capfd)
    assert f"a{suffix} is a JPEG by its content" in told and "--label_threshold 128" in told
    assert run_prepare(root, tmp_path / "data", "--label_threshold", "128") == 0
    found = stored_labels(tmp_path / "data")
    for seed, name in enumerate("abcd"):
        assert np.array_equal(found[name], mask(seed=seed) > 0)


ALIKE = {  # ways to store the same mask of 0 and 255
    "PNG named .jpg": (".jpg", lambda array: png(array)),
    "grey as RGB": (".png", lambda array: png(array, "RGB")),
    "grey as RGBA": (".png", lambda array: png(array, "RGBA")),
    "grey with opacity": (".png", lambda array: png(array, "LA")),
    "BMP": (".bmp", lambda array: Image.fromarray(array).save),
    "fractions": (".tif", lambda array: Image.fromarray(array.astype(np.float32)).save),
}


@pytest.mark.parametrize("name", ALIKE)
def test_lossless_masks_are_read_whatever_they_are_stored_in(tmp_path: Path, name: str):
    suffix, way = ALIKE[name]
    root = picture_set(tmp_path / "raw", [way(mask(seed=seed)) for seed in range(4)], suffix)
    assert run_prepare(root, tmp_path / "data") == 0
    assert stored_spec(tmp_path / "data").raw_labels == {255: 1}
    found = stored_labels(tmp_path / "data")
    for seed, case in enumerate("abcd"):
        assert np.array_equal(found[case], mask(seed=seed) > 0)


@pytest.mark.parametrize("colours", ["RGB", "transparent"])
def test_colours_and_opacity_are_refused(tmp_path: Path, capfd: ERRORS, colours: str):
    array = np.repeat(mask()[..., None], 4, -1)
    array[..., 3] = 255
    if colours == "RGB":
        array[..., 2] = 0
    else:
        array[:4, :, 3] = 0
    root = picture_set(tmp_path / "raw", [png(array)] * 4)
    told = refused(root, tmp_path / "data", capfd)
    assert "2 colours ((0, 0, 0), (255, 255, 0))" in told or "partly transparent" in told


@pytest.mark.parametrize(("first", "second", "low"), [(1, 255, 1), (254, 255, 254)])
def test_one_class_in_two_encodings(
    tmp_path: Path, capfd: ERRORS, first: int, second: int, low: int
):
    masks = [mask(first, 0), mask(second, 1), mask(first, 2), mask(second, 3)]
    root = picture_set(tmp_path / "raw", [png(array) for array in masks])
    told = refused(root, tmp_path / "data", capfd)
    assert f"a.png, c.png only {first}; b.png, d.png only {second}" in told
    assert f"--label_threshold {low}" in told
    assert run_prepare(root, tmp_path / "data", "--label_threshold", str(low)) == 0
    found = stored_labels(tmp_path / "data")
    assert all(np.array_equal(found[n], m > 0) for n, m in zip("abcd", masks, strict=True))
    # Names say that both values are classes.
    assert run_prepare(root, tmp_path / "named", "--class_names", "cyst", "tumour") == 0
    assert stored_spec(tmp_path / "named").raw_labels == {first: 1, second: 2}


def test_one_bit_and_eight_bits(tmp_path: Path, capfd: ERRORS):
    masks = [png(mask(seed=seed), "1" if seed % 2 else None) for seed in range(4)]
    root = picture_set(tmp_path / "raw", masks)
    assert "never meet" in refused(root, tmp_path / "data", capfd)
    assert run_prepare(root, tmp_path / "data", "--label_threshold", "128") == 0
    found = stored_labels(tmp_path / "data")
    assert all(np.array_equal(found[n], mask(seed=s) > 0) for s, n in enumerate("abcd"))


def test_another_threshold_converts_again(tmp_path: Path, capfd: ERRORS):
    masks = grey_masks()
    root, output = picture_set(tmp_path / "raw", [png(array) for array in masks]), tmp_path / "data"
    for threshold in (40, 200):
        assert run_prepare(root, output, "--label_threshold", str(threshold)) == 0
        found = stored_labels(output)
        for name, array in zip("abcd", masks, strict=True):
            assert np.array_equal(found[name], array >= threshold)
    record = json.loads((output / ".done" / "a.json").read_text())
    assert record["key"]["spec"]["label_threshold"] == 200
    assert "hold no value from --label_threshold 300; their largest value is 255" in refused(
        root, output, capfd, "--label_threshold", "300"
    )
    assert "expected 0 < N < 65536" in refused(root, output, capfd, "--label_threshold", "0")
    told = refused(root, output, capfd, "--label_threshold", "9", "--label_values", "classes")
    assert "--label_threshold needs --label_values raw" in told


def test_masks_that_a_threshold_empties_are_named(tmp_path: Path, capfd: ERRORS):
    masks = [png(mask(1 if seed == 2 else 255, seed)) for seed in range(4)]
    root = picture_set(tmp_path / "raw", masks)
    assert run_prepare(root, tmp_path / "data", "--label_threshold", "128") == 0
    assert "warning: c.png (up to 1) hold values, but none from" in capfd.readouterr().err


def test_palettes_that_differ(tmp_path: Path, capfd: ERRORS):
    def with_palette(colours: list[int]) -> Save:
        picture = Image.fromarray(mask(1))
        picture.putpalette(colours)
        return lambda path: picture.save(path)

    black_red, black_blue = [0, 0, 0, 255, 0, 0], [0, 0, 0, 0, 0, 255]
    same, other = with_palette(black_red), with_palette(black_blue)
    root = picture_set(tmp_path / "raw", [same, same, other, same])
    told = refused(root, tmp_path / "data", capfd)
    assert "index 1 is #ff0000 in the palette of a.png and #0000ff in that of c.png" in told
    assert run_prepare(picture_set(tmp_path / "same", [same] * 4), tmp_path / "data") == 0
    assert "background here" not in capfd.readouterr().err
    inverted = with_palette([255, 255, 255, 0, 0, 0])
    assert run_prepare(picture_set(tmp_path / "inv", [inverted] * 4), tmp_path / "inverted") == 0
    assert "index 0 of the label pictures is #ffffff and index 1 is black" in capfd.readouterr().err


def volume_set(root: Path, labels: Sequence[np.ndarray]) -> Path:
    """Write volumes and labels of the given values."""
    rng = np.random.default_rng(0)
    for index, label in enumerate(labels):
        image = rng.integers(0, 900, label.shape).astype(np.int16)
        write_volume(root / "images" / f"p{index}.nii.gz", image, placed("LPS"))
        write_volume(root / "labels" / f"p{index}.nii.gz", label, placed("LPS"))
    return root


def blocks() -> np.ndarray:  # (D, H, W) uint8 of 0, 1 and 2
    label = np.zeros((5, 20, 20), np.uint8)
    label[1:4, 4:12, 5:15], label[2, 6:10, 7:11] = 1, 2
    return label


def test_rounding_of_labels_is_undone(tmp_path: Path):
    rounded = blocks().astype(np.float32) * np.float32(0.99999994) + np.float32(1e-8)
    rounded[rounded > 1] += np.float32(9e-4)
    assert set(np.unique(rounded)) != {0, 1, 2}
    root = volume_set(tmp_path / "raw", [rounded] * 3)
    assert run_prepare(root, tmp_path / "data", "--test_cases", "p0") == 0
    with h5py.File(tmp_path / "data" / "test_vol_h5" / "p0.npy.h5") as file:
        assert np.array_equal(file["label"][()], blocks())
    assert stored_spec(tmp_path / "data").raw_labels == {1: 1, 2: 2}


def test_interpolated_labels_are_refused(tmp_path: Path, capfd: ERRORS):
    smooth = ndimage.uniform_filter((blocks() > 0).astype(np.float32), 3)
    root = volume_set(tmp_path / "raw", [smooth] * 3)
    told = refused(root, tmp_path / "data", capfd)
    assert "linear interpolation" in told and "--label_threshold (0.5 for values 0…1)" in told
    assert run_prepare(root, tmp_path / "data", "--label_threshold", "0.5") == 0
    assert cases_of(tmp_path / "data", "test_vol")
    name = next(iter(cases_of(tmp_path / "data", "test_vol")))
    with h5py.File(tmp_path / "data" / "test_vol_h5" / f"{name}.npy.h5") as file:
        assert np.array_equal(file["label"][()], smooth >= 0.5)
    grey = (smooth * 255).astype(np.uint8)  # the same as whole numbers
    root = volume_set(tmp_path / "grey", [grey] * 3)
    assert "grey values between 0 and 255" in refused(root, tmp_path / "new", capfd)


def test_a_threshold_for_a_described_data_set(tmp_path: Path, capfd: ERRORS):
    several = write_set(tmp_path / "several", NNUNET)
    told = refused(several, tmp_path / "data", capfd, "--label_threshold", "1")
    assert "has the 2 classes liver, tumour; leave it out" in told
    described = NNUNET | {"labels": {"background": 0, "liver": 1}}
    root = write_set(tmp_path / "raw", described)
    for path in (root / "labelsTr").iterdir():
        write_volume(path, (blocks()[:4, :11, :13] > 0).astype(np.uint8) * 255, placed("RAS"))
    assert run_prepare(root, tmp_path / "data") == 2
    assert "or --label_threshold N" in capfd.readouterr().err
    assert run_prepare(root, tmp_path / "data", "--label_threshold", "128") == 0
    assert stored_spec(tmp_path / "data").class_names == ("liver",)
    (path, *_) = (tmp_path / "data" / "test_vol_h5").iterdir()
    with h5py.File(path) as file:
        assert file["label"][()].sum() == (blocks()[:4, :11, :13] > 0).sum()


def test_more_values_than_classes_can_be(tmp_path: Path, capfd: ERRORS):
    numbers = np.zeros((SIDE, SIDE), np.uint16)
    numbers[1::2, 1::2] = np.arange(1, 577).reshape(24, 24)
    root = picture_set(tmp_path / "raw", [png(numbers)] * 4)
    told = refused(root, tmp_path / "data", capfd)
    assert "576 classes, expected at most 255" in told and "--label_threshold 1" in told
    assert run_prepare(root, tmp_path / "data", "--label_threshold", "1") == 0
    assert all(np.array_equal(v, numbers > 0) for v in stored_labels(tmp_path / "data").values())
