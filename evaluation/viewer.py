"""Write `viewer.html`: every case to scroll through, in one file that needs no server."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from common.errors import InputError
from common.files import read_json
from common.writing import atomic_path
from datasets.colours import label_colours
from evaluation.page import render
from evaluation.viewer_case import as_json
from evaluation.viewer_library import INSTALL, NIIVUE, Library, find_library

PAGE = "viewer.html"
TEMPLATE = Path(__file__).with_suffix(".html")
SCRIPT = Path(__file__).with_suffix(".js")
CASES = "@cases@"  # where the template takes the cases
MOST_BYTES = 60_000_000  # of a page; phones stop at more
ALONE = "open its label file over its scan in ITK-SNAP or 3D Slicer, or run it into a folder alone"
ABSENT = f"{PAGE} is not written, because it needs NiiVue: {INSTALL}"


@dataclass(frozen=True)
class ViewedCase:
    """A case that the page has to show or to name."""

    name: str
    part: Path  # file of `evaluation.viewer_case.write_case_part`
    notes: Sequence[str] = ()  # what is known of the case besides that file
    missing: str = "its volumes are not there"  # why it has no such file, for the page


def write_viewer(
    path: Path, cases: Iterable[ViewedCase], class_names: Sequence[str], title: str
) -> list[str]:
    """Write the page of all cases; only one of them is in memory at a time.

    Args:
        class_names: of the classes 1…N, in order.

    Returns:
        Lines for the terminal: what to open, and how many cases the page leaves out; or how to
        install the library, without which there is no page and an earlier one is removed.

    Raises:
        InputError: there is no room or no right to write.
    """
    library = find_library()
    if library is None:
        path.unlink(missing_ok=True)
        return [ABSENT]
    # The last one: names before it may hold any text.
    head, _, tail = page_around(library, class_names, title).rpartition(CASES)
    names, left_out = [], []
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(head.encode())
        size = len(head) + len(tail)
        for case in cases:
            content = read_part(case)
            if content is None:
                left_out.append({"name": case.name, "reason": case.missing})
                continue
            text = as_json(content)
            if size + len(text) > MOST_BYTES and names:
                reason = f"the page would exceed {MOST_BYTES // 10**6} MB; {ALONE}"
                left_out.append({"name": case.name, "reason": reason})
                continue
            element = f'<script type="application/json" class="case">{text}</script>\n'
            file.write(element.encode())
            names.append(case.name)
            size += len(element)
        index = as_json({"names": names, "left_out": left_out})
        file.write(f'<script type="application/json" id="index">{index}</script>\n'.encode())
        file.write(tail.encode())
    lines = [f"to scroll through the cases: open {path} in a browser"]
    if left_out:
        lines.append(
            f"  {len(left_out)} of {len(names) + len(left_out)} are not on it; it says why"
        )
    return lines


def read_part(case: ViewedCase) -> dict[str, Any] | None:
    """Return an encoded case with its later notes; None if there is none or it is damaged."""
    try:
        content = read_json(case.part, remedy="so the page does not show this case")
    except InputError:
        return None
    if not isinstance(content, dict) or content.get("name") != case.name:
        return None
    notes = content.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        return None
    content["notes"] = list(dict.fromkeys([*notes, *case.notes]))
    return content


def page_around(library: Library, class_names: Sequence[str], title: str) -> str:
    """Return the page with `CASES` where its cases belong."""
    script = SCRIPT.read_text(encoding="utf-8")
    organs = [
        {"name": name, "colour": rgb}
        for name, rgb in zip(class_names, label_colours(class_names)[1:].tolist(), strict=True)
    ]
    return render(
        TEMPLATE,
        title=title,
        script=Markup(script),
        hashes=Markup(" ".join(f"'{source_hash(text)}'" for text in (script, library.code))),
        library=Markup(library.packed),
        licence=library.licence,
        version=NIIVUE,
        organs=Markup(as_json(organs)),
    )


def source_hash(script: str) -> str:
    """Return the hash by which a page's security policy allows a script, and no other."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
