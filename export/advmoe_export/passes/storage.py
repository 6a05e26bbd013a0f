"""Write the weights of a graph into one data file, each byte once.

Several branches of a graph may have the same weights: both forms in a hybrid file, and experts that
overlap. Tensors that share memory in Python share bytes in the data file. Several tensors may refer
to the same part of the file, or to overlapping parts.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir

from advmoe_export.passes.contract import contradictions, only_standard_operators

ALIGNMENT = 64
"""Alignment of tensors in bytes. onnxruntime maps the data file into memory and uses it directly."""
INLINE = 256
"""Tensors with fewer bytes stay in the graph."""


def write_external(model: ir.Model, path: Path) -> str:
    """Write all large constants of a graph and its branches into one file that the graph refers to.

    Args:
        model: the model. It is changed in place: its tensors become references to the file
            `path.name` in the folder of the graph.
        path: the data file to write.

    Returns:
        The file's SHA-256.
    """
    unfinished = contradictions(model.graph, [only_standard_operators])
    assert not unfinished, unfinished
    values = [
        value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= INLINE
    ]
    tensors = {id(value.const_value): value.const_value for value in values}
    contents = {key: np.ascontiguousarray(tensor.numpy()) for key, tensor in tensors.items()}  # type: ignore[union-attr]
    arrays = [contents[id(value.const_value)] for value in values]
    spans = _memory_spans(list(contents.values()))
    offsets = []
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start, end, members in spans:
            block = bytearray(end - start)
            for array in members:
                at = _address(array) - start
                block[at : at + array.nbytes] = array.tobytes()
            padding = bytes(-file.tell() % ALIGNMENT)
            offsets.append(file.tell() + len(padding))
            for part in (padding, block):
                file.write(part)
                digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    place_of = {
        id(array): (start, at) for (start, _, members), at in zip(spans, offsets, strict=True) for array in members
    }
    for value, array in zip(values, arrays, strict=True):
        tensor = value.const_value
        assert tensor is not None
        start, offset = place_of[id(array)]
        value.const_value = ir.ExternalTensor(
            path.name,
            offset + _address(array) - start,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=str(value.name),
            base_dir=path.parent,
        )
    return digest.hexdigest()


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _memory_spans(arrays: list[np.ndarray]) -> list[tuple[int, int, list[np.ndarray]]]:
    """Intervals of memory [start, end) that the arrays cover, each with its arrays.

    Overlapping arrays are in one interval. Intervals are sorted by their first array and not by
    address, so that the same model always gives the same file.
    """
    spans: list[tuple[int, int, list[np.ndarray]]] = []
    for array in sorted(arrays, key=_address):
        start, end = _address(array), _address(array) + array.nbytes
        if spans and start < spans[-1][1]:
            first, last, members = spans.pop()
            spans.append((first, max(last, end), [*members, array]))
        else:
            spans.append((start, end, [array]))
    first_use = {id(array): position for position, array in enumerate(arrays)}
    return sorted(spans, key=lambda span: min(first_use[id(array)] for array in span[2]))
