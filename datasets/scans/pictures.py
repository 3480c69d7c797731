"""Reading of pictures: photographs, slices exported as PNG, and masks of class indices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from common.errors import InputError
from common.files import require_file
from datasets.scans.errors import reporting_os_errors


def read_picture(path: Path) -> np.ndarray:
    """Read a picture as (1, H, W), or (1, 3, H, W) in colour.

    Values are uint8 or uint16 in general; other types keep their dtype. Opacity is dropped. A
    picture in colour that is grey everywhere is read as grey.
    """
    with opened_picture(path) as picture:
        if picture.mode in ("P", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "PA", "RGBX"):
            picture = picture.convert("RGB")
        elif picture.mode in ("LA", "1", "La"):
            picture = picture.convert("L")
        array = np.asarray(picture)
    if array.ndim == 3:
        array = array.transpose(2, 0, 1)
        if (array == array[:1]).all():
            array = array[0]
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{path} holds NaN or infinite values; export it again")
    if array.dtype.kind == "i" and array.min() >= 0 and array.max() < 65536:
        array = array.astype(np.uint16)  # Pillow reads 16 bits of grey as int32
    return np.ascontiguousarray(array[None])


def read_index_picture(path: Path) -> np.ndarray:  # (1, H, W) uint8 or wider
    """Read the palette index or grey value of each pixel of a label picture.

    Raises:
        InputError: the picture is damaged, in a format that changes values, or in colours that
            are not indices.
    """
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise InputError(
            f"label {path} is a JPEG, whose compression changes label values; export the labels "
            "as PNG"
        )
    with opened_picture(path) as picture:
        if picture.mode not in ("P", "L", "1", "I", "I;16"):
            raise InputError(
                f"{path} is a picture of mode {picture.mode}, expected class indices (a palette or "
                "grey PNG whose values are 0 for background, then the classes); convert it"
            )
        array = np.asarray(picture)
    return np.ascontiguousarray(
        array[None].astype(np.uint8 if array.dtype == bool else array.dtype)
    )


@contextlib.contextmanager
def opened_picture(path: Path) -> Iterator[Image.Image]:
    """Open and decode a picture.

    Raises:
        InputError: for everything that a decoder raises on a damaged picture.
    """
    with reporting_os_errors(path):
        require_file(path, what="picture", remedy="check the path")
    with contextlib.ExitStack() as stack:
        try:
            picture = stack.enter_context(Image.open(path))
            if getattr(picture, "n_frames", 1) > 1:
                raise ValueError(f"it holds {picture.n_frames} pictures, expected a single picture")
            if picture.format == "TIFF" and picture.getexif().get(ExifTags.Base.Orientation, 1) > 4:
                raise ValueError("a TIFF stored on its side, which Pillow 13 reads incorrectly")
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)  # the orientation in which it is shown
        except Exception as error:  # on damaged bytes the decoders raise nearly anything
            raise InputError(
                f"{path} is not a readable picture ({str(error)[:160]}); export it again"
            ) from None
        yield picture
