"""Prepare images of any size for a model."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from advmoe_export.errors import InputError, MissingPackageError, TooManyPixelsError
from advmoe_export.metadata import ModelMetadata

if TYPE_CHECKING:
    from PIL import Image


def prepare(
    image: str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8], metadata: ModelMetadata
) -> npt.NDArray[np.uint8]:
    """Resize an image and crop its center, as in the evaluation of the model.

    The shorter side becomes `metadata.resize` pixels long (bilinear, antialiased). Alpha and EXIF
    are ignored. `advmoe predict` and `advmoe evaluate` resize in Rust. Their pixels differ by at
    most one of 255 levels, and by a few more levels for JPEG files, because the decoders round
    differently.

    Args:
        image: an image file, a Pillow image, or uint8 RGB pixels [height, width, 3].
        metadata: metadata of the model file.

    Returns:
        uint8 [H, W, 3], which `Session.run` accepts.

    Raises:
        InputError: the image cannot be read.
        TooManyPixelsError: the image, or its resized form, has more than `MAX_PIXELS` pixels. An
            image of one row and many columns grows by resizing.
        MissingPackageError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPackageError(
            "preparing images needs Pillow; install it with: pip install 'advmoe-export[images]', "
            "or resize the images yourself and pass the pixels"
        ) from error
    if isinstance(image, Image.Image):
        picture = _rgb(image)
    elif isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise InputError(f"expected uint8 RGB pixels [height, width, 3], got {image.dtype} {list(image.shape)}")
        picture = Image.fromarray(np.ascontiguousarray(image))
    else:
        picture = read_image(image)
    shown, resized = middle(picture.height, picture.width, metadata.image_size, metadata.resize)
    if resized[0] * resized[1] > MAX_PIXELS:
        raise TooManyPixelsError(
            f"an image of {picture.width} x {picture.height} pixels would be resized to {resized[1]} x {resized[0]}, "
            f"more than {MAX_PIXELS} pixels; crop it first"
        )
    scaled = picture.resize((resized[1], resized[0]), Image.Resampling.BILINEAR)
    height, width = metadata.image_size
    return np.asarray(scaled.crop((shown[1], shown[0], shown[1] + width, shown[0] + height)))


MAX_PIXELS = 1 << 26
"""The largest number of pixels of a decoded or resized image (8192 x 8192), as in the Rust code."""
MAX_SCANS = 100
"""Most scans of a JPEG. Usual files have at most a dozen. Each scan costs a pass over all pixels."""
MAX_SEGMENTS = 10_000
"""Most segments of a JPEG. Usual files have dozens, with large profiles and previews hundreds."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pillow's names of the formats that are read. Its other decoders run programs or ignore limits."""
SAFE_FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats to accept from strangers. For these, the number of pixels bounds the memory, and it and the size of the file
bound the time. TIFF can have tiles that are larger than its image, and comments in PPM cost quadratic time."""


def read_image(
    path: str | os.PathLike[str] | BinaryIO, *, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    """An image file as RGB.

    Args:
        path: path of the file, or the opened file.
        max_pixels: highest number of pixels. It is compared with the header before decoding.
        formats: some of `FORMATS`, which are accepted.

    Raises:
        InputError: the file is missing, is not of one of the formats, is damaged, or is a JPEG of
            more than `MAX_SCANS` scans or `MAX_SEGMENTS` segments.
        TooManyPixelsError: the image has more than `max_pixels` pixels.
    """
    from PIL import Image, UnidentifiedImageError

    what = path if isinstance(path, str | os.PathLike) else "the upload"
    try:
        with warnings.catch_warnings(), _opened(path) as file:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            with Image.open(_without_remarks(file, what), formats=formats) as image:
                if image.width * image.height > max_pixels:
                    raise TooManyPixelsError(
                        f"{what} has {image.width} x {image.height} pixels, at most {max_pixels} are decoded"
                    )
                return _rgb(image)
    except FileNotFoundError as error:
        raise InputError(f"no image file {path}") from error
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise many types of errors for a damaged file
        reason = " ".join(str(error).split())
        if isinstance(error, UnidentifiedImageError):  # its text names a Python object
            reason = "it is in none of the formats"
        if isinstance(error, Image.DecompressionBombError):
            raise TooManyPixelsError(f"{what} has far too many pixels ({reason})") from error
        raise InputError(
            f"{what} cannot be decoded as an image ({reason}); expected one of: {', '.join(formats)}"
        ) from error


@contextmanager
def _opened(file: str | os.PathLike[str] | BinaryIO) -> Iterator[BinaryIO]:
    if isinstance(file, str | os.PathLike):
        with Path(file).open("rb") as opened:
            yield opened
    else:
        yield file


_JPEG = b"\xff\xd8"
_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])", re.DOTALL)
"""A marker of a JPEG with a length after it, or its end. A scan contains no such bytes."""
_END, _SCAN = 0xD9, 0xDA
_NEEDED = {*range(0xC0, 0xD0), *range(_SCAN, 0xDE), 0xE0, 0xEE}
"""Markers of frames, tables and scans, and of the two segments that tell the color space (JFIF, Adobe)."""


def _without_remarks(file: BinaryIO, what: object) -> BinaryIO:
    """A JPEG file without the segments that do not change its pixels; any other file as it is.

    Pillow joins the segments of Exif data one by one, which takes quadratic time, and looks for
    segments in places where the format has none. So only what is needed is handed on.

    Raises:
        InputError: The JPEG has too many scans or segments.
    """
    begin = file.tell()
    start = file.read(len(_JPEG))
    if start != _JPEG:
        file.seek(begin)
        return file
    content, kept = file.read(), [_JPEG]
    position = segments = scans = 0
    while (marker := _MARKER.search(content, position)) is not None:
        kind = marker[1][0]
        if kind == _END:
            kept.append(marker[0])
            break
        segments += 1
        scans += kind == _SCAN
        if scans > MAX_SCANS or segments > MAX_SEGMENTS:
            many = f"{MAX_SCANS} scans" if scans > MAX_SCANS else f"{MAX_SEGMENTS} segments"
            raise InputError(f"{what} is a JPEG of more than {many}, which are not decoded")
        position = marker.end() + max(2, int.from_bytes(content[marker.end() : marker.end() + 2], "big"))
        if kind == _SCAN:  # its pixels follow
            following = _MARKER.search(content, position)
            position = len(content) if following is None else following.start()
        if kind in _NEEDED:
            kept.append(content[marker.start() : position])
    return io.BytesIO(b"".join(kept))


def middle(
    height: int, width: int, image_size: tuple[int, int], resize: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """First row and column of the center crop, and the size of the resized image."""
    shorter = min(height, width)
    resized = height * resize // shorter, width * resize // shorter
    # Python's round, as in torchvision's center_crop: halves go to the even number.
    return (round((resized[0] - image_size[0]) / 2), round((resized[1] - image_size[1]) / 2)), resized


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    # Pillow would clip 16-bit levels at 255; it makes all levels of PGM above 255 such ones
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError("expected at most 16 bits per channel, got 32; convert the image first")
    if image.mode == "RGB":  # Pillow would copy the pixels
        image.load()
        return image
    return image.convert("RGB")
