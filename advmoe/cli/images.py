"""Images that a command holds in memory, to test or to calibrate a model with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advmoe.cli import console
from advmoe.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from advmoe.data.sets import Images, ImageSet


def decoded(
    images: Images, size: int, what: str, *, skip_bad_images: bool = False
) -> tuple[ImageSet, NDArray[np.int64]]:
    """Images as the networks see them, and the row that each had.

    Args:
        images: The images.
        size: Height and width in pixels of decoded images.
        what: What they are, for messages.
        skip_bad_images: Whether images that cannot be decoded are left out. A warning names them.

    Raises:
        DataError: An image cannot be decoded and is not to be skipped, or none can.
    """
    import numpy as np

    from advmoe.data.views import in_memory, named

    skipped: dict[int, str] = {}
    found = in_memory(images, size, skip_bad_images=skip_bad_images, skipped=skipped)
    if skipped:
        console.warn(f"skipped {what} images: {len(skipped)}{named(list(skipped.values()))}")
    if not len(found):
        raise DataError(f"none of the {len(images)} {what} images can be decoded; mend them")
    return found, np.delete(np.arange(len(images)), list(skipped))
