"""Open a local page that segments scans and corrects the result: `python demo.py --help`."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from common.errors import InputError, exit_on_bad_input, require_package
from config.flags import demo_parser
from config.run_folder import runs_in
from config.settings import parse_args
from datasets.scans.errors import require_scan_packages
from datasets.scans.isolated import IsolatedReader
from demo_page.server import HOST, Guard, bind, results_route, serve
from demo_page.sessions import Sessions, private_folder
from distributed.signals import ended_by_signals
from utils import choose_device

QUICKSTART = Path("quickstart", "runs")
READ_S = 300  # seconds in which an upload is unpacked or read; other tabs wait meanwhile
REQUIREMENTS = "requirements-demo.txt"
# Before Gradio is imported: it reports uses and asks for its newest version otherwise.
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Check the flags, build the network, and answer the page until a signal ends the program."""
    args = demo_args(argv)
    require_scan_packages()
    device = choose_device(args.device)
    os.environ.update(QUIET)
    with bind(args.port) as listening, private_folder() as folder:
        require_package("gradio", REQUIREMENTS)
        show_page(args, device, Sessions(folder), listening)


def demo_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; without a network on it, take that of the quickstart.

    Raises:
        InputError: there is none.
    """
    parser = demo_parser()
    early, _ = parser.parse_known_args(argv)
    if early.config is None and early.lora_ckpt is None:
        if not any(any(run.glob("epoch_*.pth")) for run in runs_in(QUICKSTART)):
            raise InputError(
                f"there is no network in {QUICKSTART}; run `make quickstart`, which trains a small "
                "one in minutes, or pass --config with a run folder of train.py, or --lora_ckpt "
                "with an adapter"
            )
        argv = [*(sys.argv[1:] if argv is None else argv), "--config", str(QUICKSTART)]
    return parse_args(parser, argv)


def show_page(
    args: argparse.Namespace, device: torch.device, sessions: Sessions, listening: socket.socket
) -> None:
    """Build network and page, and serve them."""
    logging.disable(logging.INFO)  # predict.py tells where its files are, which are deleted here
    import gradio as gr
    from fastapi import FastAPI

    from demo_page.handlers import Page
    from demo_page.network import SharedNetwork
    from demo_page.page import STYLE, build

    with IsolatedReader(READ_S) as reader:
        network = SharedNetwork(args, device, reader, sessions)
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.get("/result/{token}/{name}")(results_route(sessions, network.labels_as))
        font = ["system-ui", "sans-serif"]  # of the system: other names are asked from Google
        gr.mount_gradio_app(
            app,
            build(Page(network, sessions, Path(args.corrected))),
            "/",
            server_name=HOST,
            server_port=args.port,
            footer_links=[],
            run_history=False,
            max_file_size=network.limits.file_bytes,
            ssr_mode=False,
            mcp_server=False,
            theme=gr.themes.Default(font=font, font_mono=["monospace"]),
            css_paths=STYLE,
        )
        print(f"open http://{HOST}:{args.port} in a browser; Ctrl-C ends the demo", flush=True)
        serve(Guard(app, args.port), listening, sessions)


if __name__ == "__main__":
    with exit_on_bad_input(), ended_by_signals():
        main()
