"""Tar shards of the WebDataset layout, read where they lie."""

from __future__ import annotations

import os
from collections.abc import Sequence
from os import PathLike

import numpy as np

from advmoe import rust_router
from advmoe.data.sets import EncodedSet
from advmoe.errors import DataError


def tar_shards(paths: Sequence[str | PathLike[str]], *, class_names: Sequence[str]) -> EncodedSet:
    """Images in uncompressed tar files of the WebDataset layout (`name.jpg` beside `name.cls`), without unpacking them.

    Raises:
        DataError: A file that is missing or cut, an image without label, or a label that is no class.
    """
    shards = [rust_router.tar_samples(path) for path in paths]
    if not shards:
        raise DataError("expected at least one tar shard, got none")
    offsets, lengths, labels = (np.concatenate(column).astype(np.int64) for column in zip(*shards, strict=True))
    return EncodedSet(
        files=tuple(os.fspath(path) for path in paths),
        file_index=np.repeat(np.arange(len(shards)), [len(offsets) for offsets, _, _ in shards]),
        offsets=offsets,
        lengths=lengths,
        labels=labels,
        class_names=tuple(class_names),
    )
