"""Write test runs as one HTML page, alone or side by side."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from common.errors import InputError
from common.writing import write_text
from datasets.colours import label_colours
from datasets.intensity import Intensity
from evaluation.charts import as_data, draw_boxes, draw_differences
from evaluation.compare import FEWEST_GROUPS, compare, overview
from evaluation.held_out import held_out_warning
from evaluation.overlays import WORST_A_CASE
from evaluation.tables import (
    COLUMNS,
    OUTCOMES,
    SAMED,
    CaseResult,
    case_means,
    class_means,
    counted,
    nsd_caveat,
    outcome_counts,
    total_means,
)
from evaluation.test_runs import TestRun
from evaluation.views import slice_title, window_text

TEMPLATE = Path(__file__).with_suffix(".html")
MOST_SLICES = 12  # worst slices shown
PNG = b"\x89PNG\r\n\x1a\n"  # start of every PNG picture
LARGEST_PICTURE = 32 << 20  # bytes; three slices of 1024 pixels take at most 9 MiB
SIDES = {"RL": "R right, L left", "AP": "A front, P back", "SI": "S head, I feet"}


def write_page(path: Path, runs: Sequence[TestRun]) -> None:
    """Write the page of one run, or of several side by side.

    Raises:
        InputError: a run shares no class or no case with the first, or a picture is missing.
    """
    names = run_names(runs)
    short = short_names(names)
    page = render(
        TEMPLATE,
        runs=[describe(run, name) for run, name in zip(runs, names, strict=True)],
        names=short,
        overview=overview(runs),
        comparisons=[
            described(compare(runs[0], run), short[0], name)
            for run, name in zip(runs[1:], short[1:], strict=True)
        ],
        columns=COLUMNS,
        samed=SAMED,
        outcomes=OUTCOMES,
        fewest_groups=FEWEST_GROUPS,
        worst_a_case=WORST_A_CASE,
    )
    write_text(path, page)


def render(template: Path, **content: Any) -> str:
    """Return an HTML page; every text in it is escaped.

    Args:
        template: a Jinja template, which may include files of this folder, as `style.css`.
        content: the names that the template uses.
    """
    return templates_of(template.parent).get_template(template.name).render(content)


@cache
def templates_of(folder: Path) -> Environment:
    """Return the templates of a folder, which are compiled once."""
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATE.parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "breakable": breakable, "counted": counted}
    return environment


def run_names(runs: Sequence[TestRun]) -> list[str]:
    """Return the folder names of the runs, numbered if two are equal."""
    folders = [run.path.resolve().parent for run in runs]
    parts = [
        folder.parent.name if folder.name == "test" and folder.parent.name else folder.name
        for folder in folders
    ]
    if len(set(parts)) == len(parts):
        return parts
    return [f"{index}: {part}" for index, part in enumerate(parts, start=1)]


def short_names(names: Sequence[str]) -> list[str]:
    """Return the names without the settings that all runs share, if they stay different."""
    settings = [name.split("_") for name in names]
    common = set.intersection(*map(set, settings))
    short = ["_".join(part for part in parts if part not in common) for parts in settings]
    return short if all(short) and len(set(short)) == len(short) else list(names)


def describe(run: TestRun, name: str) -> dict[str, Any]:
    """Collect what the page shows of one run."""
    colours = [f"#{bytes(rgb).hex()}" for rgb in label_colours(run.class_names)[1:]]
    means, outcomes = class_means(run.results), outcome_counts(run.results)
    total = total_means(run.results)
    distance = "hd95_voxels" if total["hd95_mm"] is None else "hd95_mm"
    # A score that no case defines, such as mm for pictures, has no column and no definition.
    shown = [score for score in COLUMNS if score in SAMED or total[score] is not None]
    spec = run.settings["flags"].get("spec")
    return {
        "name": name,
        "data": spec.get("name") if isinstance(spec, dict) else None,
        "total": total,
        "shown": shown,
        "classes": [
            {"name": name, "colour": colour, "mean": row, "outcomes": counts}
            for name, colour, row, counts in zip(
                run.class_names, colours, means, outcomes, strict=True
            )
        ],
        "cases": [
            {"name": result.case, "mean": row, "scores": result.scores}
            for result, row in zip(run.results, case_means(run.results), strict=True)
        ],
        "groups": len({result.independent for result in run.results}),
        "spacing": spacing_range(run.results),
        "caveat": nsd_caveat(run.results, run.tolerance),
        "warning": held_out_warning(run.trained_on, len(run.results)),
        "pictures": sum(result.slices == 1 for result in run.results),
        "definitions": {
            key: text for key, text in run.definitions.items() if key not in COLUMNS or key in shown
        },
        "boxes": [
            as_data(draw_boxes(run.results, run.class_names, score, *COLUMNS[score][:2]))
            for score in ("dsc", distance)
            if len(run.results) > 1  # one case has no spread
        ],
        "worst": worst(run),
        "sides": [
            SIDES[pair] for pair in SIDES if any(pair in (r.sides or "") for r in run.results)
        ],
        "window": window(spec),
        "numbered": any(result.slices != 1 for result in run.results),
        "confusion": confused(run),
        "settings": run.settings,
    }


def described(comparison: dict[str, Any], first: str, second: str) -> dict[str, Any]:
    """Return a comparison with the names of both runs and a chart."""
    heading, factor, _ = COLUMNS["dsc"]
    # The names of the runs stand above the chart; long ones would not fit below it.
    unit = f"difference in {heading}, second − first"
    chart = draw_differences(comparison["rows"], "dsc", unit, factor)
    return {"first": first, "second": second, "chart": as_data(chart), **comparison}


def spacing_range(results: Sequence[CaseResult]) -> str | None:
    """Return the range of voxel sizes, as `0.8 × 0.8 × 3…5 mm`; None if all are unknown.

    The order is column, row, slice.
    """
    known = [result.spacing[::-1] for result in results if result.spacing]
    if not known:
        return None
    axes = [
        dict.fromkeys(f"{end:.3g}" for end in (min(axis), max(axis)))
        for axis in zip(*known, strict=True)
    ]
    missing = len(results) - len(known)
    unknown = f" (unknown for {missing})" if missing else ""
    return f"{' × '.join('…'.join(ends) for ends in axes)} mm{unknown}"


def worst(run: TestRun) -> list[dict[str, Any]]:
    """Return the worst slices of all cases, their pictures as data URLs.

    A scan whose slices are cases of their own shows no more slices than another scan.
    """
    slices = [(worst_slice, result) for result in run.results for worst_slice in result.worst]
    slices.sort(key=lambda pair: -pair[0].rank)
    scans: Counter[str] = Counter()
    shown: list[dict[str, Any]] = []
    for worst_slice, result in slices:
        scans[result.independent] += 1
        if len(shown) == MOST_SLICES or scans[result.independent] > WORST_A_CASE:
            continue
        picture = read_picture(run, worst_slice.picture)
        data = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        # Older versions drew truth and prediction without the image, and stored no `slices`.
        kinds = ("image", "truth", "prediction")[result.slices is None :]
        title = slice_title(worst_slice.index, result.slices or 0, worst_slice.place)
        if result.slices is None:
            title = f"slice {worst_slice.index + 1}"
        shown.append(
            {"case": result, "slice": worst_slice, "title": title, "data": data, "kinds": kinds}
        )
    return shown


def read_picture(run: TestRun, name: str) -> bytes:
    """Return the content of a PNG picture that a run names."""
    path = run.path.parent / name
    try:
        if not path.is_file():
            raise OSError("there is no such file")
        with path.open("rb") as file:
            content = file.read(LARGEST_PICTURE + 1)
        if not content.startswith(PNG) or len(content) > LARGEST_PICTURE:
            raise OSError("it is no PNG picture of a test")
    except OSError as error:
        raise InputError(
            f"{run.path} names the picture {name}, which cannot be read "
            f"({error.strerror or error}); run test.py again"
        ) from None
    return content


def window(spec: Any) -> str | None:
    """Return which values the pictures show black and white; None if a run does not record it."""
    try:
        return window_text(Intensity(**spec["intensity"]))
    except (KeyError, TypeError, ValueError):
        return None


def confused(run: TestRun) -> list[list[float | None]] | None:
    """Return how the voxels of each true class (row) were predicted (column), in %."""
    if any(result.confusion is None for result in run.results):
        return None
    counts = np.sum([result.confusion for result in run.results], axis=0).T
    return [[100 * v / sum(row) if sum(row) else None for v in row] for row in counts.tolist()]


def number(value: float | None, factor: float = 1, sign: bool = False) -> str:
    """Format a score as `87.59`, a difference with its sign; – if it is not defined."""
    if value is None:
        return "–"
    text = f"{value * factor:+.2f}" if sign else f"{value * factor:.2f}"
    return text.replace("-", "−")


def breakable(name: str) -> Markup:
    """Return a name as HTML that may break into a new line after `_`."""
    return escape(name).replace("_", Markup("_<wbr>"))
