"""SAMed: SAM fine-tuned with LoRA for medical image segmentation.

The programs are `samed-prepare`, `samed-train`, `samed-test`, `samed-predict` and `samed-ablate`;
`python -m samed NAME` runs the others. They are the scripts of the project, which lie in the folder
`PROJECT`. A script of your own that imports from them puts that folder first:
`sys.path.insert(0, str(samed.PROJECT))`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# Installed, the project is below this package, so that names such as `datasets` and `utils` do not
# meet those of other packages. In a checkout, also of `pip install -e`, it is around it.
INSTALLED = (_HERE / "project").is_dir()
PROJECT = _HERE / "project" if INSTALLED else _HERE.parent

try:
    __version__ = version("samed")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"
