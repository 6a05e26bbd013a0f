"""Adding nodes and constants to a traced graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Output = tuple[str, ir.DataType | None, ir.Shape | None]
"""Name, type and shape of a new value."""


def constant(graph: ir.Graph, content: Any, name: str) -> ir.Value:
    """An initializer; lists of integers become int64. A name that is taken must mean the same content."""
    array = content if isinstance(content, np.ndarray | np.generic) else np.array(content, dtype=np.int64)
    if name in graph.initializers:
        known = graph.initializers[name]
        if known.const_value is not None and np.array_equal(known.const_value.numpy(), array):
            return known
        return constant(graph, content, f"{name}.new")
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def insert(
    graph: ir.Graph,
    before: ir.Node | None,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any],
    *outputs: Output,
) -> list[ir.Value]:
    """A new node before another one, or at the end of the graph."""
    values = [
        ir.Value(name=name, type=None if dtype is None else ir.TensorType(dtype), shape=shape)
        for name, dtype, shape in outputs
    ]
    attrs = ir.convenience.convert_attributes(attributes)
    node = ir.Node("", op_type, inputs, attrs, outputs=values, name=f"{op_type}.{values[0].name}")
    if before is None:
        graph.append(node)
    else:
        graph.insert_before(before, node)
    return values


def insert_one(
    graph: ir.Graph,
    before: ir.Node | None,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any],
    output: Output,
) -> ir.Value:
    """A new node with one output."""
    return insert(graph, before, op_type, inputs, attributes, output)[0]
