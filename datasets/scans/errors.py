"""One clear sentence for what the system or SimpleITK raises on a user's file."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from common.errors import InputError, require_package


def require_scan_packages() -> None:
    """Raise an `InputError` if what reads and writes scans is not installed; pictures need less."""
    require_package("SimpleITK")
    require_package("nibabel")


@contextlib.contextmanager
def reporting_os_errors(path: str | Path) -> Iterator[None]:
    """Turn an `OSError` into an `InputError` that names the file or folder."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"cannot read {error.filename or path} ({error.strerror}); allow reading it, or pass "
            "another path"
        ) from None


@contextlib.contextmanager
def reporting_itk_errors(path: str | Path) -> Iterator[None]:
    """Turn what SimpleITK raises on a bad file into an `InputError` that names the file."""
    try:
        with without_itk_warnings():
            yield
    except RuntimeError as error:
        raise unreadable(path, error) from None


def unreadable(path: str | Path, error: RuntimeError) -> InputError:
    """Return the error for a file that SimpleITK cannot read."""
    return InputError(
        f"{path} is not a readable scan ({short_reason(error)}); it may be damaged or cut short: "
        "fetch or export it again"
    )


@contextlib.contextmanager
def without_itk_warnings() -> Iterator[None]:
    """Keep SimpleITK's C++ warnings off stderr; its errors are still raised."""
    import SimpleITK as sitk

    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def short_reason(error: BaseException) -> str:
    """Return the reason for an error, without the C++ source line and object address before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if not line.startswith("Exception thrown in SimpleITK")]
    first = (reasons or lines or [type(error).__name__])[0]
    return re.sub(r"^((s?itk::ERROR|ITK ERROR|\w+\(0x\w+\)|ERROR): )+", "", first)[:200]
