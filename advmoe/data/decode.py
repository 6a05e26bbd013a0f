"""Decode images into one array, for sets that fit in memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from advmoe import rust_router
from advmoe.data.sets import DatasetInfo, Progress
from advmoe.errors import DataError

REPORT_EVERY = 1000


def decode_all(
    encoded: Iterable[tuple[str, bytes]], count: int, info: DatasetInfo, *, progress: Progress | None = None
) -> NDArray[np.uint8]:
    """Decode ``count`` pairs ``(name for messages, JPEG or PNG bytes)`` to uint8 ``[count, size, size, 3]``.

    ``size`` is ``info.image_size``. Gray images become RGB. EXIF orientation is ignored. PNG is
    decoded exactly; JPEG differs from libjpeg by a few levels at most.

    Raises:
        DataError: An image cannot be decoded or has another size. The message names the image.
    """
    size = info.image_size
    images = np.empty((count, size, size, 3), np.uint8)
    for row, (name, content) in enumerate(encoded):
        try:
            image = rust_router.decode_image(content)
        except DataError as error:
            raise DataError(f"{name}: the image cannot be decoded ({error})") from error
        if image.shape != (size, size, 3):
            raise DataError(f"{name}: the image has {image.shape[1]}x{image.shape[0]} pixels, expected {size}x{size}")
        images[row] = image
        done = row + 1
        if progress is not None and (done % REPORT_EVERY == 0 or done == count):
            progress(f"decoding {info.name}", done, count)
    return images
