"""Data sets as values: images, their labels, and facts such as the names of the classes."""

from __future__ import annotations

import hashlib
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe import rust_router
from advmoe.errors import ConfigError, DataError

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` during slow work. ``done == total`` ends the work."""


Announce = Callable[[str], None]
"""Called with one sentence before an action that the user should know of, such as a download."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images held in memory, with one label each."""

    images: NDArray[np.uint8]
    """uint8 ``[n, H, W, 3]``, RGB, C-contiguous."""
    labels: NDArray[np.int64]
    """int64 ``[n]``, each in ``[0, len(class_names))``."""
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.flags.c_contiguous:
            raise DataError(
                "images must be one C-contiguous uint8 array [n, height, width, 3],"
                f" not {images.dtype} {list(images.shape)}"
            )
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"labels must be int64 [{len(images)}], one per image, not {labels.dtype} {list(labels.shape)}"
            )
        check_labels(labels, len(self.class_names), where="the image set")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.float32], int]:
        """The image at ``index`` as a network takes it, float32 ``[3, H, W]`` in [0, 1], and its label.

        With these a set is a map-style data set for ``torch.utils.data.DataLoader``. `BatchLoader`
        makes the same batches faster. `take` makes a set of several images.
        """
        row = operator.index(index)
        return self.images[row].transpose(2, 0, 1) / np.float32(255), int(self.labels[row])

    @cached_property
    def digests(self) -> NDArray[np.int64]:
        """int64 ``[n]``: a number for each image that depends on its size and all its pixels. They are
        kept, because those of ImageNet take seconds.
        """
        size = str(self.images.shape[1:]).encode()
        found = [hashlib.blake2b(image.tobytes(), digest_size=8, key=size).digest() for image in self.images]
        return np.frombuffer(b"".join(found), dtype="<i8").astype(np.int64)

    def take(self, indices: NDArray[np.integer]) -> ImageSet:
        """A new set with copies of the images at ``indices``, in that order."""
        return ImageSet(
            images=np.ascontiguousarray(self.images[indices]),
            labels=self.labels[indices],
            class_names=self.class_names,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class EncodedSet:
    """Images that stay encoded (JPEG or PNG) in their files, with one label each. For sets too large for memory.

    Image ``i`` has ``lengths[i]`` bytes at offset ``offsets[i]`` of ``files[file_index[i]]``.
    Folders (one image per file) and packs (many images per file) are therefore read in the same
    way.
    """

    files: tuple[str, ...]
    """Paths of the files that hold the images."""
    file_index: NDArray[np.int64]
    """int64 ``[n]``, each in ``[0, len(files))``."""
    offsets: NDArray[np.int64]
    """int64 ``[n]``, in bytes."""
    lengths: NDArray[np.int64]
    """int64 ``[n]``, in bytes; 0 means to the end of the file."""
    labels: NDArray[np.int64]
    """int64 ``[n]``, each in ``[0, len(class_names))``."""
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("file_index", "offsets", "lengths", "labels"):
            array = getattr(self, name)
            if array.dtype != np.int64 or array.shape != self.labels.shape or array.ndim != 1:
                raise DataError(
                    f"{name} must be int64 [{self.labels.size}], one per image, not {array.dtype} {list(array.shape)}"
                )
        check_labels(self.labels, len(self.class_names), where="the image set")
        if self.labels.size and not 0 <= self.file_index.min() <= self.file_index.max() < len(self.files):
            raise DataError(f"file_index must lie in 0..{len(self.files) - 1} ({len(self.files)} files)")
        if self.labels.size and min(self.offsets.min(), self.lengths.min()) < 0:
            raise DataError("offsets and lengths must be 0 or more")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.integer]) -> EncodedSet:
        """A new set with the images at ``indices``, in that order, and with the files that hold them only."""
        used, file_index = np.unique(self.file_index[indices], return_inverse=True)
        return replace(
            self,
            files=tuple(self.files[file] for file in used),
            file_index=file_index.astype(np.int64),
            offsets=self.offsets[indices],
            lengths=self.lengths[indices],
            labels=self.labels[indices],
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave the kept `source` out of copies and pickles. They make their own."""
        return {name: value for name, value in self.__dict__.items() if name != "source"}

    @cached_property
    def source(self) -> rust_router.EncodedSource:
        """The images in the form that the Rust loader reads. The object is kept, because passing a
        million paths to Rust takes a second.
        """
        return rust_router.EncodedSource(
            self.files,
            self.file_index.astype(np.uint32),
            self.offsets.astype(np.uint64),
            self.lengths.astype(np.uint64),
        )


Images = ImageSet | EncodedSet
"""Images from which a loader makes batches."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Facts of a data set that are known before its images are read."""

    name: str
    num_classes: int
    class_names: tuple[str, ...] = ()
    """Names of the labels in order. Empty where only the files name them; filled in after reading them."""
    image_size: int
    """Height and width in pixels of the images that the networks get."""
    resized: bool = False
    """Whether the images have different sizes and are cut to `image_size` or to another requested size."""
    mean: tuple[float, float, float]
    """Mean of each color over the training set, in pixel units of [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation of each color over the training set, in pixel units of [0, 1]."""
    eps: float
    """Radius of the L∞ threat model in pixel units of [0, 1] (section 5 of the paper for the sets it uses)."""
    flip: bool = True
    """Whether mirroring keeps an image's class, so that training may mirror images."""
    train_size: int | None = None
    """Number of images in the complete training set; ``None`` if only the files tell it."""
    test_size: int | None = None
    """Number of images in the complete test set; ``None`` if only the files tell it."""
    notes: tuple[str, ...] = ()
    """Remarks for the user who trains on the data set, such as how the size was chosen."""
    warnings: tuple[str, ...] = ()
    """What may make a training or its figures worse than the user expects, such as few images."""
    gone: tuple[str, ...] = ()
    """Paths of images that cannot be read, because they are links to files that do not exist."""

    def check_image_size(self, size: int) -> None:
        """Check that the images are, or can be made, ``size`` pixels wide.

        Raises:
            ConfigError: They have a fixed size other than ``size``.
        """
        if not self.resized and size != self.image_size:
            raise ConfigError(
                f"the images of {self.name} are {self.image_size} pixels wide and are not resized, got image size "
                f"{size}; leave it out"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A data set as its authors split it. Report results on the test set only; take validation
    images from ``train``.
    """

    info: DatasetInfo
    train: Images
    test: Images


def complete_dataset(info: DatasetInfo, train: Images, test: Images, *, where: Path) -> Dataset:
    """Make a data set of two splits after comparing their sizes with those of the complete set.

    A set whose splits were both made smaller on purpose only causes a warning.

    Raises:
        DataError: One split is complete and the other is not, so files are missing.
    """
    found, complete = (len(train), len(test)), (info.train_size, info.test_size)
    if None not in complete and found != complete:
        message = (
            f"{where} holds {found[0]:,} training and {found[1]:,} test images,"
            f" where {info.name} has {complete[0]:,} and {complete[1]:,}"
        )
        if found[0] == complete[0] or found[1] == complete[1]:
            raise DataError(f"{message}: a file is truncated or missing; download it again")
        warnings.warn(f"{message}: results are not comparable with others", stacklevel=2)
    return Dataset(info=info, train=train, test=test)


def check_labels(labels: NDArray[np.integer], num_classes: int, *, where: str) -> None:
    """Check that every label is in ``[0, num_classes)``.

    Raises:
        DataError: One is not; the message names the first one.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        row = int(wrong[0])
        raise DataError(
            f"{where}: label {int(labels[row])} of image {row} is out of range;"
            f" labels must be 0..{num_classes - 1} ({num_classes} classes)"
        )
