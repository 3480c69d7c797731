"""The page of demo.py without a browser: sessions, addresses, clicks, downloads, flags."""

from __future__ import annotations

import os
import socket
import stat
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import tiny_model
from PIL import Image
from test_scans import placed

import demo
from common.errors import InputError
from config.flags import demo_parser, predict_parser
from config.settings import parse_args
from correction.prompts import Click
from datasets.intensity import WINDOW, Intensity
from datasets.registry import DatasetSpec
from datasets.scans.files import scan_file
from datasets.scans.orientation import reorient_geometry
from datasets.scans.volumes import write_volume
from demo_page.correcting import Correction
from demo_page.network import SharedNetwork, predict_flags
from demo_page.server import HOST, Guard, bind, results_route
from demo_page.sessions import Sessions, Stopped, private_folder
from demo_page.texts import volumes

SPEC = DatasetSpec(
    name="two",
    class_names=("liver", "spleen"),
    raw_labels={1: 1, 2: 2},
    ignored_labels=(),
    predicted_values=(6, 1),
    intensity=Intensity(WINDOW, -125, 275),
    orientation="LPS",
)


def test_the_private_folder_is_of_this_user_alone_and_goes_with_all_that_libraries_left():
    before = tempfile.gettempdir()
    with private_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (Path(tempfile.mkdtemp()) / "left").write_text("x")
        assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(folder / "tmp")
    assert not folder.exists() and tempfile.gettempdir() == before


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    (tmp_path / "uploads" / "hash").mkdir(parents=True)
    return Sessions(tmp_path)


def sent(sessions: Sessions, name: str = "scan.nii.gz") -> Path:
    path = sessions.uploads / "hash" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(name)
    return path


def test_a_session_takes_only_what_was_uploaded(sessions: Sessions, tmp_path: Path):
    link = sessions.uploads / "link.nii.gz"
    link.symlink_to("/etc/passwd")
    other = sessions.open("other").take(sent(sessions))
    for path in ("/etc/passwd", "../x", f"{sessions.uploads}/../secret", str(link), str(other)):
        (tmp_path / "secret").write_text("x")
        with pytest.raises(InputError, match="not there any more"):
            sessions.uploaded({"path": path})
    for data in (None, [], {"path": None}, {"url": "x"}):
        with pytest.raises(InputError, match="not there any more"):
            sessions.uploaded(data)


def test_two_tabs_have_their_own_files_and_a_closed_one_leaves_none(sessions: Sessions):
    first, second = sessions.open("a"), sessions.open("b")
    one = first.take(sessions.uploaded({"path": str(sent(sessions))}))
    two = second.take(sessions.uploaded({"path": str(sent(sessions))}))
    assert one != two and one.is_file() and two.is_file() and not any(sessions.uploads.iterdir())
    token = first.token
    assert sessions.by_token(token) is first and sessions.by_token(second.token) is second
    first.take(sent(sessions, "next.nrrd"))
    assert not one.exists() and sessions.by_token(token) is None  # the scan before is gone
    sessions.close("a")
    assert not first.folder.exists() and two.is_file()
    with pytest.raises(Stopped):
        sessions.go_on(first)
    sessions.go_on(second)
    with pytest.raises(InputError, match="load the page again"):
        sessions.find("a")


def test_messages_do_not_name_the_private_folder(sessions: Sessions):
    session = sessions.open("a")
    path = session.take(sent(sessions))
    assert session.words(InputError(f"{path} is damaged")) == "scan.nii.gz is damaged"


def asked(path: str, method: str = "GET", port: int = 7860, **headers: str) -> int | None:
    given = {"host": "127.0.0.1:7860"} | headers
    pairs = [(name.encode(), text.encode()) for name, text in given.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": pairs}
    return Guard(None, port).refusal(scope)


def test_only_the_page_itself_is_served_and_only_to_itself():
    assert [asked(path) for path in ("/", "/config", "/assets/a.js", "/result/t/viewer.html")] == (
        [None] * 4
    )
    assert asked("/gradio_api/upload", "POST", origin="http://127.0.0.1:7860") is None
    for path in (
        "/gradio_api/file=/etc/passwd",
        "/file=/etc/passwd",
        "/assets/../x",
        "/gradio_api/proxy=https://example.org",
        "/gradio_api/info",
        "/gradio_api/runs",
        "/monitoring",
        "/manifest.json",
        "/docs",
    ):
        assert asked(path) == 404, path
    assert asked("/gradio_api/run/x", "POST") == asked("/", "PUT") == 404
    assert asked("/", host="evil.example:7860") == 421  # a name that leads to 127.0.0.1
    assert asked("/gradio_api/upload", "POST", origin="https://evil.example") == 403
    own = {"host": "localhost", "origin": "http://localhost"}  # as browsers name port 80
    assert asked("/", port=80, **own) is None and asked("/", **own) == 421


def test_results_are_served_by_their_token_alone(sessions: Sessions):
    session, other = sessions.open("a"), sessions.open("b")
    for one in (session, other):
        one.output.mkdir(parents=True)
        (one.output / "viewer.html").write_text("x")
        one.scan = scan_file(Path("s.nii.gz"), ".nii.gz")
        one.result = {"case": "s", "file": "s.nii.gz"}
    serve = results_route(sessions, lambda session, suffix: session.output / "viewer.html")
    assert serve(session.token, "viewer.html").path == session.output / "viewer.html"
    told = serve(session.token, "labels.mha").headers["content-disposition"]
    assert 'filename="s_labels.mha"' in told  # beside the scan itself, s.mha
    for name in ("../b/viewer.html", "labels.png", "labels/etc/passwd", "", "predictions.json"):
        assert serve(session.token, name).status_code == 404
    assert serve("x" * 32, "viewer.html").status_code == 404
    sessions.close("a")
    assert serve(session.token, "viewer.html").status_code == 404


def test_it_listens_on_this_computer_alone_and_a_taken_port_is_one_sentence():
    with bind(0) as listening:
        host, port = listening.getsockname()
        assert host == HOST == "127.0.0.1"
        told = rf"port {port} of 127.0.0.1 is in use.*--port"
        with pytest.raises(InputError, match=told):
            bind(port)
    with socket.socket() as free:
        assert free.connect_ex((HOST, port)) != 0


def test_without_a_network_or_gradio_one_sentence_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no network in quickstart/runs; run `make quickstart`"):
        demo.main([])
    adapter = saved(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", None)
    told = r"gradio is not installed; run: pip install -r requirements-demo\.txt"
    with pytest.raises(InputError, match=told):
        demo.main(["--lora_ckpt", str(adapter), "--device", "cpu"])
    assert list(Path(tempfile.gettempdir()).glob("samed-demo-*")) == []


def saved(folder: Path) -> Path:
    model = tiny_model()
    model.train_all_weights()
    settings = {"vit_name": "vit_tiny", "img_size": 64, "num_classes": 2}
    settings |= {"class_names": list(SPEC.class_names), "spec": SPEC.to_json()}
    model.save_lora_parameters(folder / "adapter.pth", settings)
    return folder / "adapter.pth"


def test_a_scan_is_segmented_with_the_flags_that_predict_would_have(tmp_path: Path):
    words = ["--lora_ckpt", str(saved(tmp_path)), "--flips", "rows", "--batch_size", "3"]
    same = parse_args(predict_parser(), [*words, "--input", "scan", "--output", "out"])
    given = parse_args(demo_parser(), [*words, "--port", "8000"])
    assert predict_flags(given, Path("scan"), Path("out")) == same


class Filler:
    """Stands for `OrganPredictor`: a click inside fills the slice, one outside empties it."""

    input_slices = 1

    def set_image(self, image: np.ndarray) -> None:
        self.shape = image.shape

    def correct(self, clicks: list[Click], before: np.ndarray) -> np.ndarray:
        return np.full_like(before, clicks[-1].organ if clicks[-1].inside else 0)


@pytest.fixture
def correction() -> Correction:
    """Of a scan whose axes run to the patient's right, front and head, so both are flipped."""
    labels = np.zeros((3, 20, 30), np.uint8)
    labels[1, 4:8, 5:9] = 1
    place = reorient_geometry(placed("LPS", oblique=False), labels.shape, "RAS")
    slices = np.zeros(labels.shape, np.float32)
    case = SimpleNamespace(slices=slices, place=place, scan=SimpleNamespace(name="s"))
    return Correction(SPEC, case, labels, Filler())


def test_clicks_change_their_slice_and_are_taken_back(correction: Correction):
    assert correction.fullest() == 1
    correction.click(0, (5, 5), 2, True)
    correction.click(1, (5, 5), 1, False)
    assert correction.counts() == [0, 600] and not correction.labels[1:].any()
    assert correction.undo() == 1 and correction.counts() == [16, 600]
    assert correction.undo() == 0 and correction.undo() is None
    assert np.array_equal(correction.labels, correction.automatic)


def test_a_click_lands_where_the_picture_shows_it(correction: Correction):
    width, height = correction.picture(0).size
    assert set(correction.view.flips) == {0, 1}
    assert correction.pixel_at(0, (0, 0)) == (29, 19)
    assert correction.pixel_at(0, (width - 1, height - 1)) == (0, 0)
    correction.click(0, (width * 0.3, height * 0.7), 1, True)
    plain = np.zeros_like(correction.labels)
    correction.labels[:] = plain
    marked = np.asarray(correction.picture(0)).astype(int)
    correction.clicks.clear()
    changed = np.argwhere((marked != np.asarray(correction.picture(0))).any(axis=-1))
    middle = (changed.min(axis=0) + changed.max(axis=0)) / 2
    assert np.abs(middle - [height * 0.7, width * 0.3]).max() < max(width / 30, height / 20)


def test_the_table_counts_corrected_voxels_also_where_the_network_found_none(
    correction: Correction,
):
    correction.case.voxel_ml = 0.5
    result = {"voxels": [0, 0], "ml": [0.0, 0.0], "cut_by_edge": [False, False]}
    assert "600" not in volumes(SPEC, result) and "<td>0</td>" in volumes(SPEC, result)
    correction.automatic[:], correction.labels[:] = 0, 0
    correction.click(0, (5, 5), 2, True)  # all 600 voxels of a slice
    table = volumes(SPEC, result, correction)
    assert "<td>300.00</td>" in table and "after correction" in table
    assert "<td>600</td>" in volumes(SPEC, result | {"ml": None}, correction)


def test_the_table_marks_organs_that_clicks_bring_to_the_edge(correction: Correction):
    correction.case.voxel_ml = 0.5
    result = {"voxels": [16, 0], "ml": [8.0, 0.0], "cut_by_edge": [True, False]}
    assert "liver (cut by the edge)" in volumes(SPEC, result, correction)  # nothing is corrected
    correction.click(0, (5, 5), 2, True)  # all of the lowest slice
    table = volumes(SPEC, result, correction)
    assert "spleen (cut by the edge)" in table and "liver (cut" not in table
    correction.undo()
    assert volumes(SPEC, result, correction) == volumes(SPEC, result)


class Unpacking:
    """Stands for the reader: its function goes on after the tab was closed, and writes a file."""

    def __init__(self, close: Callable[[], None]) -> None:
        self.close = close

    def submit(self, function: object, folder: Path) -> Future[None]:
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        self.close()

        def end() -> None:
            folder.mkdir(parents=True)
            (folder / "slice.dcm").write_text("x")
            future.set_result(None)

        self.end = end
        return future


def test_what_is_unpacked_while_a_tab_closes_is_deleted_too(sessions: Sessions):
    network = SharedNetwork.__new__(SharedNetwork)
    session = sessions.open("a")
    session.take(sent(sessions))
    network.sessions, network.reader = sessions, Unpacking(lambda: sessions.close("a"))
    with pytest.raises(Stopped):
        network._read(session, None, session.folder / "unpacked")
    assert not session.folder.exists()
    network.reader.end()
    assert not session.folder.exists()


@pytest.mark.parametrize("place", [(-1, 3), (10_000, 3), (None, None), (), ("a", 1), (True, 2)])
def test_a_click_outside_is_told_and_changes_nothing(correction: Correction, place: tuple):
    with pytest.raises(InputError, match="outside the slice"):
        correction.click(0, place, 1, True)
    assert correction.clicks == [] and not correction.labels[0].any()


def test_downloads_hold_the_values_and_the_place_of_the_scan(tmp_path: Path):
    from datasets.scans.volumes import read_volume

    geometry = placed("RAS", oblique=False)
    values = np.zeros((3, 5, 6), np.uint8)
    values[1, 2:4, 1:3], values[2, 0, 0] = 6, 1
    write_volume(tmp_path / "s.nrrd", values.astype(np.int16), geometry)
    (tmp_path / "a" / "output").mkdir(parents=True)
    write_volume(tmp_path / "a" / "output" / "s.nrrd", values, geometry)
    session = Sessions(tmp_path).open("a")
    session.folder = tmp_path / "a"
    session.scan, session.result = scan_file(tmp_path / "s.nrrd", ".nrrd"), {"file": "s.nrrd"}
    network = SharedNetwork.__new__(SharedNetwork)
    network.spec, network.args = SPEC, Namespace()
    assert np.unique(network.classes(session)).tolist() == [0, 1, 2]
    for suffix in (".nii.gz", ".nrrd", ".seg.nrrd", ".mha"):
        path = network.labels_as(session, suffix)
        found, place = read_volume(path)
        assert path.name == f"s{suffix}" and np.array_equal(found, values)
        assert place.matches(geometry)
    Image.fromarray(values[1]).save(tmp_path / "a" / "output" / "s.png")
    session.scan, session.result = scan_file(tmp_path / "s.png", ".png"), {"file": "s.png"}
    assert network.classes(session).shape == (1, 5, 6) and network.classes(session).max() == 1
