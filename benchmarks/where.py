"""Hardware, versions and date of a measurement."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def where(device: torch.device, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return hardware, versions and date of a measurement.

    Args:
        packages: more packages whose versions matter; None stands for one that is not installed.
    """
    from utils import environment

    return {
        "device": device_name(device),
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {name: installed(name) for name in packages},
        "commit": environment()["commit"],
    }


def installed(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """Return the name of the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU cores ({platform.machine()})"
