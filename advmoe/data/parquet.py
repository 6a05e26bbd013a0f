"""Images in the hub's parquet files: one struct column ``{bytes, path}`` of encoded images, one column of labels."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torchvision.io import ImageReadMode, decode_image

from advmoe.data.sets import DatasetInfo, ImageSet, Progress, check_labels
from advmoe.errors import DataError

ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Columns:
    """The columns of a hub data set that are read."""

    image: str
    label: str


def find_shards(folder: Path, split: str) -> tuple[Path, ...]:
    """The parquet files of ``split`` in ``folder``, in order: ``train-00000-of-00002.parquet`` and so on.

    Empty when there are none. Raises `DataError` when some shards of the series are missing.
    """
    numbers: dict[int, Path] = {}
    expected = 0
    for path in sorted(folder.glob(f"{split}-*.parquet")):
        if match := re.fullmatch(rf"{re.escape(split)}-(\d+)-of-(\d+)(-\w+)?\.parquet", path.name):
            numbers[int(match[1])] = path
            expected = max(expected, int(match[2]))
    missing = [number for number in range(expected) if number not in numbers]
    if missing:
        raise DataError(
            f"{folder} lacks shard {missing[0]:05d} of {expected} of the {split} split"
            f" ({len(missing)} missing); download the missing parquet files"
        )
    return tuple(numbers[number] for number in sorted(numbers))


def read_image_set(
    shards: Sequence[Path], columns: Columns, info: DatasetInfo, *, progress: Progress | None = None
) -> ImageSet:
    """Decode every image of ``shards`` into memory; each must have ``info.image_size`` pixels on both sides.

    Raises `DataError` for a file that is truncated or not parquet, a missing column, a label out of range, and an
    image that cannot be decoded or has another size, naming the file and the row.
    """
    tables = [_read_table(path, columns, info) for path in shards]
    total = sum(table.num_rows for table in tables)
    if not total:
        raise DataError(f"{shards[0]} holds no images")
    images = np.empty((total, info.image_size, info.image_size, 3), np.uint8)
    row = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)  # once per image, from torchvision
        for path, table in zip(shards, tables, strict=True):
            for row_in_file, encoded in enumerate(table[columns.image].combine_chunks().field("bytes")):
                images[row] = _decode(encoded.as_py(), info.image_size, where=f"{path}, row {row_in_file}")
                row += 1
                if progress is not None and (row % ROWS_AT_ONCE == 0 or row == total):
                    progress(f"decoding {info.name}", row, total)
    labels = np.concatenate([table[columns.label].to_numpy().astype(np.int64) for table in tables])
    return ImageSet(images=images, labels=labels, class_names=info.class_names)


def _read_table(path: Path, columns: Columns, info: DatasetInfo) -> pa.Table:
    try:
        file = pq.ParquetFile(path)
        found = file.schema_arrow
        for name in (columns.image, columns.label):
            if name not in found.names:
                raise DataError(
                    f"{path} has no column {name!r}: it has {', '.join(found.names)}; is this really {info.name}?"
                )
        image_type = found.field(columns.image).type
        if not pa.types.is_struct(image_type) or image_type.get_field_index("bytes") < 0:
            raise DataError(f"{path}: column {columns.image!r} holds {image_type}, not images as struct<bytes, path>")
        if not pa.types.is_integer(found.field(columns.label).type):
            raise DataError(f"{path}: column {columns.label!r} holds {found.field(columns.label).type}, not integers")
        table = file.read([columns.image, columns.label])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is truncated or not a parquet file; download it again ({_reason(error)})") from error
    if table[columns.label].null_count:
        raise DataError(f"{path}: {table[columns.label].null_count} labels are missing")
    check_labels(table[columns.label].to_numpy(), info.num_classes, where=str(path))
    return table


def _decode(encoded: bytes | None, size: int, *, where: str) -> NDArray[np.uint8]:
    if not encoded:
        raise DataError(f"{where}: the image is missing")
    try:
        pixels_CHW = decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError as error:
        raise DataError(f"{where}: the image cannot be decoded ({_reason(error)})") from error
    if pixels_CHW.dtype != torch.uint8 or tuple(pixels_CHW.shape) != (3, size, size):
        raise DataError(
            f"{where}: the image decodes to {pixels_CHW.dtype} {list(pixels_CHW.shape)},"
            f" expected uint8 {[3, size, size]}"
        )
    pixels_HWC: NDArray[np.uint8] = pixels_CHW.permute(1, 2, 0).numpy()
    return pixels_HWC


def _reason(error: BaseException) -> str:
    """The last part of the first line: torchvision puts the place in its C++ source before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\w+, \S+:\d+, ", "", lines[0])
