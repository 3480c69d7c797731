"""Whether the pixels of a DICOM file are all there: SimpleITK makes up what is missing."""

from __future__ import annotations

from collections.abc import Iterator

from common.errors import InputError
from datasets.scans.dicom_tags import END_OF_SEQUENCE, ITEM, DicomFile

FRAMES, SAMPLES, ROWS, COLUMNS = 0x00280008, 0x00280002, 0x00280010, 0x00280011
BITS_ALLOCATED = 0x00280100
MOST_PADDING = 16  # bytes behind the pixels
RLE = "1.2.840.10008.1.2.5"  # transfer syntaxes with at least one part for each frame
JPEG = {f"1.2.840.10008.1.2.4.{end}" for end in (50, 51, 57, 70, 80, 81, 90, 91)}
# JPEG, JPEG 2000, and JPEG 2000 in a JP2 file, as some archives store it.
JPEG_STARTS, JPEG_END = (b"\xff\xd8", b"\xff\x4f", b"\0\0\0\x0cjP  "), b"\xff\xd9"


def count_frames(file: DicomFile) -> int:
    """Return the number of frames of a file whose pixels are all there.

    Raises:
        InputError: the number is none, or the pixels are more or fewer than the tags say.
    """
    number = file.text(FRAMES) or "1"
    if not (number.isascii() and number.isdecimal() and 0 < int(number[:12]) < 1 << 31):
        raise InputError(f"{file.path} has {number[:20]!r} frames, expected a whole number above 0")
    frames = int(number)
    # A file without pixels, or in colour, is refused for that.
    if file.has_pixels and not file.pixels.is_cut_short and file.whole(SAMPLES, 1) == 1:
        check = _fault_in_parts if file.pixels.is_compressed else _fault_in_length
        if fault := check(file, frames):
            raise InputError(f"{file.path} {fault}; fetch or export the series again")
    return frames


def _fault_in_length(file: DicomFile, frames: int) -> str | None:
    """Say how the length of pixels that are stored as they are differs from the tags."""
    rows, columns, bits = (file.whole(tag) for tag in (ROWS, COLUMNS, BITS_ALLOCATED))
    wanted = -(-frames * rows * columns * bits // 8)
    if 0 < wanted <= file.pixels.length <= wanted + MOST_PADDING:
        return None
    return (
        f"holds {file.pixels.length} bytes of pixels, expected {wanted} by its tags (frames × rows "
        f"× columns: {frames} × {rows} × {columns} of {bits} bits)"
    )


def _fault_in_parts(file: DicomFile, frames: int) -> str | None:
    """Say what is missing of compressed pixels, which are stored in parts."""
    try:
        _, *parts = _parts(file)  # the first one is a table
    except (EOFError, ValueError):
        return "has compressed pixels that are damaged or cut short"
    is_jpeg = file.transfer_syntax in JPEG
    if (is_jpeg or file.transfer_syntax == RLE) and len(parts) < frames:
        return f"holds {len(parts)} compressed frames, expected {frames} by its tags"
    if not is_jpeg:
        return None
    if len(parts) != frames:  # a frame has several parts
        parts = [(parts[0][0], parts[-1][1])]
    if any(not start.startswith(JPEG_STARTS) or not end.rstrip(b"\0").endswith(JPEG_END)
           for start, end in parts):  # fmt: skip
        return "has compressed pixels without a start or an end of the compression"
    return None


def _parts(file: DicomFile) -> Iterator[tuple[bytes, bytes]]:
    """Yield the first and the last bytes of each part of compressed pixels."""
    with file.path.open("rb") as stream:
        stream.seek(file.pixels.start)
        while True:
            head = stream.read(8)
            if len(head) < 8:
                raise EOFError
            tag = int.from_bytes(head[:2], "little") << 16 | int.from_bytes(head[2:4], "little")
            end = stream.tell() + int.from_bytes(head[4:], "little")
            if tag == END_OF_SEQUENCE:
                return
            if tag != ITEM or end > file.pixels.end_of_file:
                raise EOFError
            first = stream.read(min(8, end - stream.tell()))
            stream.seek(max(stream.tell() - len(first), end - 8))
            last = stream.read(end - stream.tell())
            yield first, last
