"""`viewer.html` in a browser: colours at their places, left is left, controls, no request."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.colours import label_colours
from datasets.intensity import WINDOW, Intensity
from datasets.scans.geometry import Geometry
from datasets.scans.orientation import reorient, reorient_geometry
from evaluation.overlays import worst_slices
from evaluation.viewer import ViewedCase, write_viewer
from evaluation.viewer_case import Picture, encode_case, write_case_part
from evaluation.viewer_library import INSTALL, find_library

CHROMIUM = shutil.which("chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium"),
    pytest.mark.skipif(find_library() is None, reason=f"needs NiiVue: {INSTALL}"),
]
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
NAMES = ["liver", "spleen"]  # the liver lies at the patient's right, the spleen at the left
LIVER, SPLEEN = label_colours(NAMES)[1:].astype(int)
GREY = 255 * 125 // 400  # of 0 HU in the window −125…275
HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\">"
CT = Intensity(WINDOW, -125, 275)
EVEN = Geometry((2.0, 2.0, 6.0), (0.0, 0.0, 0.0), (1, 0, 0, 0, 1, 0, 0, 0, 1))  # LPS
ANGLE = np.deg2rad(15)
OBLIQUE = Geometry(
    EVEN.spacing,
    (5.0, -40.0, 9.0),
    (np.cos(ANGLE), -np.sin(ANGLE), 0, np.sin(ANGLE), np.cos(ANGLE), 0, 0, 0, 1),
)


def phantom() -> np.ndarray:  # (12, 40, 60) uint8, axes towards left, back, head
    """Slices 2…9 hold the liver at the right and front, slices 4…9 the spleen at left and back."""
    labels = np.zeros((12, 40, 60), np.uint8)
    labels[2:10, 8:18, 8:24] = 1
    labels[4:10, 26:34, 40:54] = 2
    return labels


def encoded(name: str, letters: str, geometry: Geometry, truth: np.ndarray | None = None) -> dict:
    """The phantom, turned to an orientation."""
    labels = phantom()
    place = reorient_geometry(geometry, labels.shape, letters)
    turn = [
        None if one is None else np.ascontiguousarray(reorient(one, "LPS", letters))
        for one in (labels, truth)
    ]
    worst = [] if truth is None else worst_slices(name, turn[1], turn[0], NAMES, place)
    grey = np.full(turn[0].shape, 0.0, np.float32)
    picture = Picture(grey, CT, (-125.0, 275.0))
    return encode_case(name, picture, turn[0], turn[1], geometry=place, voxel_ml=0.024, worst=worst)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("viewer")
    truth = phantom()
    truth[7, 26:34, 40:54] = 0  # in slice 8, the whole spleen is false
    truth[2:10, 8:18, 8:11] = 0
    cases = [
        encoded(HOSTILE, "LPS", EVEN),
        encoded("RAS", "RAS", EVEN),
        encoded("oblique", "LPS", OBLIQUE),
        encoded("sagittal", "PSR", EVEN),
        encoded("tested", "LPS", EVEN, truth),
    ]
    listed = []
    for number, case in enumerate(cases):
        write_case_part(folder / f"{number}.view", case)
        listed.append(ViewedCase(case["name"], folder / f"{number}.view"))
    write_viewer(folder / "viewer.html", listed, NAMES, HOSTILE)
    return folder / "viewer.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


class Viewer:
    """The page in a browser."""

    def __init__(self, page: sync_api.Page, file: Path) -> None:
        self.page, self.requests, self.troubles = page, [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.goto(file.as_uri())

    def open(self, case: int) -> None:
        if self.page.get_attribute("body", "data-ready") is not None:
            self.page.select_option("#case", index=case)
        self.page.wait_for_selector(f"body[data-ready='{case}']", timeout=60_000)

    def picture(self, canvas: str = "#left") -> np.ndarray:  # (H, W, 3)
        self.page.evaluate("new Promise((seen) => requestAnimationFrame(() => seen()))")
        shot = self.page.locator(canvas).screenshot()
        return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)

    def centre(self, colour: np.ndarray, canvas: str = "#left") -> np.ndarray | None:
        """The mean place (x, y) of the pixels of a colour; None: there are not 20 of them."""
        near = np.abs(self.picture(canvas) - colour).max(axis=-1) < 12
        found = np.argwhere(near)
        return found.mean(axis=0)[::-1] if len(found) > 20 else None

    def opaque(self) -> None:
        self.page.evaluate(
            "(e) => {e.value = 100; e.dispatchEvent(new Event('input'))}",
            self.page.query_selector("#opacity"),
        )

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()


@pytest.fixture(scope="module")
def viewer(browser: sync_api.Browser, page_file: Path) -> Viewer:
    shown = Viewer(browser.new_page(viewport={"width": 1300, "height": 850}), page_file)
    shown.open(0)
    shown.opaque()
    return shown


@pytest.mark.parametrize("case", [0, 1, 2, 3], ids=["LPS", "RAS", "oblique", "sagittal"])
def test_left_is_left_in_every_plane_and_orientation(viewer: Viewer, case: int):
    viewer.open(case)
    viewer.page.keyboard.press("1")
    middle = np.array(viewer.picture().shape[1::-1]) / 2
    liver, spleen = viewer.centre(LIVER), viewer.centre(SPLEEN)
    assert liver[0] < middle[0] < spleen[0]  # radiological: the patient's right is at the left
    assert liver[1] < spleen[1]  # the front is at the top
    viewer.page.keyboard.press("2")
    found = [viewer.centre(colour) for colour in (LIVER, SPLEEN)]
    assert all(one is None or (one[0] < middle[0]) == (i == 0) for i, one in enumerate(found))
    viewer.page.keyboard.press("1")


def test_voxels_have_their_true_shape(viewer: Viewer):
    viewer.open(0)
    viewer.page.keyboard.press("2")
    viewer.page.fill("#slice", "12")  # through the liver
    rows, columns = np.nonzero(np.abs(viewer.picture() - LIVER).max(axis=-1) < 12)
    # 16 voxels of 2 mm wide, 8 of 6 mm high
    assert np.ptp(rows) / np.ptp(columns) == pytest.approx(48 / 32, rel=0.05)
    viewer.press("axial")


def test_an_organ_goes_and_comes_with_its_box(viewer: Viewer):
    viewer.open(0)
    assert viewer.centre(SPLEEN) is not None
    viewer.page.uncheck("#organ-2")
    assert viewer.centre(SPLEEN) is None and viewer.centre(LIVER) is not None
    viewer.page.check("#organ-2")
    assert viewer.centre(SPLEEN) is not None
    viewer.page.keyboard.press("o")
    assert viewer.centre(SPLEEN) is None and viewer.centre(LIVER) is None
    viewer.page.keyboard.press("o")


def test_the_slider_and_keys_change_the_slice(viewer: Viewer):
    viewer.open(0)
    viewer.page.fill("#slice", "3")
    assert viewer.text("#place").startswith("axial slice 4 of 12 · ")
    assert viewer.centre(LIVER) is not None and viewer.centre(SPLEEN) is None
    viewer.page.evaluate("document.activeElement.blur()")
    viewer.page.keyboard.press("ArrowUp")
    assert viewer.text("#place").startswith("axial slice 5 of 12 · ")
    assert viewer.centre(SPLEEN) is not None


def test_a_click_tells_place_value_and_organ(viewer: Viewer):
    viewer.open(0)
    x, y = viewer.centre(LIVER)
    viewer.page.locator("#left").click(position={"x": x, "y": y})
    place, under = viewer.text("#place"), viewer.text("#under")
    assert under == "value 1 HU · liver" or under == "value −2 HU · liver"
    found = dict(re.findall(r"([RLAPSI]) (\d+\.\d)", place))
    # The middle of the liver is at 2 · 15.5 mm to the left of the origin and 2 · 12.5 mm behind it.
    assert float(found["L"]) == pytest.approx(31, abs=2.1)
    assert float(found["P"]) == pytest.approx(25, abs=2.1)


def test_volumes_are_listed_in_ml(viewer: Viewer):
    viewer.open(0)
    cells = viewer.page.locator("#organs tbody tr td:nth-child(3)").all_inner_texts()
    counts = [int((phantom() == value).sum()) for value in (1, 2)]
    assert [float(text) for text in cells] == pytest.approx([0.024 * n for n in counts], rel=0.01)


def test_a_worst_slice_is_where_the_button_goes_and_errors_have_their_colour(viewer: Viewer):
    viewer.open(4)
    viewer.page.fill("#slice", "0")
    button = viewer.page.locator("#worst button").first
    assert button.inner_text().startswith("slice 8: spleen 55 % wrong, 142 wrong voxels")
    button.click()
    assert viewer.text("#place").startswith("axial slice 8 of 12")
    viewer.press("errors")
    false = viewer.centre(np.array([255, 80, 60]))
    viewer.press("prediction")
    np.testing.assert_allclose(viewer.centre(SPLEEN)[0] > false[0], True)
    viewer.press("truth")
    assert viewer.centre(SPLEEN) is None and viewer.centre(LIVER) is not None
    viewer.press("side by side")
    assert viewer.centre(SPLEEN) is None and viewer.centre(SPLEEN, "#right") is not None
    viewer.page.evaluate("document.activeElement.blur()")
    viewer.page.keyboard.press("ArrowDown")
    assert viewer.centre(SPLEEN) is not None and viewer.centre(SPLEEN, "#right") is not None
    viewer.press("prediction + outline of truth")


def test_three_dimensions_show_the_organs(viewer: Viewer):
    viewer.open(0)
    viewer.press("3-D")
    picture = viewer.picture()
    hues = picture / np.maximum(1, picture.max(axis=-1, keepdims=True))
    lit = picture.max(axis=-1) > 60
    for colour in (LIVER, SPLEEN):  # shaded, so the hue alone is known
        assert (lit & (np.abs(hues - colour / colour.max()).max(axis=-1) < 0.15)).sum() > 50
    viewer.press("axial")


def test_nothing_is_requested_and_hostile_names_stay_text(viewer: Viewer, page_file: Path):
    assert viewer.requests == [page_file.as_uri()] and viewer.troubles == []
    assert viewer.page.title() == HOSTILE
    assert viewer.page.locator("#case option").first.inner_text() == HOSTILE
    blocked = viewer.page.evaluate("fetch('https://example.org').then(() => 0, () => 1)")
    assert blocked == 1


def test_letters_stand_at_the_edges_of_the_slice_whatever_the_shape_of_the_window(viewer: Viewer):
    viewer.open(0)
    viewer.page.keyboard.press("1")
    viewer.page.get_by_label("all organs").uncheck()
    try:
        for width, height in ((1300, 500), (700, 1000), (700, 600)):
            viewer.page.set_viewport_size({"width": width, "height": height})
            viewer.page.wait_for_function(
                "(c) => c.width === c.offsetWidth && c.height === c.offsetHeight",
                arg=viewer.page.query_selector("#left"),
            )
            picture = viewer.picture()
            assert picture.shape[0] <= 0.74 * height  # the slider below is not covered
            slice_ = np.argwhere(np.abs(picture - GREY).max(axis=-1) < 12)
            first, last = slice_.min(axis=0), slice_.max(axis=0)
            white = picture.min(axis=-1) > 200
            white[[*range(4), *range(-4, 0)]] = white[:, [*range(4), *range(-4, 0)]] = False
            letters = np.argwhere(white)  # without the page at the round corners
            place = np.abs((letters - (first + last) / 2) / (last - first)).max(axis=1)
            assert len(letters) and (place > 0.4).all() and (place < 0.55).all()
    finally:
        viewer.page.set_viewport_size({"width": 1300, "height": 850})
        viewer.page.get_by_label("all organs").check()


def test_a_phone_has_no_horizontal_scroll_and_taps_move_the_crosshair(browser, page_file: Path):
    context = browser.new_context(
        viewport={"width": 400, "height": 800}, has_touch=True, color_scheme="dark"
    )
    phone = Viewer(context.new_page(), page_file)
    phone.open(0)
    phone.opaque()
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 400
    before = phone.text("#place")
    box, (x, y) = phone.page.locator("#left").bounding_box(), phone.centre(LIVER)
    finger = context.new_cdp_session(phone.page)
    point = {"x": box["x"] + x, "y": box["y"] + y}
    finger.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
    phone.page.wait_for_timeout(100)  # as long as a tap lasts
    finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    phone.page.wait_for_function(
        "was => document.getElementById('place').innerText != was", arg=before
    )
    assert phone.text("#under").endswith("liver")
    context.close()


def test_without_webgl_the_page_says_so(browser, page_file: Path):
    page = browser.new_page()
    page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    page.goto(page_file.as_uri())
    page.wait_for_selector("#trouble:not([hidden])")
    assert "no WebGL 2" in page.inner_text("#trouble")
    page.close()
