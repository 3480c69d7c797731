"""The parts of the page that are HTML; every text of a file or an error is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from datasets.colours import label_colours
from datasets.registry import DatasetSpec
from demo_page.server import formats_of
from demo_page.sessions import Session
from demo_page.uploads import Limits
from evaluation.viewer import ABSENT, PAGE
from prediction.summary import shown_ml

if TYPE_CHECKING:
    from demo_page.correcting import Correction


def plain(markup: Markup) -> str:
    """Return HTML as one block of Markdown, which is then shown as it is."""
    return f"<div>{' '.join(markup.splitlines())}</div>"


def heading(title: str, spec: DatasetSpec, limits: Limits) -> str:
    """Return the head of the page: what it is for, and what it is not."""
    organs = ", ".join(spec.class_names)
    return plain(
        Markup(
            "<h1>{}</h1><p><strong>Not a medical device: for research only.</strong></p>"
            "<p>The network finds: {}. It was trained on {}.</p>"
            "<p>Nothing leaves this computer. A scan is deleted when this page is closed. At most "
            "{} MB and {} million voxels.</p>"
        ).format(title, organs, spec.name, limits.file_bytes >> 20, limits.voxels // 10**6)
    )


def message(text: str, warnings: Sequence[str] = (), *, is_error: bool = False) -> str:
    """Return a sentence, read aloud by screen readers, and warnings below it."""
    if not text:
        return ""
    role, kind = ("alert", "error") if is_error else ("status", "said")
    lines = Markup("").join(
        Markup('<p class="warning">warning: {}</p>').format(one) for one in warnings
    )
    return plain(Markup('<div role="{}" class="{}"><p>{}</p>{}</div>').format(
        role, kind, text, lines
    ))  # fmt: skip


def result_view(session: Session) -> str:
    """Return the viewer in a frame; without NiiVue, the picture of the case and why."""
    address = f"result/{session.token}"
    if (session.output / PAGE).is_file():
        return plain(
            Markup(
                '<iframe src="{}/viewer.html" title="the result, slice by slice" '
                'sandbox="allow-scripts" referrerpolicy="no-referrer"></iframe>'
            ).format(address)
        )
    return plain(
        Markup('<p>{}</p><img src="{}/overlay.png" alt="slices with their labels">').format(
            ABSENT, address
        )
    )


def volumes(spec: DatasetSpec, result: dict[str, Any], correction: Correction | None = None) -> str:
    """Return the table of volumes, of the corrected labels if there are some."""
    head, voxels, ml, cuts = "volumes", result["voxels"], result["ml"], result["cut_by_edge"]
    if correction is not None and correction.clicks:
        head, voxels, cuts = "volumes after correction", correction.counts(), correction.cuts()
        ml = None if ml is None else [count * correction.case.voxel_ml for count in voxels]
    amounts, unit = list(map(str, voxels)), "voxels"
    if ml is not None:
        amounts, unit = [shown_ml(one) if one else "0" for one in ml], "ml"
    colours = label_colours(spec.class_names)[1:].tolist()
    rows = Markup("").join(
        Markup(
            '<tr><td><span class="colour" style="background:rgb({},{},{})"></span></td>'
            "<td>{}{}</td><td>{}</td></tr>"
        ).format(*colour, name, " (cut by the edge)" if cut else "", amount)
        for colour, name, cut, amount in zip(colours, spec.class_names, cuts, amounts, strict=True)
    )
    return plain(
        Markup("<table><caption>{}</caption><tr><th></th><th>organ</th><th>{}</th></tr>{}</table>")
        .format(head, unit, rows)
    )  # fmt: skip


def downloads(session: Session) -> str:
    """Return the links to the files of a result."""
    address = f"result/{session.token}"
    links = [(f"labels{suffix}", suffix) for suffix in formats_of(session)]
    links.append(("volumes.csv", "volumes as CSV"))
    listed = Markup("").join(
        Markup('<li><a href="{}/{}" download>{}</a></li>').format(address, file, text)
        for file, text in links
    )
    return plain(Markup("<p>Download the labels</p><ul>{}</ul>").format(listed))
