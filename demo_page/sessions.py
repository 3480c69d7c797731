"""The sessions of the page: each tab has its own folder, scan and result, which end with it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InputError

if TYPE_CHECKING:
    from datasets.scans.files import ScanFile
    from demo_page.correcting import Correction

UPLOADS = "uploads"  # folder of what Gradio receives, until a session takes it
GONE = "this page was closed meanwhile, or its scan was replaced; load the page again"


class Stopped(BaseException):
    """The tab was closed or the program ends; no scan has failed."""


@dataclass
class Session:
    """What one tab has: a scan and its result."""

    folder: Path  # everything of the tab lies here
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))  # in its addresses
    lock: threading.RLock = field(default_factory=threading.RLock)
    closed: bool = False
    scan: ScanFile | None = None
    result: dict[str, Any] | None = None  # as predictions.json has it
    correction: Correction | None = None

    @property
    def output(self) -> Path:
        """The folder of predict.py."""
        return self.folder / "output"

    def take(self, path: Path) -> Path:
        """Forget the scan before, and move an uploaded file into the folder; return its place."""
        with self.lock:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.scan = self.result = self.correction = None
            self.token = secrets.token_urlsafe(24)  # addresses of the scan before are void
            place = self.folder / "upload" / path.name
            place.parent.mkdir(mode=0o700, parents=True)
            try:
                path.rename(place)
            except OSError:
                raise InputError("the upload is not there any more; send it again") from None
            with contextlib.suppress(OSError):
                path.parent.rmdir()
            return place

    def clear(self) -> None:
        """Delete the files, and forget the scan."""
        with self.lock:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.scan = self.result = self.correction = None

    def words(self, error: BaseException) -> str:
        """Return the message of an error without the private folder."""
        text = str(error)
        for place in ("upload", "unpacked", "output", ""):
            text = text.replace(f"{self.folder / place}/", "").replace(str(self.folder / place), "")
        return text


class Sessions:
    """All sessions, in one private folder that is deleted with the program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uploads = folder / UPLOADS
        self.of_tab: dict[str, Session] = {}
        self.stopping = threading.Event()

    def open(self, tab: str) -> Session:
        """Return the session of a tab, a new one if it has none."""
        return self.of_tab.setdefault(tab, Session(self.folder / secrets.token_urlsafe(12)))

    def find(self, tab: str) -> Session:
        """Return the session of a tab.

        Raises:
            InputError: it has none with a result.
        """
        session = self.of_tab.get(tab)
        if session is None or session.result is None:
            raise InputError(GONE)
        return session

    def by_token(self, token: str) -> Session | None:
        """Return the session whose addresses hold this token."""
        for session in list(self.of_tab.values()):
            if secrets.compare_digest(session.token.encode(), token.encode()):
                return session
        return None

    def close(self, tab: str) -> None:
        """End the session of a tab; its scan in work is stopped."""
        if session := self.of_tab.pop(tab, None):
            session.closed = True
            session.clear()

    def go_on(self, session: Session) -> None:
        """Raise `Stopped` if the tab was closed, or the program ends."""
        if session.closed or self.stopping.is_set():
            raise Stopped

    def uploaded(self, data: Any) -> Path:
        """Return the file that Gradio has received, by what the browser says of it.

        Raises:
            InputError: it names another file.
        """
        path = Path(str(data.get("path", ""))) if isinstance(data, dict) else Path()
        inside = path.resolve().is_relative_to(self.uploads.resolve())
        if not inside or path.is_symlink() or not path.is_file():
            raise InputError("the upload is not there any more; send it again")
        return path


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Make a folder that only this user can enter, for all files of this process and its children.

    It is deleted at the end, and so is all that libraries put into temporary files meanwhile.
    """
    before = tempfile.tempdir, os.environ.get("TMPDIR")
    folder = Path(tempfile.mkdtemp(prefix="samed-demo-")).resolve()  # mode 0700
    try:
        for name in (UPLOADS, "tmp"):
            (folder / name).mkdir(mode=0o700)
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
        os.environ["GRADIO_TEMP_DIR"] = str(folder / UPLOADS)
        yield folder
    finally:
        tempfile.tempdir = before[0]
        if before[1] is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before[1]
        shutil.rmtree(folder, ignore_errors=True)
