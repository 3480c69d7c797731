"""What a file is by its first bytes, for messages about files that are no pictures."""

from __future__ import annotations

# How files begin that are no picture, or in a format that is not read here.
SIGNATURES = {
    b"%!PS": "PostScript",
    b"%PDF": "a PDF document",
    b"<": "a text page (HTML, SVG or XML)",
    b"version https://git-lfs": "a pointer of Git LFS (fetch the file with `git lfs pull`)",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a file packed with gzip",
    b"PK": "a zip archive",
    b"\x93NUMPY": "a NumPy array",
    b"\0\0\0\x0cjP": "a JPEG 2000 picture",
    b"II": "a TIFF of a rare kind, e.g. of 64 bits",
    b"MM": "a TIFF of a rare kind, e.g. of 64 bits",
}


def content_of(head: bytes) -> str:
    """Say what a file is whose first bytes are those of no picture."""
    if not head:
        return "the file is empty"
    if head[128:] == b"DICM":
        return "it holds a DICOM file"
    named = [what for start, what in SIGNATURES.items() if head.lstrip().startswith(start)]
    return f"it holds {named[0]}" if named else f"it begins with {head[:8]!r}"
