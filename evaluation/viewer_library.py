"""NiiVue, the library that draws the volumes of `viewer.html`, out of the package `ipyniivue`.

Of the packages that hold NiiVue, this is the only one that its authors keep and that holds it in
one file with its licence; pip installs it without Node.js and, with --no-deps, without Jupyter.
Streamlit's and JupyterLab's packages split it into several files that load each other, which a
page opened by double click cannot do. The file is a Jupyter widget that does not export NiiVue's
class, so its last statement is replaced. That is checked: one version is known, by its SHA-256.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import PackageNotFoundError, distribution

PACKAGE, VERSION, NIIVUE = "ipyniivue", "2.4.4", "0.65.0"
SCRIPT = "ipyniivue/static/widget.js"
SHA256 = "922951141f03da6294cc74a7c520d694a9723733ee25d997b85da8136057a96b"
EXPORTS, HANDS_OUT = "export{Ih as default};", "globalThis.Niivue=t2;"  # t2 is its class Niivue
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"


@dataclass(frozen=True)
class Library:
    """NiiVue as a page takes it in."""

    code: str  # of a JavaScript module that sets globalThis.Niivue
    licence: str

    @cached_property
    def packed(self) -> str:
        """The code as gzip in base64. Making it takes half a second."""
        return base64.b64encode(gzip.compress(self.code.encode(), 9, mtime=0)).decode()


@lru_cache
def find_library() -> Library | None:
    """Return NiiVue; None: it is not installed, or in another version than the known one."""
    try:
        package = distribution(PACKAGE)
        content = package.locate_file(SCRIPT).read_bytes()
        licence = package.read_text("licenses/LICENSE")
    except (PackageNotFoundError, OSError):
        return None
    if hashlib.sha256(content).hexdigest() != SHA256 or not licence:
        return None
    code = content.decode().rstrip()
    return Library(code.removesuffix(EXPORTS) + HANDS_OUT, licence)
