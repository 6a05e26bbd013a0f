"""Parquet files of encoded images, copied once into a pack that the loader reads at random.

A pack records the name, size and modification time of the files it was copied from. While they
match, the pack is used again; otherwise it is made anew. `rust_router/src/images/pack.rs` describes
its layout.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

import numpy as np

from advmoe import rust_router
from advmoe.data.parquet import HubLayout, Shards, count_rows, read_encoded
from advmoe.data.sets import DatasetInfo, EncodedSet, Progress
from advmoe.errors import DataError


def packed(
    shards: Shards,
    pack: str | PathLike[str],
    hub: HubLayout,
    info: DatasetInfo,
    *,
    progress: Progress | None = None,
) -> EncodedSet:
    """The images of hub-style parquet files. They come from `pack` if it is a copy of these files,
    and are copied into `pack` otherwise.

    Args:
        shards: The parquet files.
        pack: The file to keep their images in; written whole or not at all.
        hub: Names of the columns to read.
        info: The names of the classes, and of the data set for messages.
        progress: Called while the pack is made.

    Raises:
        DataError: A parquet file that is missing or damaged, lacks a column or an image, a label
            that is no class, or a pack that cannot be written.
    """
    pack = Path(pack)
    origin = _origin(shards, hub)
    found = _open(pack, origin, info)
    if found is None:
        _make(pack, shards, hub, info, origin, progress)
        found = _open(pack, origin, info)
        assert found is not None
    return found


def _origin(shards: Shards, hub: HubLayout) -> str:
    try:
        states = [(file.name, (state := file.stat()).st_size, state.st_mtime_ns) for file in shards]
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    return json.dumps({"files": states, "image_column": hub.image_column, "label_column": hub.label_column})


def _open(pack: Path, origin: str, info: DatasetInfo) -> EncodedSet | None:
    """The pack at this path if it is complete and was copied from these files; otherwise None."""
    if not pack.exists():
        return None
    try:
        offsets, lengths, labels, text = rust_router.open_pack(pack)
    except DataError:
        return None
    if text != origin:
        return None
    return EncodedSet(
        files=(str(pack),),
        file_index=np.zeros(len(labels), np.int64),
        offsets=offsets.astype(np.int64),
        lengths=lengths.astype(np.int64),
        labels=labels,
        class_names=info.class_names,
    )


def _make(
    pack: Path, shards: Shards, hub: HubLayout, info: DatasetInfo, origin: str, progress: Progress | None
) -> None:
    total = count_rows(shards, info)
    try:
        pack.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {pack.parent}: {error.strerror}") from error
    writer = rust_router.PackWriter(pack)
    try:
        for done, (_, image, label) in enumerate(read_encoded(shards, hub, info), start=1):
            writer.add(image, label)
            if progress is not None and (done % 1000 == 0 or done == total):
                progress(f"packing {info.name}", done, total)
        writer.finish(origin)
    finally:
        writer.close()
