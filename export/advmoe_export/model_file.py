"""An exported model on disk: the graph `NAME.onnx`, and its weights in `NAME.onnx.data`.

The metadata are read from the graph without the package onnx, so serving needs onnxruntime only.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator
from pathlib import Path

from advmoe_export.errors import ModelFileError
from advmoe_export.metadata import ModelMetadata

GRAPH_FIELD = 7
METADATA_FIELD = 14
"""Field numbers of `ModelProto.graph` and `ModelProto.metadata_props` in onnx.proto."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf."""


def data_file(path: Path) -> Path:
    """The data file of a model file."""
    return path.with_name(path.name + ".data")


def read_metadata(path: Path) -> ModelMetadata:
    """The metadata of a model file.

    Raises:
        ModelFileError: the file is missing, cannot be read, is not ONNX, or was not written by this
            package.
    """
    try:
        if path.is_dir() or path.suffix in {".pt", ".safetensors"}:
            command = f"advmoe export {shlex.quote(str(path))} {shlex.quote(path.resolve().stem)}.onnx"
            raise ModelFileError(f"'{path}' is no exported model; export it first, and give the ONNX file: {command}")
        if not path.is_file():
            raise ModelFileError(f"no model file '{path}'; expected an ONNX file written by advmoe-export")
        properties = read_properties(path.read_bytes())
    except ValueError as error:
        raise ModelFileError(f"'{path}' is not an ONNX file, or it is damaged; export it again") from error
    except OSError as error:
        raise ModelFileError(f"cannot read '{path}': {error.strerror or error}") from error
    return ModelMetadata.from_properties(properties, path)


def check_data_file(path: Path, metadata: ModelMetadata) -> None:
    """Check that the data file of a graph is in the same folder and belongs to the graph.

    Raises:
        ModelFileError: the data file is missing or cannot be read, or size or checksum differ.
    """
    data = data_file(path)
    if metadata.data_bytes == 0:
        return
    if not data.is_file():
        raise ModelFileError(
            f"'{path}' keeps its weights in '{data.name}', which is not in the same folder; copy both files together"
        )
    size = data.stat().st_size
    if size != metadata.data_bytes:
        raise ModelFileError(
            f"'{data}' has {size} bytes, '{path.name}' expects {metadata.data_bytes}; "
            "copy both files of one export together"
        )
    try:
        with data.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(f"cannot read '{data}': {error.strerror or error}") from error
    if digest != metadata.data_sha256:
        raise ModelFileError(
            f"'{data}' is damaged or belongs to another export than '{path.name}'; copy both files together"
        )


def read_properties(content: bytes) -> dict[str, str]:
    """The `metadata_props` of a serialized `ModelProto`.

    Raises:
        ValueError: the bytes are not a `ModelProto` with a graph.
    """
    properties: dict[str, str] = {}
    numbers = set()
    for number, value in _fields(memoryview(content)):
        numbers.add(number)
        if number == METADATA_FIELD and isinstance(value, memoryview):
            entry = {key: bytes(text).decode() for key, text in _fields(value) if isinstance(text, memoryview)}
            properties[entry.get(1, "")] = entry.get(2, "")
    if GRAPH_FIELD not in numbers:
        raise ValueError("no graph")
    return properties


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Field numbers and values of a protobuf message, in the order of the bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire_type == _BYTES:
            size, at = _varint(message, at)
        elif wire_type in (_FIXED64, _FIXED32):
            size = 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if number == 0 or at + size > len(message):
            raise ValueError("truncated")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number with 7 bits per byte, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("truncated")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")
