"""What happens at each drop, click and button of the page."""

from __future__ import annotations

import base64
import functools
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image

from common.errors import InputError, first_line
from common.full_memory import what_is_full
from correction.folder import write_corrected
from demo_page.network import SharedNetwork
from demo_page.sessions import Session, Sessions, Stopped
from demo_page.texts import downloads, message, result_view, volumes

INSIDE, OUTSIDE = "belongs to the organ", "does not belong to it"
SHOWN = 8  # parts of the page that `Page.segment` changes


class Page:
    """The handlers of the page. Each returns what it changes, and never raises for wrong input."""

    def __init__(self, network: SharedNetwork, sessions: Sessions, corrected: Path) -> None:
        self.network, self.sessions, self.corrected = network, sessions, corrected
        self.organs = list(network.spec.class_names)

    def take(self, data: Any, request: gr.Request) -> tuple[Any, ...]:
        """Take an uploaded file into the session of the tab."""
        session = self.sessions.open(request.session_hash)
        session.take(self.sessions.uploaded(data))
        return message("waiting for the network"), *hidden(2), message("")

    def segment(self, request: gr.Request, progress: gr.Progress) -> tuple[Any, ...]:
        """Segment the scan of the tab, and show the result."""
        session = self.sessions.of_tab.get(request.session_hash)
        sent = [] if session is None else list((session.folder / "upload").glob("*"))
        if not sent:  # `take` has said why, or the tab was closed
            return tuple(gr.skip() for _ in range(SHOWN))
        try:
            with session.lock:
                result = self.network.segment(session, sent[0], progress)
        except BaseException:
            session.clear()
            raise
        shown = result_view(session)
        table = volumes(self.network.spec, result)
        found = message(f"{result['case']} is segmented", result["warnings"])
        return (
            found,
            gr.update(visible=True),
            shown,
            table,
            downloads(session),
            gr.update(visible=True),
            gr.update(visible=True),
            gr.update(visible=False),
        )

    def begin(self, request: gr.Request) -> tuple[Any, ...]:
        """Show the slice with most labels, for correction."""
        session = self.sessions.find(request.session_hash)
        with session.lock:
            correction = self.network.start_correction(session)
            index = correction.fullest()
            slider = gr.update(maximum=correction.depth, value=index + 1, visible=True)
            parts = [gr.update(visible=False), gr.update(visible=True)]
            return *parts, slider, within_page(correction.picture(index)), message("")

    def show(self, number: float, request: gr.Request) -> tuple[Any, ...]:
        """Show a slice, counted from 1."""
        session = self.sessions.find(request.session_hash)
        with session.lock:
            correction = self.network.start_correction(session)
            picture = correction.picture(place_of(number, correction.depth))
            return within_page(picture), message("")

    def click(
        self, number: float, organ: str, kind: str, request: gr.Request, event: gr.SelectData
    ) -> tuple[Any, ...]:
        """Correct the shown slice where it was clicked."""
        session = self.sessions.find(request.session_hash)
        if organ not in self.organs:
            raise InputError(f"choose one of the organs: {', '.join(self.organs)}")
        with session.lock, self.network.computing():
            correction = self.network.start_correction(session)
            index = place_of(number, correction.depth)
            place = event.index if isinstance(event.index, list | tuple) else ()
            correction.click(index, tuple(place), self.organs.index(organ) + 1, kind == INSIDE)
            return self._corrected(session, index)

    def undo(self, number: float, request: gr.Request) -> tuple[Any, ...]:
        """Take the last click back, and show its slice."""
        session = self.sessions.find(request.session_hash)
        with session.lock, self.network.computing():
            correction = self.network.start_correction(session)
            shown = place_of(number, correction.depth)
            index = correction.undo()
            if index is None:
                raise InputError("there is no click to take back")
            picture, said, table = self._corrected(session, index)
            moved = gr.skip() if index == shown else gr.update(value=index + 1)
            return picture, said, table, moved

    def write(self, request: gr.Request) -> tuple[Any, ...]:
        """Write scan and corrected labels as training data."""
        session = self.sessions.find(request.session_hash)
        with session.lock:
            correction = self.network.start_correction(session)
            if not correction.clicks:
                raise InputError("nothing is corrected yet; click on a slice first")
            path = write_corrected(
                self.corrected, self.network.spec, correction.case, correction.labels
            )
        told = f"{path} is written; train on it after: python -m preprocess.prepare --input"
        told = f"{told} {self.corrected} --output DATA"
        if len(list(path.parent.iterdir())) == 1:  # which preprocess cannot split
            told += f" --train_cases {session.scan.name} --test_cases {session.scan.name}"
        return (message(told),)

    def _corrected(self, session: Session, index: int) -> tuple[Any, ...]:
        correction = session.correction
        count = len(correction.clicks)
        what = "downloads hold the corrected labels" if count else "nothing is corrected"
        said = f"{count} click{'s' * (count != 1)}; {what}"
        table = volumes(self.network.spec, session.result, correction)
        return within_page(correction.picture(index)), message(said), table


def place_of(number: Any, depth: int) -> int:
    """Return the index of a slice that the slider counts from 1; its box takes any number."""
    if type(number) not in (int, float):
        raise InputError(f"no slice is chosen, expected 1…{depth}")
    return int(min(depth, max(1, number))) - 1


def within_page(picture: Image.Image) -> dict[str, Any]:
    """Return a picture as a data address, so that there is no file of it to be asked for."""
    packed = io.BytesIO()
    picture.save(packed, "PNG", compress_level=1)
    content = base64.b64encode(packed.getvalue()).decode()
    return ImageData(url=f"data:image/png;base64,{content}").model_dump()


def hidden(count: int) -> list[Any]:
    """Return updates that hide `count` parts of the page."""
    return [gr.update(visible=False) for _ in range(count)]


def guarded(
    handler: Callable[..., tuple[Any, ...]], sessions: Sessions, count: int, place: int
) -> Callable[..., Any]:
    """Return a handler that tells every error in one sentence, at one place of its outputs.

    Args:
        count: outputs of the handler.
        place: of the message among them; all others stay as they are.
    """

    @functools.wraps(handler)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            values = handler(*args, **kwargs)
            return values if count > 1 else values[0]  # as Gradio wants it of a single output
        except InputError as error:
            told = str(error)
        except Stopped:
            told = "stopped"
        except Exception as error:
            told = what_is_full(error)
            if told is None:
                logging.exception("this is a bug in the program")
                told = f"the program failed ({first_line(error)}); its terminal says more"
        request = next(one for one in [*args, *kwargs.values()] if isinstance(one, gr.Request))
        session = sessions.of_tab.get(request.session_hash)
        told = told if session is None else session.words(InputError(told))
        kept: list[Any] = [gr.skip() for _ in range(count)]
        kept[place] = message(told, is_error=True)
        return kept if count > 1 else kept[0]

    return run
