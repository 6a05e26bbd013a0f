"""Parquet files of encoded images, copied once into a pack that the loader reads at random.

A pack records the name, size and modification time of the files it was copied from. While they
match, the pack is used again; otherwise it is made anew. `rust_router/src/images/pack.rs` describes
its layout.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from advmoe import rust_router
from advmoe.data.parquet import HubLayout, Shards, count_rows, read_encoded
from advmoe.data.sets import DatasetInfo, EncodedSet, Progress
from advmoe.errors import DataError
from advmoe.files import remove_leftovers

REMEDY = "make it readable, or remove it to have it made again"
SYSTEM_ERROR = "(os error "
"""What Rust writes behind an error of the system, and not behind a difference in the content."""


def packed(
    shards: Shards,
    pack: str | PathLike[str],
    hub: HubLayout,
    info: DatasetInfo,
    *,
    progress: Progress | None = None,
) -> EncodedSet:
    """The images of hub-style parquet files. They come from `pack` if it is a copy of these files,
    and are copied into `pack` otherwise. One process at a time makes a pack; others wait for it.

    Args:
        shards: The parquet files.
        pack: The file to keep their images in; written whole or not at all.
        hub: Names of the columns to read.
        info: The names of the classes, and of the data set for messages.
        progress: Called while the pack is made.

    Raises:
        DataError: A parquet file that is missing or damaged, lacks a column or an image, a label
            that is no class, or a pack that cannot be read or written.
    """
    pack = Path(pack)
    origin = _origin(shards, hub)
    found = _open(pack, origin, info)
    if found is not None:
        return found
    total = count_rows(shards, info)
    with _locked(pack):
        found = _open(pack, origin, info)  # another process may have made it meanwhile
        if found is None:
            with suppress(OSError):  # those of another user may stay
                remove_leftovers(pack.parent, [pack.name])
            _make(pack, total, read_encoded(shards, hub, info), origin, f"packing {info.name}", progress)
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
    """The pack at this path if it is complete and was copied from these files; otherwise None.

    Raises:
        DataError: The system cannot read the pack. A new copy would take long, and might be as
            unreadable.
    """
    try:
        with pack.open("rb") as file:
            file.read(1)
        offsets, lengths, labels, text = rust_router.open_pack(pack)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"cannot read {pack}: {error.strerror}; {REMEDY}") from error
    except DataError as error:
        if SYSTEM_ERROR in str(error):
            raise DataError(f"{error}; {REMEDY}") from error
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


@contextmanager
def _locked(pack: Path) -> Iterator[None]:
    """Be the only process that writes this pack, after waiting for others."""
    path = pack.with_name(f"{pack.name}.lock")
    lock = FileLock(path)
    try:
        pack.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            warnings.warn(f"another process is making {pack}; this one waits for it", stacklevel=4)
            lock.acquire()
    except OSError as error:
        raise DataError(f"cannot write to the folder {pack.parent}: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.release()


def _make(
    pack: Path,
    total: int,
    images: Iterator[tuple[str, bytes, int]],
    origin: str,
    title: str,
    progress: Progress | None,
) -> None:
    writer = rust_router.PackWriter(pack)
    try:
        for done, (_, image, label) in enumerate(images, start=1):
            writer.add(image, label)
            if progress is not None and (done % 1000 == 0 or done == total):
                progress(title, done, total)
        writer.finish(origin)
    finally:
        writer.close()
