"""Image sets that stay encoded in files: folders, tar shards and packs, reached by (file, offset, length)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from advmoe import rust_router
from advmoe.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """Labelled JPEG and PNG images in files; read and decoded when a batch needs them."""

    source: rust_router.EncodedSource
    """Where the images lie."""
    labels: NDArray[np.int64]
    """[n]"""
    class_names: tuple[str, ...]
    """Names of the classes, in the order of their labels."""

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.source):
            raise DataError(f"expected a label for each of {len(self.source)} images, got {len(self.labels)} labels")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            last = len(self.class_names) - 1
            raise DataError(f"expected labels 0 to {last}, got {self.labels.min()} to {self.labels.max()}")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)


def image_folder(root: str | PathLike[str]) -> EncodedImages:
    """Images laid out as `root/class/image`, as torchvision's ImageFolder has them; classes and images by name.

    Formats are told by content, so endings (.jpg, .jpeg, .png in any case) only say what is an image.

    Raises:
        DataError: A folder that is missing, or has no images.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"expected a folder of class folders, but {root} is not one")
    class_names = sorted(path.name for path in root.iterdir() if path.is_dir())
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        images = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        files.extend(images)
        labels.extend([label] * len(images))
    if not files:
        raise DataError(f"expected images as {root}/<class>/<image>{IMAGE_SUFFIXES[0]}, found none")
    zeros = np.zeros(len(files), dtype=np.uint64)
    source = rust_router.EncodedSource(files, np.arange(len(files), dtype=np.uint32), zeros, zeros)
    return EncodedImages(source=source, labels=np.array(labels, dtype=np.int64), class_names=tuple(class_names))


def tar_shards(paths: Sequence[str | PathLike[str]], *, class_names: Sequence[str]) -> EncodedImages:
    """Images in uncompressed tar files of the WebDataset layout (`name.jpg` beside `name.cls`), without unpacking them.

    Raises:
        DataError: A file that is missing or cut, an image without label, or a label that is no class.
    """
    shards = [rust_router.tar_samples(path) for path in paths]
    files = [np.full(len(offsets), file, dtype=np.uint32) for file, (offsets, _, _) in enumerate(shards)]
    if not shards:
        raise DataError("expected at least one tar shard, got none")
    offsets, lengths, labels = (np.concatenate(column) for column in zip(*shards, strict=True))
    source = rust_router.EncodedSource(list(paths), np.concatenate(files), offsets, lengths)
    return EncodedImages(source=source, labels=labels, class_names=tuple(class_names))
