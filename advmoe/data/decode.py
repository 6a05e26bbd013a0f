"""Decode encoded images into one array, for sets that fit in memory."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.io import ImageReadMode, decode_image

from advmoe.data.sets import DatasetInfo, Progress
from advmoe.errors import DataError

REPORT_EVERY = 1000


def decode_all(
    encoded: Iterable[tuple[str, bytes | None]], count: int, info: DatasetInfo, *, progress: Progress | None = None
) -> NDArray[np.uint8]:
    """Decode ``count`` pairs ``(name for messages, JPEG or PNG bytes)`` to uint8 ``[count, size, size, 3]``.

    ``size`` is ``info.image_size``. Grey images become RGB; EXIF orientation is ignored.

    Raises `DataError`, naming the image, for one that is missing, cannot be decoded, or has another size.
    """
    images = np.empty((count, info.image_size, info.image_size, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)  # once per image, from torchvision
        for row, (name, content) in enumerate(encoded):
            images[row] = _decode(content, info.image_size, name)
            done = row + 1
            if progress is not None and (done % REPORT_EVERY == 0 or done == count):
                progress(f"decoding {info.name}", done, count)
    return images


def _decode(encoded: bytes | None, size: int, name: str) -> NDArray[np.uint8]:
    if not encoded:
        raise DataError(f"{name}: the image is missing")
    try:
        pixels_CHW = decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError as error:
        # torchvision puts the place in its C++ source before the reason.
        reason = re.sub(r"^\w+, \S+:\d+, ", "", str(error).strip().split("\n")[0])
        raise DataError(f"{name}: the image cannot be decoded ({reason})") from error
    if pixels_CHW.dtype != torch.uint8 or tuple(pixels_CHW.shape) != (3, size, size):
        raise DataError(
            f"{name}: the image decodes to {pixels_CHW.dtype} {list(pixels_CHW.shape)},"
            f" expected uint8 {[3, size, size]}"
        )
    pixels_HWC: NDArray[np.uint8] = pixels_CHW.permute(1, 2, 0).numpy()
    return pixels_HWC
