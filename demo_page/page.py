"""The page: what stands on it, and which handler belongs to which event."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from demo_page.handlers import INSIDE, OUTSIDE, Page, guarded
from demo_page.texts import heading

TITLE = "SAMed: segment a scan"
STYLE = Path(__file__).with_name("page.css")
ONE_AT_A_TIME = {"concurrency_id": "network", "concurrency_limit": 1}
AT_ONCE = {"concurrency_limit": None, "show_progress": "hidden"}
ABOUT_CLICKS = (
    "Click into the middle of an error: a place that belongs to the chosen organ and is missing, "
    "or one that does not belong to it. The pixels around it follow, as far as the network finds "
    "them as likely as the clicked one. Other slices stay as they are."
)
DROP = "Drop a scan (NIfTI, NRRD, MHA), a zip archive of a DICOM series, or a picture (PNG, JPG)"


def text(html: str, **how: Any) -> gr.Markdown:
    """Return a part of the page that shows HTML of `demo_page.texts`, where all is escaped.

    gr.HTML would run its content as a template, which the page's policy forbids (unsafe-eval).
    """
    return gr.Markdown(html, sanitize_html=False, latex_delimiters=[], **how)


@dataclass(frozen=True)
class Parts:
    """What stands on the page and changes, from top to bottom."""

    scan: gr.File
    status: gr.Markdown
    result: gr.Column
    viewer: gr.Markdown
    table: gr.Markdown
    links: gr.Markdown
    correction: gr.Column
    start: gr.Button
    said: gr.Markdown
    tools: gr.Row
    picture: gr.Image
    number: gr.Slider
    organ: gr.Dropdown
    kind: gr.Radio
    undo: gr.Button
    write: gr.Button


def build(page: Page) -> gr.Blocks:
    """Return the page with its handlers."""
    # Uploads that no session took, because the tab was closed, are deleted after half an hour.
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=(300, 1800), fill_width=True
    ) as blocks:
        parts = lay_out(page)
        connect(page, parts)

        def close(request: gr.Request) -> None:
            page.sessions.close(request.session_hash)

        blocks.unload(close)
    return blocks


def lay_out(page: Page) -> Parts:
    """Put the parts on the page."""
    text(heading(TITLE, page.network.spec, page.network.limits))
    scan = gr.File(label=DROP, file_count="single", elem_id="scan", height=150)
    status = text("", elem_id="status")
    with gr.Column(visible=False, elem_id="result") as result:
        viewer = text("", elem_id="viewer")
        with gr.Row():
            with gr.Column(min_width=320):
                table = text("", elem_id="volumes")
            with gr.Column(min_width=320):
                links = text("", elem_id="downloads")
    with gr.Column(visible=False, elem_id="correction") as correction:
        text("<h2>Correct the result</h2>")
        text(f"<p>{ABOUT_CLICKS}</p>", elem_id="about-clicks")
        start = gr.Button("Correct this result", elem_id="start", visible=False)
        said = text("", elem_id="said")  # above the picture, where a phone shows it after a click
        with gr.Row(visible=False) as tools:
            with gr.Column(scale=3, min_width=300):
                picture = gr.Image(
                    label="slice",
                    show_label=False,
                    interactive=False,
                    buttons=[],  # in full screen, Gradio tells other places of clicks
                    elem_id="slice",
                    alt_text="the slice with its labels; click on it to correct them",
                )
                number = gr.Slider(1, 2, 1, step=1, label="slice", elem_id="number", buttons=[])
            with gr.Column(scale=1, min_width=250):
                organ = gr.Dropdown(page.organs, value=page.organs[0], label="organ")
                kind = gr.Radio([INSIDE, OUTSIDE], value=INSIDE, label="the clicked pixel")
                undo = gr.Button("Undo the last click", elem_id="undo")
                write = gr.Button("Write corrected scan", elem_id="write", variant="primary")
    return Parts(
        scan, status, result, viewer, table, links, correction, start, said, tools, picture,
        number, organ, kind, undo, write,
    )  # fmt: skip


def connect(page: Page, parts: Parts) -> None:
    """Say what happens at each event."""

    def on(
        event: Callable[..., Any],
        handler: Callable[..., tuple[Any, ...]],
        inputs: list[Any],
        outputs: list[Any],
        **how: Any,
    ) -> Any:
        told = next(i for i, one in enumerate(outputs) if one in (parts.status, parts.said))
        safe = guarded(handler, page.sessions, len(outputs), told)
        # The handlers take what the browser sends, and return what it gets: Gradio would tell a
        # wrong number by a traceback, and write pictures into files.
        how |= {"preprocess": False, "postprocess": False, "api_visibility": "private"}
        return event(safe, inputs, outputs, **how)

    def segment(request: gr.Request, progress: Any = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        return page.segment(request, lambda share, words: progress(share, desc=words))

    p = parts
    taken = [p.status, p.result, p.correction, p.said]
    shown = [p.status, p.result, p.viewer, p.table, p.links, p.correction, p.start]
    upload = on(p.scan.upload, page.take, [p.scan], taken, **AT_ONCE)
    shown.append(p.tools)
    on(upload.success, segment, [], shown, show_progress_on=[p.status], **ONE_AT_A_TIME)
    begun = [p.start, p.tools, p.number, p.picture, p.said]
    on(p.start.click, page.begin, [], begun, **ONE_AT_A_TIME)
    on(
        p.number.input,
        page.show,
        [p.number],
        [p.picture, p.said],
        trigger_mode="always_last",
        **AT_ONCE,
    )
    corrected = [p.picture, p.said, p.table]
    clicked = [p.number, p.organ, p.kind]
    quiet = {"show_progress": "hidden"} | ONE_AT_A_TIME
    on(p.picture.select, page.click, clicked, corrected, **quiet)
    on(p.undo.click, page.undo, [p.number], [*corrected, p.number], **quiet)
    on(p.write.click, page.write, [], [p.said], **ONE_AT_A_TIME)
