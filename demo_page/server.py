"""The server of the page: on 127.0.0.1 alone, with few addresses, and no request to other hosts."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from common.errors import InputError
from datasets.scans.files import PICTURES
from demo_page.sessions import Session, Sessions
from evaluation.viewer import PAGE as VIEWER

if TYPE_CHECKING:
    from starlette.responses import Response

HOST = "127.0.0.1"
GRACE_S = 2  # seconds in which open connections may end
LAST_S = 15  # seconds after which the program ends whatever still computes
# Labels can be downloaded in these formats.
FORMATS = (".nii.gz", ".nrrd", ".seg.nrrd", ".mha")
# Everything else that Gradio would serve is refused: files, other hosts, its API, its monitor.
ADDRESSES = {
    "GET": (
        "/",
        "/config",
        "/theme.css",
        "/assets/",
        "/static/",
        "/favicon.ico",
        "/result/",
        "/gradio_api/startup-events",
        "/gradio_api/heartbeat/",
        "/gradio_api/queue/data",
        "/gradio_api/upload_progress",
    ),
    "POST": ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/cancel"),
}
# Gradio's page has scripts and styles in its HTML.
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-src 'self'; "
    "manifest-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
# The viewer's page brings its own policy, which allows it nothing but itself.
POLICY_OF_VIEWER = "frame-ancestors 'self'"


def bind(port: int) -> socket.socket:
    """Return a socket that listens on 127.0.0.1.

    Raises:
        InputError: the port is in use or not allowed.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()
    except OSError as error:
        listening.close()
        taken = error.errno == errno.EADDRINUSE
        what = "is in use, perhaps by another demo" if taken else f"is refused ({error.strerror})"
        other = port + 1 if taken and port < 65535 else 7860
        raise InputError(f"port {port} of {HOST} {what}; pass --port {other}") from None
    return listening


class Guard:
    """ASGI middleware: only known addresses, only this page's own requests, a strict policy.

    The names of host and origin are checked, so that a page of another site, also one whose name
    leads to 127.0.0.1, can neither read nor send anything.
    """

    def __init__(self, app: Any, port: int) -> None:
        self.app = app
        shown = "" if port == 80 else f":{port}"  # browsers leave out the usual port
        self.hosts = {f"{name}{shown}".encode() for name in (HOST, "localhost")}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        from starlette.responses import PlainTextResponse

        refusal = self.refusal(scope) if scope["type"] == "http" else 404
        if refusal:
            await PlainTextResponse("not here", refusal)(scope, receive, send)
            return
        is_result = scope["path"].startswith("/result/")
        policy = POLICY_OF_VIEWER if is_result else POLICY

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = {
                    b"content-security-policy": policy,
                    b"referrer-policy": "no-referrer",
                    b"x-content-type-options": "nosniff",
                    b"cross-origin-resource-policy": "same-origin",
                }
                kept = [pair for pair in message["headers"] if pair[0].lower() not in added]
                message["headers"] = kept + [(name, text.encode()) for name, text in added.items()]
            await send(message)

        await self.app(scope, receive, sent)

    def refusal(self, scope: Any) -> int | None:
        """Return the status with which a request is refused; None: it is answered."""
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), value)
        origin = headers.get(b"origin")
        if headers.get(b"host") not in self.hosts:
            return 421
        if origin is not None and origin.removeprefix(b"http://") not in self.hosts:
            return 403
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        path = scope["path"]
        for known in ADDRESSES.get(method, ()):
            if path == known or (known.endswith("/") and known != "/" and path.startswith(known)):
                return None if ".." not in path else 404
        return 404


def results_route(
    sessions: Sessions, labels_as: Callable[[Session, str], Path]
) -> Callable[..., Response]:
    """Return the function that serves the files of results: those of a known token alone.

    Args:
        labels_as: returns a label file of a session in a format.
    """
    from starlette.responses import FileResponse, PlainTextResponse

    def serve(token: str, name: str) -> Response:
        session = sessions.by_token(token)
        if session is None or session.result is None:
            return PlainTextResponse("this result is not there any more", 404)
        with session.lock:
            case, output = session.result["case"], session.output
            own = {
                "viewer.html": output / VIEWER,
                "overlay.png": output / "overlays" / f"{case}.png",
                "volumes.csv": output / "volumes.csv",
            }
            if name in own:
                if not own[name].is_file():
                    return PlainTextResponse("this result has no such file", 404)
                as_file = f"{case}_volumes.csv" if name == "volumes.csv" else None
                return FileResponse(own[name], filename=as_file, headers=NOT_KEPT)
            suffix = name.removeprefix("labels")
            if suffix not in formats_of(session):
                return PlainTextResponse("this result has no such file", 404)
            try:
                path = labels_as(session, suffix)
            except InputError as error:
                return PlainTextResponse(session.words(error), 400)
        # The scan itself may lie in the folder of downloads.
        return FileResponse(path, filename=f"{case}_labels{suffix}", headers=NOT_KEPT)

    return serve


NOT_KEPT = {"cache-control": "no-store"}


def formats_of(session: Session) -> tuple[str, ...]:
    """Return the formats in which the labels of a session can be downloaded."""
    return (".png",) if session.scan.suffix in PICTURES else FORMATS


def serve(app: Any, listening: socket.socket, sessions: Sessions) -> None:
    """Answer requests until a signal comes; then stop what is computed and close all."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            sessions.stopping.set()
            end = threading.Timer(LAST_S, _end_now, (sessions, sig))
            end.daemon = True
            end.start()
            super().handle_exit(sig, frame)

    for name in ("uvicorn", "uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what it says of closed connections
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=GRACE_S,
    )
    Server(config).run(sockets=[listening])


def _end_now(sessions: Sessions, number: int) -> None:
    """Delete the files and end the process, because a computation does not heed the request."""
    import shutil

    shutil.rmtree(sessions.folder, ignore_errors=True)
    os._exit(128 + signal.Signals(number))
