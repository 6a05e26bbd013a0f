"""Parquet files of encoded images, copied once into a pack that the loader reads at random.

A pack remembers the name, size and time of change of the files it came from: opened again, it is used if they are the
same and made anew if not. Its layout is described in `rust_router/src/pack.rs`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from advmoe import rust_router
from advmoe.data.encoded import EncodedImages
from advmoe.errors import DataError

ROWS_AT_ONCE = 256
"""Rows of a parquet file in memory at a time."""

Progress = Callable[[int, int], None]
"""Called with images packed and images in all."""


def packed(
    parquet_files: Sequence[str | PathLike[str]],
    pack: str | PathLike[str],
    *,
    class_names: Sequence[str],
    image_column: str = "image",
    label_column: str = "label",
    progress: Progress | None = None,
) -> EncodedImages:
    """The images of hub-style parquet files, from `pack` if it was made of these files as they are now.

    Args:
        parquet_files: Files with a struct column `{bytes, path}` of JPEG or PNG and a column of integer labels.
        pack: The file to keep them in; written whole or not at all.
        class_names: Names of the classes, in the order of their labels.
        image_column: Name of the column of images.
        label_column: Name of the column of labels.
        progress: Told while the pack is made.

    Raises:
        DataError: A parquet file that is missing or damaged, lacks a column or an image, a label that is no class, or
            a pack that cannot be written.
    """
    files = [Path(file) for file in parquet_files]
    origin = _origin(files, image_column, label_column)
    found = _open(Path(pack), origin)
    if found is None:
        _make(Path(pack), files, (image_column, label_column), len(class_names), origin, progress)
        found = rust_router.open_pack(pack)
    source, labels, _ = found
    return EncodedImages(source=source, labels=labels, class_names=tuple(class_names))


def _origin(files: Sequence[Path], image_column: str, label_column: str) -> str:
    try:
        states = [(file.name, (state := file.stat()).st_size, state.st_mtime_ns) for file in files]
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    return json.dumps({"files": states, "image_column": image_column, "label_column": label_column})


def _open(pack: Path, origin: str) -> tuple[rust_router.EncodedSource, NDArray[np.int64], str] | None:
    """A pack of that origin; None if there is none, or a damaged or different one."""
    if not pack.exists():
        return None
    try:
        found = rust_router.open_pack(pack)
    except DataError:
        return None
    return found if found[2] == origin else None


def _make(
    pack: Path,
    files: Sequence[Path],
    columns: tuple[str, str],
    num_classes: int,
    origin: str,
    progress: Progress | None,
) -> None:
    tables = [_parquet(file, columns) for file in files]
    total = sum(table.metadata.num_rows for table in tables)
    writer = rust_router.PackWriter(pack)
    done = 0
    try:
        for file, table in zip(files, tables, strict=True):
            for row, (image, label) in enumerate(_rows(file, table, columns)):
                if not image:
                    raise DataError(f"{file} has no image in row {row}; download it again")
                if label is None or not 0 <= label < num_classes:
                    raise DataError(f"{file} has label {label} in row {row}; expected 0 to {num_classes - 1}")
                writer.add(image, label)
                done += 1
                if progress is not None and (done % 1000 == 0 or done == total):
                    progress(done, total)
        writer.finish(origin)
    finally:
        writer.close()


def _parquet(file: Path, columns: tuple[str, str]) -> pq.ParquetFile:
    try:
        table = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} is not a parquet file, or is cut: {_first_line(error)}") from error
    missing = [name for name in columns if name not in table.schema_arrow.names]
    if missing:
        raise DataError(f"{file} has no column {missing[0]!r}; it has {', '.join(table.schema_arrow.names)}")
    return table


def _rows(file: Path, table: pq.ParquetFile, columns: tuple[str, str]) -> Iterator[tuple[bytes | None, int | None]]:
    image_column, label_column = columns
    try:
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=[image_column, label_column]):
            images = batch.column(image_column).field("bytes")
            labels = batch.column(label_column)
            yield from zip(images.to_pylist(), labels.to_pylist(), strict=True)
    except (OSError, KeyError, AttributeError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read as images and labels: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
