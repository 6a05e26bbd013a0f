"""The Open Inference Protocol, version 2: requests and responses as JSON, with optional raw tensors after it.

KServe, Triton and their clients use this protocol. Extensions are `binary_tensor_data` (raw
little-endian tensors after the JSON, whose length is in the header Inference-Header-Content-Length)
and `classification` (the k best classes).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from advmoe_export.errors import ExportError, InputError
from advmoe_export.metadata import ModelMetadata

EXTENSIONS = ["binary_tensor_data", "classification"]
HEADER = "inference-header-content-length"
VERSION = "1"
TYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1"), "INT64": np.dtype("<i8")}
LOGITS = "logits"
MAX_JSON = 2**16
"""Most bytes of the JSON of a request without its 'data'. Unread text needs no memory of its own."""

_Levels = Annotated[int, msgspec.Meta(ge=0, le=255)]
_NUMBERS = {
    "FP32": (list[float], list[list[list[list[float]]]]),
    "UINT8": (list[_Levels], list[list[list[list[_Levels]]]]),
}
"""'data' as a flat and as a nested list. With these types the decoder makes nothing but numbers."""
_NESTED = re.compile(rb"\[\s*\[")
_NOTHING = msgspec.Raw(b"null")


class _Parameters(msgspec.Struct):
    binary_data_size: int | None = None
    binary_data: bool | None = None
    binary_data_output: bool | None = None
    classification: int | None = None


_NONE = _Parameters()


class _Input(msgspec.Struct):
    name: str
    shape: tuple[int, int, int, int]
    datatype: str
    data: msgspec.Raw = _NOTHING
    parameters: _Parameters | None = None


class _Output(msgspec.Struct):
    name: str
    parameters: _Parameters | None = None


class _Request(msgspec.Struct):
    inputs: tuple[_Input]
    id: str | None = None
    parameters: _Parameters | None = None
    outputs: msgspec.Raw = _NOTHING


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An output that a request asks for."""

    name: str
    binary: bool
    classes: int
    """Number of best classes to return instead of the tensor; 0 returns the tensor."""


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """A request to run the model."""

    id: str | None
    images: npt.NDArray[Any]
    outputs: tuple[Wanted, ...]


def read_request(body: bytes, json_length: int | None, metadata: ModelMetadata, max_batch: int) -> InferRequest:
    """Read the body of an infer request.

    Args:
        body: JSON, and optional tensors after it.
        json_length: number of bytes of the JSON if tensors follow, else None.
        metadata: metadata of the model, for the shape of its input and the names of its outputs.
        max_batch: highest number of images in the request. More are refused before they are read.

    Raises:
        InputError: the body violates the protocol.
    """
    if json_length is not None and not 0 < json_length <= len(body):
        raise InputError(f"{HEADER} must be in 1 ... {len(body)}, the length of the body, got {json_length}")
    rest = memoryview(body)[json_length:] if json_length is not None else memoryview(b"")
    text = memoryview(body)[:json_length]
    try:
        request = msgspec.json.decode(text, type=_Request)
        tensor = request.inputs[0]
        if len(text) - len(memoryview(tensor.data)) > MAX_JSON:
            raise InputError(f"expected at most {MAX_JSON} bytes of JSON besides 'data'")
        asked = msgspec.json.decode(request.outputs, type=list[_Output] | None)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"expected an infer request of the Open Inference Protocol: {error}") from error
    if tensor.name != "images":
        raise InputError(f"expected one input named 'images', got {tensor.name[:100]}")
    _check_shape(tensor, metadata, max_batch)
    images, used = _read_tensor(tensor, rest)
    if used != len(rest):
        raise InputError(f"expected {used} bytes of tensors after the JSON, got {len(rest)}")
    default = bool((request.parameters or _NONE).binary_data_output)
    wanted = asked or [_Output(name) for name in metadata.outputs]
    names = [entry.name for entry in wanted]
    for entry in wanted:
        if entry.name not in metadata.outputs:
            raise InputError(f"unknown output '{entry.name[:100]}', expected one of: {', '.join(metadata.outputs)}")
        if names.count(entry.name) > 1:
            raise InputError(f"expected each output once, got '{entry.name}' {names.count(entry.name)} times")
        classes = (entry.parameters or _NONE).classification
        if classes is not None and (entry.name != LOGITS or classes < 0):
            raise InputError(f"classification needs the output '{LOGITS}' and a number of classes, got {classes}")
    return InferRequest(
        id=request.id,
        images=images,
        outputs=tuple(_wanted(entry, metadata, default) for entry in wanted),
    )


def _wanted(entry: _Output, metadata: ModelMetadata, binary: bool) -> Wanted:
    """An output that was checked. `binary` is whether it is a raw tensor unless it says otherwise."""
    parameters = entry.parameters or _NONE
    return Wanted(
        name=entry.name,
        binary=binary if parameters.binary_data is None else parameters.binary_data,
        classes=min(parameters.classification or 0, len(metadata.labels)),
    )


def _check_shape(entry: _Input, metadata: ModelMetadata, max_batch: int) -> None:
    """Refuse a type or a shape that the model does not take."""
    height, width = metadata.image_size
    expected = {"FP32": (3, height, width), "UINT8": (height, width, 3)}.get(entry.datatype)
    if expected is None:
        raise InputError(f"expected images of datatype FP32 or UINT8, got '{entry.datatype[:100]}'")
    if entry.shape[1:] != expected or entry.shape[0] < 1:
        raise InputError(
            f"expected at least one image: FP32 [B, 3, {height}, {width}] or UINT8 [B, {height}, {width}, 3], "
            f"got {entry.datatype} {list(entry.shape)}"
        )
    if entry.shape[0] > max_batch:
        raise InputError(f"expected at most {max_batch} images in a request, got {entry.shape[0]}")


def _read_tensor(entry: _Input, rest: memoryview) -> tuple[npt.NDArray[Any], int]:
    """An input tensor of a shape that was checked, and the number of its bytes after the JSON."""
    dtype, data = TYPES[entry.datatype], b"" if entry.data == _NOTHING else bytes(entry.data)
    count, size = math.prod(entry.shape), (entry.parameters or _NONE).binary_data_size
    if size is not None:
        if data or size != count * dtype.itemsize or size > len(rest):
            raise InputError(
                f"expected {count * dtype.itemsize} bytes after the JSON for shape {list(entry.shape)} of "
                f"{entry.datatype} and no 'data', got binary_data_size {size} and {len(rest)} bytes"
            )
        return np.frombuffer(rest[:size], dtype).reshape(entry.shape), size
    # n numbers are separated by n - 1 commas, however nested: the list is counted before it is made
    given = data.count(b",") + 1 if data else 0
    if given != count:
        raise InputError(f"expected 'data' as a list of numbers, {count} for shape {list(entry.shape)}, got {given}")
    nesting = f"expected 'data' as a flat list of numbers, or nested as {list(entry.shape)}"
    try:
        values = msgspec.json.decode(data, type=_NUMBERS[entry.datatype][_NESTED.match(data) is not None])
        with np.errstate(over="ignore"):  # the check of the range refuses infinity
            images = np.array(values, dtype)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"expected 'data' as a flat or nested list of {entry.datatype} numbers: {error}") from error
    except ValueError as error:
        raise InputError(nesting) from error
    if images.ndim > 1 and images.shape != entry.shape:  # other pixels would become neighbors
        raise InputError(f"{nesting}, got {list(images.shape)}")
    return images.reshape(entry.shape), 0


def write_response(
    request: InferRequest, outputs: Mapping[str, npt.NDArray[Any]], *, model: str, labels: tuple[str, ...]
) -> tuple[bytes, int | None]:
    """The body of a response, and the length of its JSON if tensors follow it.

    Raises:
        ExportError: a value for the JSON is NaN or infinite.
    """
    entries: list[dict[str, Any]] = []
    tensors: list[bytes] = []
    for wanted in request.outputs:
        values = outputs[wanted.name]
        if wanted.classes or not wanted.binary:
            check_finite(wanted.name, values)
        if wanted.classes:
            entries.append(_classification(values, wanted, labels))
            continue
        datatype = "INT64" if values.dtype.kind == "i" else "FP32"
        values = np.ascontiguousarray(values, TYPES[datatype])
        entry: dict[str, Any] = {"name": wanted.name, "datatype": datatype, "shape": list(values.shape)}
        if wanted.binary:
            tensors.append(values.tobytes())
            entry["parameters"] = {"binary_data_size": len(tensors[-1])}
        else:
            entry["data"] = values.reshape(-1).tolist()
        entries.append(entry)
    document = {"model_name": model, "model_version": VERSION, "outputs": entries}
    text = json.dumps(document if request.id is None else {"id": request.id, **document}, allow_nan=False).encode()
    return text + b"".join(tensors), len(text) if tensors else None


def check_finite(name: str, values: npt.NDArray[Any]) -> None:
    """Refuse values of an output that JSON cannot express.

    Raises:
        ExportError: a value is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise ExportError(f"the output '{name}' has values that are NaN or infinite, which JSON cannot express")


def _classification(logits: npt.NDArray[Any], wanted: Wanted, labels: tuple[str, ...]) -> dict[str, Any]:
    """The best classes of each image as strings `logit:index:label`, best first."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, : wanted.classes]
    data = [f"{row[i]:.6f}:{i}:{labels[i]}" for row, order in zip(logits, best, strict=True) for i in order]
    return {"name": wanted.name, "datatype": "BYTES", "shape": list(best.shape), "data": data}


def server_metadata(version: str) -> dict[str, Any]:
    """The answer to `GET /v2`."""
    return {"name": "advmoe-export", "version": version, "extensions": EXTENSIONS}


def model_metadata(metadata: ModelMetadata, name: str) -> dict[str, Any]:
    """The answer to `GET /v2/models/NAME`. A batch size of -1 means any."""
    batch = -1 if metadata.batch_size is None else metadata.batch_size
    height, width = metadata.image_size
    nhwc = metadata.input_type == "uint8"
    layers = len(metadata.layers)
    shapes = {
        LOGITS: ("FP32", len(metadata.labels)),
        "expert_index": ("INT64", layers),
        "router_margin": ("FP32", layers),
    }
    return {
        "name": name,
        "versions": [VERSION],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {
                "name": "images",
                "datatype": "UINT8" if nhwc else "FP32",
                "shape": [batch, height, width, 3] if nhwc else [batch, 3, height, width],
            }
        ],
        "outputs": [
            {"name": output, "datatype": shapes[output][0], "shape": [batch, shapes[output][1]]}
            for output in metadata.outputs
        ],
    }
