"""A click on the picture of demo.py, from the pixel that is seen to the voxel in every download."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_correction_folder import KINDS, PLACE, opened
from test_demo import Filler

from correction.prompts import Click
from datasets.scans.pictures import read_index_picture
from datasets.scans.volumes import read_volume
from demo_page.correcting import Correction
from demo_page.network import SharedNetwork
from demo_page.server import formats_of
from demo_page.sessions import Sessions

pytestmark = pytest.mark.slow


class Pixel(Filler):
    """Stands for `OrganPredictor`: a click changes its pixel alone."""

    def correct(self, clicks: list[Click], before: np.ndarray) -> np.ndarray:
        labels = before.copy()
        for click in clicks:
            labels[int(click.y), int(click.x)] = click.organ
        return labels


@pytest.mark.parametrize("kind", KINDS)
def test_a_click_on_the_brightest_pixel_marks_the_brightest_voxel(tmp_path: Path, kind: str):
    write, spec, _ = KINDS[kind]
    (tmp_path / "raw").mkdir()
    case = opened(write(tmp_path / "raw"), spec)
    values = case.slices.array
    bright = (values == values.max()).reshape(-1, values[0].size).any(axis=1)
    index = int(np.flatnonzero(bright)[0])
    case = replace(case, slices=np.where(values == values.max(), 1, 0.1).astype(np.float32))
    size = values.shape[-2:]
    correction = Correction(spec, case, np.zeros((len(values), *size), np.uint8), Pixel())

    picture = correction.picture(index)
    small = np.asarray(picture.convert("L").resize(size[::-1], Image.Resampling.BOX))
    row, column = np.unravel_index(small.argmax(), size)
    place = (np.array([column, row]) + 0.5) * picture.size / size[::-1]
    correction.click(index, tuple(place.tolist()), 2, True)

    session = Sessions(tmp_path).open("a")
    session.scan, session.correction = case.scan, correction
    session.result = {"file": "none"}
    network = SharedNetwork.__new__(SharedNetwork)
    network.spec, network.args = spec, Namespace()
    value = spec.predicted_values[1]
    for suffix in formats_of(session):
        path = network.labels_as(session, suffix)
        if case.geometry is None:
            found = read_index_picture(path)
        else:
            found, geometry = read_volume(path)
            assert geometry.matches(case.geometry)
        assert np.argwhere(found).tolist() == [list(PLACE) if case.geometry else [0, *PLACE[1:]]]
        assert set(np.unique(found)) == {0, value}
