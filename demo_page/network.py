"""The network that all tabs share: it segments a scan of a session as predict.py does."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import InputError
from common.files import read_json
from common.precision import amp_dtype
from config.flags import predict_parser
from config.inference_flags import PAGE
from config.settings import dataset_spec
from correction.predictor import OrganPredictor
from datasets.scans.files import read_scan_header
from datasets.scans.isolated import IsolatedReader
from datasets.scans.labels import write_labels
from datasets.scans.orientation import reorient
from datasets.scans.pictures import read_index_picture
from demo_page.correcting import Correction
from demo_page.sessions import Session, Sessions, Stopped
from demo_page.uploads import Limits, scan_of_upload
from distributed.ranks import Ranks
from predict import merged_network, predict
from prediction.cases import Case, read_case
from prediction.results import turned_back
from utils import start_logging

Progress = Callable[[float, str], object]  # a share of the work, and what is being done
POLL_S = 0.2  # seconds between looks whether the tab was closed


class SharedNetwork:
    """The network, and what it does for a session. Its callers take turns.

    Args:
        args: of `demo_parser`.
        reader: reads scans in a process of its own.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        device: torch.device,
        reader: IsolatedReader,
        sessions: Sessions,
    ) -> None:
        self.args, self.device, self.sessions, self.reader = args, device, sessions, reader
        self.limits = Limits(args.max_upload_mb << 20, args.max_voxels)
        self.spec = dataset_spec(args)
        self.model = merged_network(predict_flags(args, Path(), Path()), device)

    def segment(self, session: Session, path: Path, progress: Progress) -> dict[str, Any]:
        """Segment the uploaded file of a session; return the result, as predictions.json has it.

        Raises:
            InputError: whatever predict.py says of the scan, or the upload is too large.
        """
        progress(0.0, "looking at the upload")
        unpacked = session.folder / "unpacked" / path.stem  # a series is named by its folder
        channel = self.spec.channel if self.args.channel is None else self.args.channel
        source, scan = self._read(session, scan_of_upload, unpacked, self.limits, channel, path)
        done = [0.0]

        def count(share: float) -> None:
            self.sessions.go_on(session)
            done[0] += share
            progress(0.05 + 0.9 * min(done[0], 1.0), "segmenting")

        progress(0.05, "reading the scan")
        args = predict_flags(self.args, source, session.output)
        try:
            predict(args, self.device, Ranks(), model=self.model, progress=count)
        except SystemExit:
            pass  # the scan failed; predictions.json says why
        finally:
            start_logging(None)  # closes the log file, which is deleted with the session
        content = read_json(session.output / "predictions.json", remedy="send the scan again")
        for message in content["failed"].values():
            raise InputError(message)
        (result,) = content["cases"]
        session.scan, session.result = scan, result
        progress(1.0, "done")
        return result

    def start_correction(self, session: Session) -> Correction:
        """Read scan and labels of a session's result, and return what corrects them."""
        if session.correction is None:
            case: Case = self._read(session, read_case, self.spec, session.scan)
            labels = self.classes(session)
            if case.orientation is not None:
                labels = np.ascontiguousarray(reorient(labels, *case.orientation))
            predictor = OrganPredictor(
                self.model,
                self.spec.class_names,
                input_size=self.args.input_size,
                img_size=self.args.img_size,
            )
            session.correction = Correction(self.spec, case, labels, predictor)
        return session.correction

    def computing(self) -> torch.autocast:
        """Return the context in which predict.py computes."""
        kind = self.device.type
        return torch.autocast(kind, amp_dtype(self.device), enabled=self.args.use_amp)

    def classes(self, session: Session) -> np.ndarray:  # (D, H, W) uint8
        """Return the classes that predict.py wrote for a session, as the scan is oriented."""
        path = session.output / session.result["file"]
        if session.scan.is_picture:
            values = read_index_picture(path)
        else:
            from datasets.scans.volumes import read_volume

            values, _ = read_volume(path)
        known = np.zeros(max(self.spec.predicted_values) + 1, np.uint8)
        known[list(self.spec.predicted_values)] = range(1, self.spec.num_classes + 1)
        return known[values]

    def labels_as(self, session: Session, suffix: str) -> Path:
        """Return a label file of a session in this format, with all corrections.

        Raises:
            InputError: the format cannot hold the geometry of the scan.
        """
        written, correction = session.output / session.result["file"], session.correction
        if written.name.endswith(suffix) and not (correction and correction.clicks):
            return written
        path = session.folder / "downloads" / f"{session.scan.name}{suffix}"
        if correction is None:
            classes, (_, geometry) = self.classes(session), read_scan_header(session.scan)
        else:
            classes = turned_back(correction.labels, correction.case)
            geometry = correction.case.geometry
        write_labels(path, np.ascontiguousarray(classes), session.scan, geometry, self.spec)
        return path

    def _read(self, session: Session, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in the reader's process; stop waiting for it if the tab is closed."""
        future: Future[Any] = self.reader.submit(function, *args)
        while True:
            try:
                self.sessions.go_on(session)
                return future.result(POLL_S)
            except NotYet:
                if future.done():  # the function itself raised it
                    raise
            except Stopped:
                future.cancel()
                # It may be unpacking an archive still, into a folder that was deleted meanwhile.
                future.add_done_callback(lambda _: session.clear())
                raise


def predict_flags(args: argparse.Namespace, source: Path, output: Path) -> argparse.Namespace:
    """Return the flags with which predict.py does the same.

    Args:
        args: of `demo_parser`.
    """
    places = {"input": str(source), "output": str(output)}
    words = ["--input", places["input"], "--output", places["output"]]
    defaults = vars(predict_parser().parse_args(words))
    own = {flag.name for flag in PAGE}
    values = {name: value for name, value in vars(args).items() if name not in own}
    return argparse.Namespace(**(defaults | values | places))
