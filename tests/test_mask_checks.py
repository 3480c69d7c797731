"""Which sets of label values can be classes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from common.errors import InputError
from preprocess.mask_checks import LabelFile, check_values


def seen(*labels: np.ndarray) -> list[LabelFile]:
    """Return what the checks see of labels (D, H, W)."""
    files = [LabelFile(f"{index}") for index in range(len(labels))]
    for file, label in zip(files, labels, strict=True):
        for plane in label:
            file.add(plane.astype(np.uint16))
    return files


def territories(values: Sequence[int], side: int, seed: int) -> np.ndarray:  # (3, H, W)
    """Return compact regions of these values, with background between some of them."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, side, (len(values), 2))
    grid = np.stack(np.meshgrid(range(side), range(side), indexing="ij"), -1)
    nearest = np.linalg.norm(grid[:, :, None] - points, axis=-1).argmin(-1)
    label = np.asarray(values)[nearest]
    label[ndimage.gaussian_filter(rng.normal(size=label.shape), 6) < 0] = 0
    return np.repeat(label[None], 3, 0)


MANY = {
    "117 in all": range(1, 118),
    "FreeSurfer": [
        0,
        2,
        3,
        4,
        5,
        7,
        8,
        10,
        11,
        12,
        13,
        17,
        18,
        41,
        42,
        43,
        49,
        251,
        252,
        1001,
        2035,
    ],
    "in steps of 85": [85, 170, 255],
    "CholecSeg8k": [5, 11, 12, 13, 21, 22, 23, 24, 25, 31, 32, 33, 50],
    "BraTS": [1, 2, 4],
}


@pytest.mark.parametrize("name", MANY)
def test_many_classes_are_accepted(name: str):
    check_values(seen(*(territories(MANY[name], 90, seed) for seed in range(3))))


def test_thin_classes_and_noise_are_accepted():
    ring = np.hypot(*(np.mgrid[:40, :40] - 20))[None]
    check_values(seen(np.where(ring < 6, 3, np.where(ring < 7.5, 2, 0))))  # a thin myocardium
    check_values(seen(np.where(ring < 6, 2, np.where(ring < 7, 1, 0))))  # a border of nuclei
    noise = np.random.default_rng(0).integers(0, 6, (2, 14, 14))
    check_values(seen(noise, noise[::-1]))


def test_classes_that_never_meet_are_accepted_if_they_are_numbered():
    check_values(seen(*(disk(value) for value in (1, 2, 3, 1))))
    with pytest.raises(InputError, match="never meet"):
        check_values(seen(disk(1), disk(3)))


def test_counted_objects_and_heat_maps_are_refused():
    blobs = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(160, 160)), 3) > 0
    objects = ndimage.label(blobs)[0][None]
    with pytest.raises(InputError, match=r"objects \(instances\) .* --label_threshold 1"):
        check_values(seen(objects, np.where(objects < 15, objects, 0)))
    distance = np.hypot(*(np.mgrid[:120, :120] - 60))[None]
    with pytest.raises(InputError, match="grey values"):
        check_values(seen((255 * np.exp(-(distance**2) / 2000)).astype(int)))


def disk(value: int) -> np.ndarray:  # (1, H, W)
    return np.where(np.hypot(*(np.mgrid[:30, :30] - 15)) < 8, value, 0)[None]


def drawn(kind: str, side: int, seed: int) -> Image.Image:
    """Return a mask of 0 and 255 with hard edges."""
    rng = np.random.default_rng(seed)
    picture = Image.new("L", (side, side))
    draw = ImageDraw.Draw(picture)
    corner, size = rng.uniform(0.1, 0.4, 2) * side, rng.uniform(0.2, 0.5, 2) * side
    if kind == "vessels":
        for _ in range(6):
            points = [tuple(point) for point in rng.uniform(0, side, (4, 2)).tolist()]
            draw.line(points, fill=255, width=int(rng.integers(1, 4)))
    else:
        shape = {"disk": draw.ellipse, "box": draw.rectangle}[kind]
        shape([*corner.round().tolist(), *(corner + size).round().tolist()], fill=255)
    return picture


def as_jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def save(picture: Image.Image) -> Image.Image:
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=quality)
        return Image.open(content)

    return save


def as_scaled(factor: float, way: str) -> Callable[[Image.Image], Image.Image]:
    filter_ = Image.Resampling[way]
    return lambda picture: picture.resize([round(s * factor) for s in picture.size], filter_)


SPOILT = {f"JPEG {quality}": as_jpeg(quality) for quality in (50, 75, 95, 100)} | {
    f"{way} {factor}": as_scaled(factor, way)
    for way in ("BILINEAR", "BICUBIC", "LANCZOS", "BOX")
    for factor in (0.3, 0.5, 1.5, 4)
}


@pytest.mark.parametrize("kind", ["disk", "box", "vessels"])
@pytest.mark.parametrize("side", [64, 200])
def test_what_compression_and_scaling_do_is_refused(kind: str, side: int):
    clean = [drawn(kind, side, seed) for seed in range(3)]
    check_values(seen(*(np.asarray(picture)[None] for picture in clean)))
    for name, spoil in SPOILT.items():
        labels = [np.asarray(spoil(picture))[None] for picture in clean]
        if len(np.unique(np.concatenate([label.ravel() for label in labels]))) == 2:
            continue  # nothing was spoilt
        with pytest.raises(InputError, match="grey value"):
            check_values(seen(*labels))
            pytest.fail(name)


def test_values_at_edges_alone_are_warned_of(capsys: pytest.CaptureFixture[str]):
    ring = np.hypot(*(np.mgrid[:60, :60] - 30))[None]
    organs = np.where(ring < 10, 4, np.where(ring < 20, 2, 0))
    check_values(seen(organs))
    assert not capsys.readouterr().err
    scaled = np.rint(ndimage.zoom(organs[:, ::2, ::2], (1, 2, 2), order=1))  # 1 and 3 are between
    check_values(seen(scaled))
    assert "some label values occur only at edges" in capsys.readouterr().err
    border = np.where(abs(ring - 20) < 1, 255, organs)
    check_values(seen(border))
    assert "(255 in 0)" in capsys.readouterr().err


def test_a_few_counted_objects_are_warned_of(capsys: pytest.CaptureFixture[str]):
    cells = np.kron(np.arange(1, 10).reshape(1, 3, 3), np.ones((1, 8, 8)))
    check_values(seen(*(np.where(cells <= count, cells, 0) for count in (3, 5, 7))))
    assert "up to 7; if they count objects" in capsys.readouterr().err
    check_values(seen(*(np.where(cells <= count, cells, 0) for count in (1, 2, 3))))
    assert not capsys.readouterr().err
