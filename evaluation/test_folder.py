"""The folder of a test: what is there before, and what must not be mixed with it or replaced."""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import warn
from common.writing import remove_partials
from common.written import Written
from evaluation.figures import page_names, remove_rows
from evaluation.viewer import PAGE
from evaluation.volume_results import VOLUMES

# The first makes the folder a tested run, so it is removed first and written after what it names.
REPORT = ("results.json", "report.html", "results.csv", "dsc_per_organ.png", PAGE)


def refuse_foreign(written: Written, cases: Sequence[str], *, volumes: bool) -> None:
    """Raise an `InputError` if a test of these cases would replace what the user has.

    Args:
        written: of the output folder.
        volumes: whether NIfTI files are written too.
    """
    names = [*REPORT, *page_names(len(cases))]
    pictures = sorted(path.name for path in (written.folder / "slices").glob("*.png"))
    tested = set(cases)
    names += [f"slices/{name}" for name in pictures if name.rpartition("_")[0] in tested]
    if volumes:
        names += [f"predictions/{case}_{kind}.nii.gz" for case in cases for kind in VOLUMES]
    written.refuse_foreign(names, flag="--output_dir")


def remove_earlier(written: Written, *, volumes: bool) -> None:
    """Delete the report and pictures of an earlier test, and unfinished files of killed ones.

    Pictures that the user changed stay. So do earlier predictions, with a warning if this test does
    not write its own.
    """
    folder = written.folder
    for name in REPORT:
        (folder / name).unlink(missing_ok=True)
    for name in sorted(written.known):
        if name.startswith(("overlays", "slices/")) and written.wrote(name):
            (folder / name).unlink()
    remove_rows(folder)
    for part in (folder, folder / "slices", folder / "predictions"):
        remove_partials(part)
    if not volumes and any((folder / "predictions").glob("*.nii.gz")):
        warn(
            f"{folder / 'predictions'} holds labels of an earlier test; pass --is_savenii to write "
            "those of this one"
        )
