"""Pictures of slices: full size, letters of all sides, a scale bar, titles, the worst slices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.colours import label_colours
from datasets.intensity import CT, MR, PICTURE
from datasets.scans.volumes import Geometry
from evaluation import views
from evaluation.figures import draw_overlays
from evaluation.overlays import WORST_A_CASE, case_panel, worst_slices
from evaluation.views import View, framed, save_row, slice_place, slice_title, view_of, window_text

NAMES = ("liver", "gallbladder")
AXIAL = (1, 0, 0, 0, 1, 0, 0, 0, 1)
SAGITTAL = (0, 0, 1, 1, 0, 0, 0, -1, 0)  # columns run to the back, rows down, slices to the left
CORONAL = (1, 0, 0, 0, 0, 1, 0, -1, 0)  # columns run to the left, rows down, slices to the back


def geometry(direction: tuple[float, ...] = AXIAL, spacing: float = 1.0) -> Geometry:
    return Geometry((spacing, spacing, 5.0), (0.0, 0.0, -20.0), direction)


@pytest.mark.parametrize(
    ("direction", "flips", "sides"),
    [
        (AXIAL, (), "RLAP"),
        ((-1, 0, 0, 0, 1, 0, 0, 0, 1), (1,), "RLAP"),
        ((-1, 0, 0, 0, -1, 0, 0, 0, 1), (1, 0), "RLAP"),
        (SAGITTAL, (), "APSI"),
        (CORONAL, (), "RLSI"),
        ((0, 1, 0, 1, 0, 0, 0, 0, 1), (), "APRL"),  # columns run to the back, rows to the left
    ],
)
def test_the_sides_of_all_four_edges_are_known(
    direction: tuple[float, ...], flips: tuple[int, ...], sides: str
):
    view = view_of(geometry(direction))
    assert (view.flips, view.sides) == (flips, sides)
    assert view_of(None).sides is None


def test_oblique_slices_have_two_different_axes():
    rng = np.random.default_rng(0)
    for _ in range(200):
        turned, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        assert len(set(view_of(geometry(tuple(turned.ravel()))).sides)) == 4


def test_letters_and_bar_are_drawn_at_their_edges(monkeypatch: pytest.MonkeyPatch):
    written = []
    monkeypatch.setattr(views, "_write", lambda *args: written.append(args[1:4]))
    picture = np.zeros((400, 400, 3), np.uint8)
    framed(picture, view_of(geometry()))
    found = {text: place for place, text, _ in written}
    assert set(found) == {"R", "L", "A", "P", "100 mm"}
    assert found["R"][0] < 10 and found["L"][0] > 390 and found["R"][1] == found["L"][1] == 200
    assert found["A"][1] < 10 and found["P"][1] > 390 and found["A"][0] == found["P"][0] == 200
    written.clear()
    framed(picture, view_of(None))
    assert not written


@pytest.mark.parametrize("pixel", [0.01, 0.35, 0.7, 1.0, 3.0, 40.0])
@pytest.mark.parametrize("side", [90, 512, 3000])
def test_the_scale_bar_has_the_length_it_names(
    monkeypatch: pytest.MonkeyPatch, side: int, pixel: float
):
    written = []
    monkeypatch.setattr(views, "_write", lambda *args: written.append(args[2]))
    picture = np.asarray(framed(np.zeros((side, side, 3), np.uint8), View((), 1.0, None, pixel)))
    bar = np.count_nonzero((picture[-9] == 255).all(axis=1))
    length = float(written[0].removesuffix(" mm"))
    shown_pixel = pixel * side / picture.shape[1]
    assert bar == pytest.approx(length / shown_pixel, abs=1.5)
    assert 0.1 * picture.shape[1] <= bar <= 0.31 * picture.shape[1]
    assert length / 10 ** np.floor(np.log10(length) + 1e-9) == pytest.approx(
        round(length / 10 ** np.floor(np.log10(length) + 1e-9))
    )


@pytest.mark.parametrize(("side", "shown"), [(64, 320), (224, 448), (512, 512), (2000, 1024)])
def test_no_pixel_is_lost_up_to_1024(tmp_path: Path, side: int, shown: int):
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    view = View((), 1.0, None, None)
    found = np.asarray(framed(picture, view))
    assert found.shape == (shown, shown, 3)
    if side <= 1024:
        factor = shown // side
        assert np.array_equal(found, picture.repeat(factor, axis=0).repeat(factor, axis=1))
    save_row([picture] * 3, view, tmp_path / "row.png")
    assert Image.open(tmp_path / "row.png").size[1] == shown


def test_the_page_shows_slices_of_512_pixels_at_full_size():
    rng = np.random.default_rng(0)
    image = rng.random((9, 512, 512), dtype=np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[2:8, 200:300, 200:300] = 1
    panel = case_panel("a", image, label, label, NAMES)
    page = np.asarray(draw_overlays([panel], ["x"], NAMES))
    for picture in (*panel.truth, *panel.prediction):
        assert page.shape[1] >= 6 * 512
        assert picture.tobytes() in (
            page[top : top + 512, left : left + 512].tobytes()
            for top in range(60, 110)
            for left in range(10, page.shape[1] - 511, 518)
        )


def test_thick_voxels_are_shown_in_true_shape():
    picture = np.zeros((40, 200, 3), np.uint8)
    width, height = framed(picture, View((), 5.0, None, None)).size
    assert width == height


def test_titles_say_where_a_slice_lies():
    assert slice_title(13, 32, "S 50.0 mm") == "slice 14 of 32, S 50.0 mm"
    assert slice_title(13, 32, None) == "slice 14 of 32" and slice_title(0, 1, "S 1.0 mm") == ""
    assert [slice_place(geometry(), index) for index in (0, 4, 6)] == [
        "I 20.0 mm",
        "S 0.0 mm",
        "S 10.0 mm",
    ]
    sagittal = replace(geometry(SAGITTAL), origin=(-12.0, 0.0, 0.0))
    assert [slice_place(sagittal, index) for index in (0, 4)] == ["R 12.0 mm", "L 8.0 mm"]
    coronal = replace(geometry(CORONAL), origin=(0.0, -5.0, 0.0))
    assert [slice_place(coronal, index) for index in (0, 2)] == ["A 5.0 mm", "P 5.0 mm"]
    assert slice_place(None, 3) is None
    assert window_text(CT) == "window −125…275 HU"
    assert window_text(MR) == "percentiles 0.5…99.5" and window_text(PICTURE) == "values 0…255"


def two_organs(depth: int = 20) -> np.ndarray:
    """Return a large liver in all slices, and a gallbladder in slices 5…9."""
    label = np.zeros((depth, 60, 60), np.uint8)
    label[:, 5:55, 5:40] = 1
    label[5:10, 10:20, 45:55] = 2
    return label


def test_a_lost_small_organ_comes_before_the_rim_of_a_large_one():
    label = two_organs()
    prediction = label.copy()
    prediction[15, 5:55, 5:9] = 0  # 200 of 1750 voxels of the liver
    prediction[7, 10:20, 45:55] = 0  # all 100 voxels of the gallbladder
    first, second = worst_slices("a", label, prediction, NAMES, geometry())
    assert (first.index, first.organ, first.organ_wrong, first.wrong) == (
        7,
        "gallbladder",
        100,
        100,
    )
    # Sizes count both masks: the organ has 100 here, and 180 on average.
    assert first.error == pytest.approx(100 / np.mean([200, 200, 100, 200, 200]))
    assert (second.index, second.organ, second.wrong) == (15, "liver", 200)
    assert second.error == pytest.approx(200 / np.mean([3500] * 19 + [3300]))
    assert first.place == "S 15.0 mm" and first.picture == "slices/a_007.png"


def test_the_tip_of_an_organ_does_not_come_first():
    label = two_organs()
    prediction = label.copy()
    label[10, 12, 47] = 2  # a tip of a single voxel, lost
    prediction[6, 10:20, 45:52] = 0
    assert worst_slices("a", label, prediction, NAMES)[0].index == 6


def test_a_false_organ_counts():
    label = two_organs()
    label[label == 2] = 0
    prediction = two_organs()
    found = worst_slices("a", label, prediction, NAMES)
    assert found[0].organ == "gallbladder" and found[0].error == pytest.approx(1)


@pytest.mark.parametrize("depth", [1, 2, 3, 20, 150])
def test_worst_slices_are_no_neighbours(depth: int):
    label = two_organs(depth)
    prediction = np.zeros_like(label)
    prediction[:, 5:30, 5:40] = 1
    found = [worst.index for worst in worst_slices("a", label, prediction, NAMES)]
    assert 1 <= len(found) <= WORST_A_CASE
    if len(found) == 2:
        assert abs(found[0] - found[1]) > max(1, depth // 10)
    assert len(found) == (2 if depth > 2 else 1)
    assert worst_slices("a", label, label, NAMES) == []


def test_an_organ_has_its_colour_in_the_legend_and_the_slice():
    label = two_organs(3)
    panel = case_panel("a", np.zeros(label.shape, np.float32), label, label, NAMES)
    page = np.asarray(draw_overlays([panel], [""], NAMES)).reshape(-1, 3)
    for colour in label_colours(NAMES)[1:]:
        assert (page == colour).all(axis=1).any()
