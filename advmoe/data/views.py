"""The transforms between an image set and the networks: random parts in training, the whole image
or its middle otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from advmoe import rust_router
from advmoe.data.loader import BatchLoader
from advmoe.data.sets import Images, ImageSet, Progress
from advmoe.data.transforms import CropFlip, RandomResizedCrop, ResizeCenterCrop, Transform, compiled, output_size
from advmoe.errors import DataError

SHORTER_SIDE = 8 / 7
"""Shorter side of a resized image relative to the size cut out of it: 256 for 224, as usual for ImageNet models."""
NAMED = 20
"""Number of skipped images that a warning names."""


def training_transform(images: Images, size: int, *, flip: bool) -> Transform:
    """The transform in training: padding and cropping for images in memory (as for CIFAR),
    otherwise random parts (as for ImageNet).

    The padding is an eighth of the size: 4 for 32, 8 for 64.
    """
    if isinstance(images, ImageSet):
        return CropFlip(padding=size // 8, flip=flip)
    return RandomResizedCrop(size=size, flip=flip)


def evaluation_view(size: int) -> ResizeCenterCrop:
    """The transform in evaluation for images of different sizes."""
    return ResizeCenterCrop(size=size, resize=round(size * SHORTER_SIDE))


def in_memory(
    images: Images,
    size: int,
    *,
    skip_bad_images: bool = False,
    progress: Progress | None = None,
    skipped: dict[int, str] | None = None,
) -> ImageSet:
    """The images as an `ImageSet`: unchanged if they are in memory, otherwise decoded, resized and
    cut to the middle ``[size, size]``.

    An attack reads an image many times, so evaluation decodes it once. 50,000 images of 224x224
    need 7.5 GB.

    Args:
        images: The images.
        size: Height and width in pixels of decoded images.
        skip_bad_images: Whether images that cannot be decoded are left out.
        progress: Called as `progress(what, done, total)`.
        skipped: Gets row and reason of each image that is left out, by ascending row.

    Raises:
        DataError: An image cannot be read or decoded, unless bad images are skipped. The message
            names the file.
    """
    if isinstance(images, ImageSet):
        return images
    view = evaluation_view(size)
    loader = BatchLoader(
        images,
        batch_size=256,
        augment=view,
        dtype=torch.uint8,
        channels_last=True,
        on_bad_image="skip" if skip_bad_images else "raise",
    )
    pixels, labels = np.empty((len(images), size, size, 3), np.uint8), np.empty(len(images), np.int64)
    done = 0
    try:
        for batch in loader.epoch(0):
            part = slice(done, done + len(batch.labels))
            pixels[part], labels[part] = batch.images.permute(0, 2, 3, 1).numpy(), batch.labels.numpy()
            done = part.stop
            if progress is not None:
                progress("decoding images", done + len(loader.skipped), len(images))
    except DataError as error:
        if skip_bad_images:
            raise
        raise DataError(f"{error}; mend or remove the file, or skip bad images", "skip_bad_images") from error
    if skipped is not None:
        skipped |= sorted(loader.skipped.items())
    return ImageSet(images=pixels[:done], labels=labels[:done], class_names=images.class_names)


def named(reasons: Sequence[str]) -> str:
    """The first reasons for which images were skipped, as the end of a warning."""
    more = f"; and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
    return "".join(f"; {reason}" for reason in reasons[:NAMED]) + more


def shown(pixels: NDArray[np.uint8], view: Transform) -> NDArray[np.uint8]:
    """Apply a transform with a fixed size to one uint8 RGB image ``[height, width, 3]``, in Rust."""
    height, width = output_size(view) or pixels.shape[:2]
    out = np.empty((height, width, 3), np.uint8)
    filler = rust_router.BatchFiller(
        seed=0,
        stream=0,
        transform=compiled(view),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        channels_last=True,
        num_threads=1,
        skip_bad=False,
    )
    filler.fill(np.ascontiguousarray(pixels)[None], np.zeros(1, np.int64), 0, out[None], rust_router.Stop())
    return out
