"""The hub's parquet files, with one struct column ``{bytes, path}`` of encoded images and one column of labels."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from advmoe.data.decode import decode_all
from advmoe.data.sets import DatasetInfo, ImageSet, Progress, check_labels
from advmoe.errors import DataError

Shards = tuple[Path, ...]

ROWS_AT_ONCE = 1000

UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""Exceptions of pyarrow for a damaged file. Names of columns may be invalid UTF-8."""


@dataclass(frozen=True, kw_only=True)
class HubLayout:
    """Layout of a data set in its repository on the hub."""

    repository: str
    """``owner/name``."""
    folder: str
    """Folder of the parquet files in the repository."""
    train: str
    """Name of the split to train on."""
    test: str
    """Name of the split to report on."""
    image_column: str
    label_column: str


def find_splits(root: Path, hub: HubLayout, incomplete: list[str]) -> tuple[Shards, Shards] | None:
    """The shards of the training and test split in the repository (or folder of parquet files) at ``root``.

    ``None`` if there are no shards. If only one split exists, a line about it is added to
    ``incomplete``.

    Raises:
        DataError: Some shards of a series are missing.
    """
    for folder in (root / hub.folder, root):
        train, test = _find_shards(folder, hub.train), _find_shards(folder, hub.test)
        if train and test:
            return train, test
        if train or test:
            incomplete.append(f"{folder} has parquet files of the {hub.train if train else hub.test} split only")
    return None


def _find_shards(folder: Path, split: str) -> Shards:
    """The files ``train-00000-of-00002.parquet``, possibly with a hash behind, and so on, in order."""
    numbers: dict[int, Path] = {}
    expected = 0
    for path in sorted(folder.glob(f"{split}-*.parquet")):
        if match := re.fullmatch(rf"{re.escape(split)}-(\d+)-of-(\d+)(-\w+)?\.parquet", path.name):
            numbers[int(match[1])] = path
            expected = max(expected, int(match[2]))
    missing = expected - sum(number < expected for number in numbers)
    if missing:
        first = next(number for number in itertools.count() if number not in numbers)
        raise DataError(
            f"{folder} lacks shard {first:05d} of {expected} of the {split} split"
            f" ({missing} missing); download the missing parquet files"
        )
    return tuple(numbers[number] for number in sorted(numbers))


def read_image_set(shards: Shards, hub: HubLayout, info: DatasetInfo, *, progress: Progress | None = None) -> ImageSet:
    """Decode every image of ``shards`` into memory; each must have ``info.image_size`` pixels on both sides.

    Raises:
        DataError: As in `read_encoded`, or an image cannot be decoded or has another size.
    """
    labels = np.empty(count_rows(shards, info), np.int64)

    def encoded() -> Iterator[tuple[str, bytes]]:
        for row, (name, content, label) in enumerate(read_encoded(shards, hub, info)):
            labels[row] = label
            yield name, content

    images = decode_all(encoded(), len(labels), info, progress=progress)
    return ImageSet(images=images, labels=labels, class_names=info.class_names)


def count_rows(shards: Shards, info: DatasetInfo) -> int:
    """Number of images in ``shards``, as their metadata say.

    Raises:
        DataError: A file is truncated, is not parquet, has no images, or claims more images than
            the data set has. (A few bytes can claim more images than fit in memory.)
    """
    counts = [_open(path).metadata.num_rows for path in shards]
    if 0 in counts:
        raise DataError(f"{shards[counts.index(0)]} holds no images")
    most = max(info.train_size or 0, info.test_size or 0)
    if most and sum(counts) > most:
        raise DataError(f"{shards[0]} and its series claim {sum(counts):,} images; {info.name} has {most:,} at most")
    return sum(counts)


def read_encoded(shards: Shards, hub: HubLayout, info: DatasetInfo) -> Iterator[tuple[str, bytes, int]]:
    """Yields ``(name for messages, encoded image, label)`` for each row. Some thousand rows are in memory at a time.

    Raises:
        DataError: A file is truncated or not parquet, a column, label or image is missing, or a
            label is out of range. The message names the file and, where possible, the row.
    """
    for path in shards:
        row = 0
        expected = _open(path).metadata.num_rows
        for batch in _batches(path, hub, info):
            labels = batch[hub.label_column]
            if labels.null_count:
                raise DataError(
                    f"{path}: {labels.null_count} labels are missing among rows {row}..{row + len(batch) - 1}"
                )
            check_labels(labels.to_numpy(), info.num_classes, where=f"{path}, from row {row} on")
            images = batch[hub.image_column].field("bytes")
            for content, label in zip(images, labels.to_pylist(), strict=True):
                encoded = content.as_py()
                if row == expected:
                    raise DataError(
                        f"{path} is damaged: it holds more than the {expected:,} images it claims; download it again"
                    )
                if not encoded:
                    raise DataError(f"{path}, row {row}: the image is missing")
                yield f"{path}, row {row}", encoded, label
                row += 1
        if row != expected:
            raise DataError(f"{path} is damaged: it holds {row:,} images and claims {expected:,}; download it again")


def class_names(path: Path, hub: HubLayout) -> tuple[str, ...]:
    """The names of the labels in the metadata of the hub's files; empty if they are not there."""
    try:
        metadata = _open(path).schema_arrow.metadata or {}
        names = json.loads(metadata[b"huggingface"])["info"]["features"][hub.label_column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = str(error).strip().split("\n")[0]
    return DataError(f"{path} is truncated or not a parquet file; download it again ({reason})")


def _holds_bytes(image_type: pa.DataType) -> bool:
    if not pa.types.is_struct(image_type) or image_type.get_field_index("bytes") < 0:
        return False
    kind = image_type.field("bytes").type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind))


def _batches(path: Path, hub: HubLayout, info: DatasetInfo) -> Iterator[pa.RecordBatch]:
    file = _open(path)
    try:
        schema = file.schema_arrow
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    for name in (hub.image_column, hub.label_column):
        if name not in schema.names:
            raise DataError(
                f"{path} has no column {name!r}: it has {', '.join(schema.names)}; is this really {info.name}?"
            )
    image_type, label_type = schema.field(hub.image_column).type, schema.field(hub.label_column).type
    if not _holds_bytes(image_type):
        raise DataError(f"{path}: column {hub.image_column!r} holds {image_type}, not images as struct<bytes, path>")
    if not pa.types.is_integer(label_type):
        raise DataError(f"{path}: column {hub.label_column!r} holds {label_type}, not integers")
    try:
        yield from file.iter_batches(ROWS_AT_ONCE, columns=[hub.image_column, hub.label_column])
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
