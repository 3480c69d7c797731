"""demo.py in a browser: drop, result, clicks, downloads, the corrected folder, bad uploads, end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_model
from test_demo import SPEC
from test_demo_uploads import packed
from test_scans import placed

import demo as program
from common.errors import InputError
from datasets.scans.volumes import read_volume, write_volume
from demo_page.server import HOST
from demo_page.sessions import UPLOADS
from evaluation.viewer_library import INSTALL, find_library
from preprocess import prepare

CHROMIUM = shutil.which("chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
pytest.importorskip("gradio", reason="needs pip install -r requirements-demo.txt")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium"),
    pytest.mark.skipif(find_library() is None, reason=f"needs NiiVue: {INSTALL}"),
]
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
REPOSITORY = Path(__file__).resolve().parent.parent
PLACE = placed("LPS", oblique=False)
WAIT = 60_000  # ms


def free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return one.getsockname()[1]


class Demo:
    """demo.py as a process, in an empty folder of its own."""

    def __init__(self, folder: Path, adapter: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        words = [sys.executable, str(REPOSITORY / "demo.py"), "--lora_ckpt", str(adapter)]
        words += ["--device", "cpu", "--port", str(self.port), "--max_upload_mb", "1"]
        self.process = subprocess.Popen(
            words,
            cwd=folder,
            env=os.environ | {"TMPDIR": str(self.temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("open http"):
                return
        raise AssertionError("".join(self.lines))

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}/"

    def sockets(self) -> set[tuple[str, str]]:
        """The hosts (own, other) of the sockets of the process and its children."""
        own = set()
        for pid in (self.process.pid, *children(self.process.pid)):
            for file in Path(f"/proc/{pid}/fd").iterdir():
                if (target := str(file.readlink())).startswith("socket:["):
                    own.add(target[8:-1])
        found = set()
        for table in ("tcp", "tcp6", "udp", "udp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                cells = line.split()
                if cells[9] in own:
                    found.add((cells[1].split(":")[0], cells[2].split(":")[0]))
        return found

    def files(self) -> list[Path]:
        """What lies in the private folder."""
        return [path for path in self.temporary.rglob("*") if path.is_file()]


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("demo")
    model = tiny_model()
    model.train_all_weights()
    settings: dict[str, Any] = {"vit_name": "vit_tiny", "img_size": 64, "num_classes": 2}
    settings |= {"class_names": list(SPEC.class_names), "spec": SPEC.to_json()}
    model.save_lora_parameters(folder / "adapter.pth", settings)
    started = Demo(folder, folder / "adapter.pth")
    yield started
    started.process.kill()
    started.process.wait()


class Tab:
    """The page in a browser; it notes every request and every error of a script."""

    def __init__(self, page: sync_api.Page, demo: Demo) -> None:
        self.page, self.requests, self.troubles = page, [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.goto(demo.address)
        page.wait_for_selector("#scan input[type=file]", state="attached", timeout=WAIT)

    def drop(self, path: Path) -> None:
        if not self.page.locator("#scan input[type=file]").count():
            self.page.locator("#scan [aria-label='Clear']").click()
        self.page.set_input_files("#scan input[type=file]", path)

    def told(self, text: str, where: str = "#status") -> str:
        """Wait until a part of the page says a text; return all that it says."""
        self.page.locator(where, has_text=text).wait_for(timeout=WAIT)
        return self.page.inner_text(where)

    def picture(self) -> str:
        """The address of the slice that is shown."""
        return self.page.get_attribute("#slice img", "src")

    def top(self, selector: str) -> float:
        """Where a part begins, in pixels from the top of the page."""
        place = "one => one.getBoundingClientRect().top + window.scrollY"
        return self.page.locator(selector).evaluate(place)

    def download(self, text: str, path: Path) -> Path:
        with self.page.expect_download(timeout=WAIT) as waiting:
            self.page.get_by_role("link", name=text, exact=True).click()
        assert waiting.value.suggested_filename == f"new_labels{text}"
        waiting.value.save_as(path)
        return path


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def tab(browser: sync_api.Browser, demo: Demo) -> Tab:
    return Tab(browser.new_page(viewport={"width": 1280, "height": 850}), demo)


def scan(path: Path, seed: int = 0) -> Path:
    values = np.random.default_rng(seed).integers(-200, 300, (4, 24, 30)).astype(np.int16)
    write_volume(path, values, PLACE)
    return path


def test_bad_uploads_are_one_sentence_and_leave_nothing(tab: Tab, demo: Demo, tmp_path: Path):
    assert "Not a medical device" in tab.page.inner_text("body")
    damaged = tmp_path / "damaged.nii.gz"
    damaged.write_bytes(b"no scan at all")
    text = tmp_path / "note.txt"
    text.write_text("x")
    evil = packed(tmp_path / "evil.zip", {"../../evil.nii.gz": b"x"})
    for path, words in (
        (damaged, "damaged.nii.gz is not a readable scan"),
        (text, "note.txt is not a scan or picture"),
        (evil, "leads to another folder"),
    ):
        tab.drop(path)
        told = tab.told(words)
        assert "\n" not in told.strip() and "samed-demo" not in told
        assert not tab.page.is_visible("#result") and demo.files() == []
    large = tmp_path / "large.nii.gz"
    large.write_bytes(bytes(2 << 20))
    tab.drop(large)
    tab.page.get_by_text("exceed the maximum allowed size").wait_for(timeout=WAIT)
    assert demo.files() == []


def test_a_scan_is_segmented_shown_corrected_downloaded_and_written(
    tab: Tab, demo: Demo, tmp_path: Path
):
    tab.drop(scan(tmp_path / "new.nii.gz"))
    tab.told("new is segmented")
    frame = tab.page.frame_locator("#viewer iframe")
    frame.locator("body[data-ready='0']").wait_for(timeout=WAIT)
    assert "liver" in frame.locator("#organs").inner_text()
    before, place = read_volume(tab.download(".nii.gz", tmp_path / "a.nii.gz"))
    assert place.matches(PLACE) and set(np.unique(before)) <= {0, 1, 6}
    for suffix in (".nrrd", ".seg.nrrd", ".mha"):
        same, _ = read_volume(tab.download(suffix, tmp_path / f"b{suffix}"))
        assert np.array_equal(same, before)

    tab.page.click("#start")
    tab.page.wait_for_selector("#slice img", timeout=WAIT)
    assert tab.picture().startswith("data:image/png")
    top = tab.top("#slice")
    box = tab.page.locator("#slice img").bounding_box()
    tab.page.locator("#slice img").click(position={"x": box["width"] / 2, "y": box["height"] / 2})
    tab.told("1 click;", "#said")
    assert tab.top("#said") < tab.top("#slice") == top  # the next click lands where it is aimed
    assert "after correction" in tab.page.inner_text("#volumes")
    after, _ = read_volume(tab.download(".nii.gz", tmp_path / "c.nii.gz"))
    changed = after != before
    assert changed.any() and {6} <= set(np.unique(after[changed] | before[changed]))
    assert len(np.unique(np.nonzero(changed)[0])) == 1  # only in the slice that was clicked
    assert ((after == 6) | (before == 6))[changed].all()  # only the liver changed
    tab.page.click("#undo")
    tab.told("0 clicks; nothing is corrected", "#said")
    assert "after correction" not in tab.page.inner_text("#volumes")
    tab.page.click("#write")
    tab.told("nothing is corrected yet", "#said")
    tab.page.locator("#slice img").click(position={"x": box["width"] / 2, "y": box["height"] / 2})
    tab.told("1 click;", "#said")
    tab.page.click("#write")
    told = tab.told("preprocess.prepare", "#said")
    written, _ = read_volume(demo.folder / "corrected" / "labels" / "new.nii.gz")
    assert np.array_equal(written, after)
    words = told.partition("preprocess.prepare ")[2].split()  # as the page says
    words = [
        {"corrected": demo.folder / word, "DATA": tmp_path / "data"}.get(word, word)
        for word in words
    ]
    prepare.main([*map(str, words), "--workers", "1"])
    assert len(list((tmp_path / "data" / "train_npz").glob("*.npz"))) == 4


def test_after_an_error_pictures_are_still_shown_and_never_files(tab: Tab, demo: Demo):
    tab.page.click("#undo")
    tab.told("0 clicks", "#said")
    tab.page.click("#undo")
    tab.told("no click to take back", "#said")
    before, number = tab.picture(), tab.page.locator("#number input[type=number]")
    number.fill("2" if number.input_value() == "1" else "1")  # the slider shows another slice
    picture = tab.page.locator("#slice img")
    sync_api.expect(picture).not_to_have_attribute("src", before, timeout=WAIT)
    picture.evaluate("one => one.decode()")  # fails if it is broken
    picture.click()
    tab.told("1 click;", "#said")
    assert tab.picture().startswith("data:image/png")
    assert [path for path in demo.files() if UPLOADS in path.parts] == []


def test_a_number_beyond_the_slices_shows_the_nearest_one(tab: Tab):
    number = tab.page.locator("#number input[type=number]")
    pictures = []
    for typed in ("3", "99", "0", "4", "1"):  # of 4 slices
        before = tab.picture()
        number.fill(typed)
        shown = sync_api.expect(tab.page.locator("#slice img"))
        shown.not_to_have_attribute("src", before, timeout=WAIT)
        pictures.append(tab.picture())
    assert pictures[1] == pictures[3] and pictures[2] == pictures[4]
    number.fill("")
    assert "expected 1…4" in tab.told("no slice", "#said")
    assert not tab.page.get_by_text("maximum value").count()  # as Gradio would tell it


def test_the_next_scan_begins_without_the_messages_of_the_one_before(tab: Tab, tmp_path: Path):
    tab.page.locator("#number input[type=number]").fill("")
    tab.told("no slice", "#said")
    tab.drop(scan(tmp_path / "new.nii.gz"))
    tab.page.locator("#start").wait_for(timeout=WAIT)
    assert not tab.page.inner_text("#said").strip()


def test_two_tabs_do_not_mix_and_a_closed_one_leaves_nothing(
    browser: sync_api.Browser, tab: Tab, demo: Demo, tmp_path: Path
):
    second = Tab(browser.new_page(viewport={"width": 400, "height": 800}), demo)
    slices = {"other.nii.gz": scan(tmp_path / "other.nii.gz", seed=1).read_bytes()}
    second.drop(packed(tmp_path / "zipped.zip", slices))
    second.told("other is segmented")
    assert "new is segmented" in tab.page.inner_text("#status")
    assert second.page.evaluate("document.documentElement.scrollWidth") <= 400
    label = second.page.locator("#scan > label").bounding_box()
    clear = second.page.locator("#scan [aria-label='Clear']").bounding_box()
    assert label["x"] + label["width"] < clear["x"]
    addresses = [one.page.get_attribute("#downloads a >> nth=0", "href") for one in (tab, second)]
    assert addresses[0] != addresses[1]
    own = [path for path in demo.files() if "other" in path.name]
    assert own
    for path in ("/etc/passwd", str(own[0]), f"{own[0].parent}/../x"):
        for route in ("gradio_api/file=", "file="):
            found = second.page.request.get(f"{demo.address}{route}{path}")
            assert found.status in (403, 404) and "root:" not in found.text()
    assert second.troubles == []
    second.page.close()
    end = time.monotonic() + 20
    while (left := [path for path in own if path.exists()]) and time.monotonic() < end:
        time.sleep(0.2)
    assert left == []
    assert second.page.is_closed() and "new" in str(demo.files())


def test_no_request_leaves_this_computer(tab: Tab, demo: Demo):
    hosts = {url.split("/")[2] for url in tab.requests if url.startswith("http")}
    assert hosts == {f"{HOST}:{demo.port}"} and tab.troubles == []
    local, nobody = "0100007F", "00000000"  # as /proc/net/tcp writes 127.0.0.1
    assert demo.sockets() >= {(local, nobody)}
    assert demo.sockets() <= {(local, nobody), (local, local)}
    refused = tab.page.evaluate("fetch('https://example.org').then(() => 0, () => 1)")
    assert refused == 1


def test_a_port_in_use_is_one_sentence_that_names_another(demo: Demo):
    words = ["--lora_ckpt", str(demo.folder / "adapter.pth"), "--device", "cpu"]
    with pytest.raises(InputError, match=rf"{demo.port} of 127.0.0.1 is in use.*--port \d+$"):
        program.main([*words, "--port", str(demo.port)])


def test_a_signal_ends_it_and_deletes_every_file(tab: Tab, demo: Demo):
    assert demo.files()
    demo.process.send_signal(signal.SIGTERM)
    assert demo.process.wait(timeout=30) == 128 + signal.SIGTERM
    assert list(demo.temporary.iterdir()) == []
    names = {path.name for path in demo.folder.iterdir()}
    assert names == {"adapter.pth", "temporary", "corrected"}
    assert "Traceback" not in demo.process.stdout.read()
