"""Reading of pictures: photographs, slices exported as PNG, and masks of class indices.

Pillow decodes. What it would shorten, namely colours of 16 bits and some kinds of TIFF, SimpleITK
decodes instead, or the picture is refused.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from common.errors import InputError, require_package, warn
from common.files import require_file
from common.names import utf8_path
from datasets.scans.errors import reporting_itk_errors, reporting_os_errors
from datasets.scans.signatures import content_of

# Pillow opens by content, whatever the suffix is. It is offered no format that starts a program
# (PostScript) or reads other files.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP")  # a JPEG may turn out to be an MPO
# A picture of more pixels must have a byte in its file for every so many of them: packing gives no
# more than 1032 (PNG) or 1365 (LZW).
SMALL, DENSEST = 1 << 24, 1400
TAIL, ZEROS, JPEG_END = 1 << 16, bytes(64), b"\xff\xd9"  # of the end of a file
LOSSY = ("JPEG", "MPO", "WEBP")
PLAIN = ("1", "L", "I;16", "I;16B", "I", "F", "RGB", "RGBA")  # modes whose values are taken as is
CONVERTED = {"P": "RGB", "PA": "RGBA", "LA": "RGBA", "RGBX": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}
PNG_START = b"\x89PNG\r\n\x1a\n"
WHITE_IS_ZERO = 0  # of the TIFF tag PhotometricInterpretation
UNSIGNED, SIGNED = 1, 2  # of the TIFF tag SampleFormat
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
SUBFILE, OLD_SUBFILE = 254, 255
ASIDE = 0b101  # bits of SUBFILE: a smaller copy of another page, or its mask

TO_VOLUME = (
    'python -c "import sys, SimpleITK as s; s.WriteImage(s.ReadImage(sys.argv[1]), sys.argv[2])"'
    " {path} {stem}.nii.gz"
)
TO_PICTURES = (
    'python -c "import sys; from PIL import Image, ImageSequence as S; '
    '[p.save(sys.argv[2] % i) for i, p in enumerate(S.Iterator(Image.open(sys.argv[1])))]"'
    " {path} {stem}_%03d.png"
)


def read_picture(path: Path) -> np.ndarray:
    """Read a picture as (1, H, W), or (1, 3, H, W) in colour.

    Values are uint8 or uint16 in general, in as many bits as the file has; other types keep their
    dtype. Opacity is dropped. A picture in colour that is grey everywhere is read as grey.

    Raises:
        InputError: the picture is damaged, is no single picture, or cannot be read in full depth.
    """
    with opened_picture(path) as picture:
        array = _stored_values(picture, path)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.ndim == 3:
        array = array.transpose(2, 0, 1)[:3]
        if (array == array[:1]).all():
            array = array[0]
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{path} holds NaN or infinite values; export it again")
    if array.dtype.kind in "iu" and array.itemsize > 2 and 0 <= array.min() <= array.max() < 65536:
        array = array.astype(np.uint16)  # Pillow reads 16 bits of grey as int32
    return np.ascontiguousarray(array[None])


def read_index_picture(path: Path, *, thresholded: bool = False) -> np.ndarray:  # (1, H, W)
    """Read the palette index or grey value of each pixel of a label picture, as it is stored.

    Grey that is stored as colour (R = G = B, opaque) is read as grey.

    Args:
        thresholded: the values meet a threshold, so formats that change them are accepted, and
            white of 1 bit is 255 as in other masks.

    Raises:
        InputError: the picture is damaged, in a format that changes values, or in colours that
            are not indices.
    """
    with opened_picture(path) as picture:
        packed = picture.format in LOSSY or picture.info.get("compression") == "jpeg"
        if packed and not thresholded:
            kind = {"WEBP": "a WebP picture"}.get(picture.format, "a JPEG")
            raise InputError(
                f"label {path} is {kind} by its content, whose compression changes label values; "
                "export the labels as PNG, or, if they show one class in white, pass "
                "--label_threshold 128"
            )
        if _is_inverted(picture) and picture.mode != "1":
            raise InputError(
                f"{path} is a TIFF that shows 0 as white, so its label values could be meant in "
                "two ways; save it as PNG with 0 for background"
            )
        bits = _bits(picture, path)
        array = np.asarray(picture) if picture.mode == "P" else _stored_values(picture, path)
    if array.ndim == 3:
        return _opaque_grey(array, path)[None]
    if array.dtype == bool:
        array = array.astype(np.uint8) * (255 if thresholded else 1)
    elif bits < 8 and picture.mode == "L" and picture.format in ("PNG", "TIFF"):
        array = array // (255 // (2**bits - 1))  # Pillow spreads 2 or 4 bits of grey over 0…255
    return np.ascontiguousarray(array[None])


def used_palette(path: Path) -> list[str] | None:
    """Return the colours of a palette picture by index, as `#rrggbb`; None: no palette."""
    with opened_picture(path) as picture:
        colours = picture.getpalette("RGB") if picture.mode == "P" else None
    if colours is None:
        return None
    return [f"#{bytes(colours[start : start + 3]).hex()}" for start in range(0, len(colours), 3)]


def is_turned(path: Path) -> bool:
    """Return whether a readable picture is stored in another orientation than it is displayed."""
    with Image.open(path, formats=FORMATS) as picture:
        return picture.getexif().get(ExifTags.Base.Orientation, 1) != 1


@contextlib.contextmanager
def opened_picture(path: Path) -> Iterator[Image.Image]:
    """Open and decode a picture, turned as it is displayed.

    Raises:
        InputError: for everything that a decoder raises on a damaged picture.
    """
    with reporting_os_errors(path):
        require_file(path, what="picture", remedy="check the path")
        with path.open("rb") as file:
            head = file.read(132)
            file.seek(-min(TAIL, path.stat().st_size), os.SEEK_END)
            tail = file.read()
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tags that Pillow does not need
        try:
            picture = stack.enter_context(Image.open(path, formats=FORMATS))
            _select_page(picture, path)
            if picture.width * picture.height > max(SMALL, DENSEST * path.stat().st_size):
                raise ValueError(
                    f"its header gives {picture.width} × {picture.height} pixels, far more than a "
                    "file of its size can hold"
                )
            if picture.format == "TIFF" and picture.getexif().get(ExifTags.Base.Orientation, 1) > 4:
                raise ValueError(
                    "a TIFF stored on its side, which is read incorrectly; expected upright"
                )
            # Decoders make up what is missing; some cameras fill a whole file with zeros.
            whole = not tail.endswith(ZEROS) or tail.rstrip(b"\0").endswith(JPEG_END)
            if picture.format in ("JPEG", "MPO") and not whole:
                raise ValueError("it ends in zeros, as after a broken download")
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)  # the orientation in which it is shown
        except InputError:
            raise
        except UnidentifiedImageError:
            raise InputError(
                f"{path} is not a readable picture ({content_of(head)}); save it as PNG, or as "
                "TIFF of 8 or 16 bits, or take it out of the folder"
            ) from None
        except Exception as error:  # on damaged bytes the decoders raise nearly anything
            huge = isinstance(error, Image.DecompressionBombError)
            remedy = "cut it into tiles" if huge else "export it again"
            raise InputError(
                f"{path} is not a readable picture ({str(error)[:160]}); {remedy}"
            ) from None
        yield picture


def _stored_values(picture: Image.Image, path: Path) -> np.ndarray:  # (H, W) or (H, W, C)
    """Return the values of a decoded picture in the depth of the file; a palette as its colours.

    Raises:
        InputError: the values cannot be read in this depth.
    """
    bits, tags = _bits(picture, path), getattr(picture, "tag_v2", {})
    if (bits, tags.get(SAMPLE_FORMAT, (1,))[0]) in ((8, SIGNED), (32, UNSIGNED)):
        return _by_simpleitk(picture, path, bits)  # Pillow would wrap the values
    if bits > 8 and np.asarray(picture).itemsize == 1 and picture.mode != "P":
        return _by_simpleitk(picture, path, bits)  # Pillow would drop the lower bits
    if picture.mode not in PLAIN and picture.mode not in CONVERTED:
        raise InputError(f"{path} is a picture of mode {picture.mode}; save it in RGB or grey")
    array = np.asarray(picture.convert(CONVERTED.get(picture.mode, picture.mode)))
    if _is_inverted(picture) and bits == 16:
        array = 65535 - array  # Pillow inverts only 8 bits
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _by_simpleitk(picture: Image.Image, path: Path, bits: int) -> np.ndarray:  # (H, W) or (H, W, C)
    """Read a picture by SimpleITK, or refuse it if that would lose depth as well."""
    require_package("SimpleITK")
    import SimpleITK as sitk

    array = None
    if getattr(picture, "n_frames", 1) == 1 and picture.mode != "CMYK":
        with (
            contextlib.suppress(InputError),
            _without_significant_bits(path) as plain,
            reporting_itk_errors(path),
        ):
            array = sitk.GetArrayFromImage(sitk.ReadImage(utf8_path(plain)))
    if (
        array is None
        or is_turned(path)
        or 8 * array.itemsize != bits
        or array.shape[:2] != picture.size[::-1]
    ):
        raise InputError(
            f"{path} holds {bits} bits per channel in a form that cannot be read in full depth "
            f"(mode {picture.mode}); save it as RGB or grey of {bits} bits, upright, without "
            "opacity"
        )
    return array


@contextlib.contextmanager
def _without_significant_bits(path: Path) -> Iterator[Path]:
    """Yield a PNG without the chunk sBIT, by which SimpleITK would shift the values down."""
    content = path.read_bytes()
    start, kept = len(PNG_START), [PNG_START]
    while content.startswith(PNG_START) and start < len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        if content[start + 4 : start + 8] != b"sBIT":
            kept.append(content[start:end])
        start = end
    plain = b"".join(kept)
    if len(kept) == 1 or len(plain) == len(content):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.png"
        copy.write_bytes(plain)
        yield copy


def _bits(picture: Image.Image, path: Path) -> int:
    """Return the bits per channel that the file has, not those that Pillow gives."""
    if picture.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24]  # of the first chunk, IHDR
    return int(getattr(picture, "tag_v2", {}).get(BITS, (8,))[0])


def _is_inverted(picture: Image.Image) -> bool:
    return getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO


def _opaque_grey(array: np.ndarray, path: Path) -> np.ndarray:  # (H, W, 3 or 4) -> (H, W)
    """Return the grey values of a mask that is stored in colour."""
    colours, opacity = array[..., :3], array[..., 3:]
    if (colours != colours[..., :1]).any():
        seen = np.unique(colours.reshape(-1, 3), axis=0)
        shown = ", ".join(f"({', '.join(map(str, colour))})" for colour in seen[:4].tolist())
        raise InputError(
            f"{path} holds {len(seen)} colours ({shown}{', …' if len(seen) > 4 else ''}), expected "
            "class indices: a palette or grey PNG whose values are 0 for background, then the "
            "classes, the same in all files"
        )
    if (opacity != np.iinfo(array.dtype).max).any():
        raise InputError(
            f"{path} is partly transparent, so its label values are not certain; save it as grey "
            "PNG without opacity"
        )
    return np.ascontiguousarray(colours[..., 0])


def _select_page(picture: Image.Image, path: Path) -> None:
    """Go to the one full picture of a file that holds several; the others must be copies of it.

    Raises:
        InputError: the file holds several full pictures.
    """
    count = getattr(picture, "n_frames", 1)
    if count == 1:
        return
    full, sizes = [], []
    for index in range(count):
        picture.seek(index)
        tags = getattr(picture, "tag_v2", {})
        sizes.append(picture.size)
        if not tags.get(SUBFILE, 0) & ASIDE and tags.get(OLD_SUBFILE, 1) != 2:
            full.append(index)
    picture.seek(0)
    smaller = [s for s in sizes[1:] if s[0] < sizes[0][0] and s[1] < sizes[0][1]]
    if picture.format == "MPO" or (picture.format == "TIFF" and len(smaller) == count - 1):
        full = [0]
    if len(full) == 1:
        picture.seek(full[0])
        _warn_of_other_pages(picture.format, path, count)
        return
    what = "a stack" if picture.format == "TIFF" else "an animation"
    grey = picture.format == "TIFF" and picture.mode in ("L", "I", "F", "I;16", "I;16B")
    volume = grey and len(set(sizes)) == 1
    command = (TO_VOLUME if volume else TO_PICTURES).format(
        path=shlex.quote(str(path)), stem=shlex.quote(str(path.with_suffix("")))
    )
    raise InputError(
        f"{path} is {what} of {count} pictures, expected a single picture; make "
        f"{'a volume' if volume else 'single pictures'} of it, of its image or label too, and take "
        f"the {what.split()[1]} out of the folder: {command}"
    )


@functools.cache
def _warn_of_other_pages(kind: str, path: Path, count: int) -> None:
    warn(f"{path} holds {count} pictures ({kind}); the main one is read, the others are left out")
