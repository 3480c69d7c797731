"""`viewer.html`: what it holds of a case, and what it says where it cannot hold all."""

from __future__ import annotations

import base64
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common.writing import write_text
from common.written import Written
from datasets.intensity import PERCENTILES, RANGE, WINDOW, Intensity
from datasets.scans.geometry import Geometry
from datasets.scans.orientation import reorient, reorient_geometry
from evaluation import viewer, viewer_case, viewer_library
from evaluation.viewer import ViewedCase, write_viewer
from evaluation.viewer_case import Picture, encode_case, write_case_part
from prediction.records import RECORDS, Record, earlier_files, view_name, write_record
from prediction.viewing import CORRECTED, write_page

CT, MR = Intensity(WINDOW, -125, 275), Intensity(PERCENTILES, 0.5, 99.5)
SMALL = Geometry((1.0, 2.0, 3.0), (10.0, -20.0, 30.0), (1, 0, 0, 0, 1, 0, 0, 0, 1))
LIBRARY = viewer_library.Library("globalThis.Niivue = 1;", "the licence of NiiVue")
HOSTILE = '</script><img src=x onerror="document.title=1"><!--<script>'


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page without the real library, which need not be installed."""
    monkeypatch.setattr(viewer, "find_library", lambda: LIBRARY)


def unpacked(text: str, shape: list[int]) -> np.ndarray:
    """The voxels (D, H, W) of an encoded case."""
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8).reshape(shape[::-1])


def ct_case(name: str = "a", size: tuple[int, int, int] = (4, 30, 40)) -> dict:
    """A body of water in air, with an organ of 2·3·4 voxels."""
    image = np.full(size, -1000.0, np.float32)
    image[:, 5:25, 8:36] = 0
    labels = np.zeros(size, np.uint8)
    labels[1:3, 10:13, 20:24] = 2
    picture = Picture(image, CT, (-125.0, 275.0))
    return encode_case(name, picture, labels, None, geometry=SMALL, voxel_ml=0.006)


def page_of(tmp_path: Path, cases: list[dict], **kwargs: object) -> tuple[str, list[str]]:
    listed = []
    for number, case in enumerate(cases):
        write_case_part(tmp_path / f"{number}.view", case)
        listed.append(ViewedCase(case["name"], tmp_path / f"{number}.view", **kwargs))
    lines = write_viewer(tmp_path / "viewer.html", listed, ["liver", HOSTILE], HOSTILE)
    return (tmp_path / "viewer.html").read_text(encoding="utf-8"), lines


def data_of(page: str) -> tuple[list[dict], dict]:
    """The cases of a page, and its index."""
    found = re.findall(r'<script type="application/json" class="case">(.*?)</script>', page)
    index = re.search(r'<script type="application/json" id="index">(.*?)</script>', page)
    return [json.loads(text) for text in found], json.loads(index[1])


def test_a_case_is_cropped_to_the_body_and_its_voxels_stay_in_place():
    case = ct_case()
    assert (case["full"], case["start"], case["step"]) == ([40, 30, 4], [6, 3, 0], [1, 1, 1])
    labels = unpacked(case["labels"], case["shape"])
    z, y, x = np.argwhere(labels == 2)[0]
    matrix = np.array(case["affine"])
    # LPS of the first voxel of the organ, computed from the geometry, in RAS.
    expected = (-(10 + 1 * 20), -(-20 + 2 * 10), 30 + 3 * 1)
    np.testing.assert_allclose(matrix @ (x, y, z, 1), expected)
    assert case["voxels"][2] == 24 and case["voxel_ml"] == 0.006


def test_turned_arrays_are_the_same_place_in_the_patient():
    labels = np.zeros((5, 6, 7), np.uint8)
    labels[1, 2, 3] = 1
    image = np.ones(labels.shape, np.float32)
    for letters in ("LPS", "RAS", "SLA", "IPR"):
        turned = np.ascontiguousarray(reorient(labels, "LPS", letters))
        picture = Picture(np.ones(turned.shape) * image[0, 0, 0], MR, (0.0, 1.0))
        geometry = reorient_geometry(SMALL, labels.shape, letters)
        case = encode_case("a", picture, turned, None, geometry=geometry)
        z, y, x = np.argwhere(unpacked(case["labels"], case["shape"]))[0]
        np.testing.assert_allclose(np.array(case["affine"]) @ (x, y, z, 1), (-13, 16, 33))
        assert case["letters"] == letters


def test_values_keep_the_precision_that_the_page_states():
    values = np.arange(-1100, 1700).reshape(4, 20, 35)
    case = encode_case(
        "a",
        Picture(values, CT, (-125.0, 275.0)),
        np.ones(values.shape, np.uint8),
        None,
        geometry=None,
    )
    levels = np.array(case["levels"]["table"])
    assert len(levels) <= 256
    found = levels[unpacked(case["image"], case["shape"])]
    error = np.abs(found - values.clip(-1024, 1605))
    assert error[(values >= -200) & (values <= 300)].max() <= 2
    assert error[values < -200].max() <= 7 and error.max() <= 23
    assert {one["name"] for one in case["levels"]["windows"]} >= {"soft tissue", "lung", "bone"}


def test_a_prepared_volume_offers_only_windows_that_it_holds():
    image = np.linspace(0, 1, 256, dtype=np.float32).reshape(1, 16, 16)
    case = encode_case(
        "a", Picture(image, CT, None), np.ones((1, 16, 16), np.uint8), None, geometry=None
    )
    levels = case["levels"]
    assert [one["name"] for one in levels["windows"]] == ["as the network", "soft tissue"]
    found = levels["low"] + levels["step"] * unpacked(case["image"], case["shape"])
    np.testing.assert_allclose(found, -125 + 400 * image, atol=0.8)
    assert "−125…275 HU" in levels["said"]


def test_windows_of_mr_are_percentiles_and_pictures_have_none_but_their_own():
    image = np.random.default_rng(0).normal(100, 30, (3, 20, 20))
    labels = np.ones(image.shape, np.uint8)
    mr = encode_case("a", Picture(image, MR, (20.0, 180.0)), labels, None, geometry=SMALL)
    names = {one["name"]: (one["low"], one["high"]) for one in mr["levels"]["windows"]}
    np.testing.assert_allclose(names["percentiles 2…98"], np.percentile(image, (2, 98)), rtol=1e-6)
    colour = np.random.default_rng(0).integers(0, 256, (1, 3, 20, 20), np.uint8)
    own = Picture(colour, Intensity(RANGE, 0, 255), (0.0, 255.0))
    rgb = encode_case("a", own, labels[:1], None, geometry=None)
    assert rgb["levels"]["colour"] and not rgb["levels"]["windows"] and not rgb["known"]
    stored = np.frombuffer(gzip.decompress(base64.b64decode(rgb["image"])), np.uint8)
    np.testing.assert_array_equal(stored.reshape(20, 20, 3), colour[0].transpose(1, 2, 0))


def test_a_large_case_is_thinned_to_the_budget_with_nearly_cubic_voxels(monkeypatch):
    monkeypatch.setattr(viewer_case, "MOST_VOXELS", 10_000)
    thin = replace(SMALL, spacing=(0.5, 0.5, 5.0))
    image, labels = np.zeros((10, 90, 90), np.int16), np.ones((10, 90, 90), np.uint8)
    labels[7, 33, 42] = 3
    case = encode_case("a", Picture(image, CT, (-125.0, 275.0)), labels, None, geometry=thin)
    assert case["step"] == [3, 3, 1] and np.prod(case["shape"]) <= 10_000
    z, y, x = np.argwhere(unpacked(case["labels"], case["shape"]) == 3)[0]
    assert (x * 3, y * 3, z) == (42, 33, 7)  # a voxel of the scan, not a mean
    assert case["voxels"][1] == labels.size - 1  # volumes are those of all voxels


def test_names_from_files_cannot_become_html(tmp_path: Path, library: None):
    page, _ = page_of(tmp_path, [ct_case(HOSTILE)], notes=[HOSTILE])
    cases, index = data_of(page)
    assert index["names"] == [HOSTILE] == cases[0]["notes"]
    assert HOSTILE not in page and "<img" not in page
    assert page.count("</script>") == page.count("<script") == 5


def test_a_name_may_hold_what_marks_the_place_of_the_cases(tmp_path: Path, library: None):
    write_case_part(tmp_path / "a.view", ct_case())
    case, names = ViewedCase("a", tmp_path / "a.view"), ["liver", viewer.CASES]
    write_viewer(tmp_path / "viewer.html", [case], names, viewer.CASES)
    page = (tmp_path / "viewer.html").read_text(encoding="utf-8")
    assert data_of(page)[1]["names"] == ["a"]
    assert json.dumps(viewer.CASES) in page and f"<h1>{viewer.CASES}</h1>" in page


def test_the_policy_of_the_page_allows_its_own_scripts_alone(tmp_path: Path, library: None):
    page, _ = page_of(tmp_path, [ct_case()])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none';") and "connect-src" not in policy
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    for code in (script, LIBRARY.code):
        assert f"'{viewer.source_hash(code)}'" in policy
    assert LIBRARY.licence in page and not re.search(r'(src|href)="', page)


def test_cases_over_the_budget_are_left_out_and_named(tmp_path: Path, library: None, monkeypatch):
    cases = [ct_case(name, size=(4, 30, 40)) for name in ("a", "b", "c")]
    page, _ = page_of(tmp_path, cases)
    monkeypatch.setattr(viewer, "MOST_BYTES", len(page) - len(json.dumps(cases[0])) // 2)
    page, lines = page_of(tmp_path, cases)
    _, index = data_of(page)
    assert index["names"] == ["a", "b"] and [one["name"] for one in index["left_out"]] == ["c"]
    assert "ITK-SNAP" in index["left_out"][0]["reason"] and "1 of 3" in lines[1]
    assert len(page) <= viewer.MOST_BYTES


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"name": "other"}', '{"name": "a", "notes": 3}']
)
def test_a_case_without_its_part_is_named_with_the_reason(tmp_path: Path, library: None, content):
    part = tmp_path / "a.view"
    if content is not None:
        part.write_text(content)
    write_viewer(tmp_path / "viewer.html", [ViewedCase("a", part, missing="why")], [], "title")
    _, index = data_of((tmp_path / "viewer.html").read_text(encoding="utf-8"))
    assert index == {"names": [], "left_out": [{"name": "a", "reason": "why"}]}


def test_without_the_library_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(viewer, "find_library", lambda: None)
    (tmp_path / "viewer.html").write_text("of an earlier run")
    (line,) = write_viewer(tmp_path / "viewer.html", [], ["liver"], "title")
    assert "pip install --no-deps ipyniivue==2.4.4" in line
    assert not (tmp_path / "viewer.html").exists()


def test_requirements_pin_the_package_whose_script_is_known():
    pinned = (
        Path(viewer_library.__file__).parents[1].joinpath("requirements-viewer.txt").read_text()
    )
    assert f"{viewer_library.PACKAGE}=={viewer_library.VERSION} --hash=sha256:" in pinned
    assert viewer_library.VERSION in viewer_library.INSTALL


def test_the_installed_library_is_the_known_one_and_hands_out_its_class():
    library = viewer_library.find_library()
    if library is None:
        pytest.skip(f"needs NiiVue: {viewer_library.INSTALL}")
    assert library.code.endswith(viewer_library.HANDS_OUT) and "export{" not in library.code[-99:]
    assert "BSD 2-Clause" in library.licence and "</script" not in library.code


def test_another_version_of_the_library_is_not_used(monkeypatch):
    monkeypatch.setattr(viewer_library, "SHA256", "0" * 64)
    viewer_library.find_library.cache_clear()
    assert viewer_library.find_library() is None
    viewer_library.find_library.cache_clear()


def test_a_label_file_that_was_changed_since_is_told(tmp_path: Path, library: None):
    spec = SimpleNamespace(name="data", class_names=("liver", "spleen"))
    records, written = {}, Written(tmp_path)
    (tmp_path / RECORDS).mkdir()
    with written.noting():
        for name in ("kept", "corrected"):
            write_text(tmp_path / f"{name}.nii.gz", name)
            write_case_part(tmp_path / view_name(name), ct_case(name))
            result = {"case": name, "file": f"{name}.nii.gz", "warnings": ["doubt"]}
            result["cut_by_edge"] = [False, True]
            write_record(tmp_path, {}, [], result)
            content = json.loads((tmp_path / RECORDS / f"{name}.json").read_text())
            records[name] = Record(**content)
        (tmp_path / "corrected.nii.gz").write_text("by hand")
        write_page(False, spec, written, records, {"broken": "no image"})
    cases, index = data_of((tmp_path / "viewer.html").read_text(encoding="utf-8"))
    edge = "the edge of the scan cuts: spleen"
    assert {case["name"]: case["notes"] for case in cases} == {
        "kept": ["doubt", edge],
        "corrected": ["doubt", edge, CORRECTED],
    }
    assert index["left_out"][0]["reason"] == "it could not be segmented: no image"
    assert write_page(True, spec, written, records, {}) == []  # --no_viewer
    assert not (tmp_path / "viewer.html").exists()  # it would show another state than the tables


def test_the_volumes_of_a_case_go_with_its_other_files(tmp_path: Path):
    assert view_name("a") in earlier_files(tmp_path, "a", num_classes=2)
