"""Add nodes and constants to a traced graph.

Shape suffixes: D features, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Output = tuple[str, ir.DataType | None, ir.Shape | None]
"""Name, type and shape of a new value."""


def constant(graph: ir.Graph, content: Any, name: str) -> ir.Value:
    """Add an initializer. Lists of integers become int64.

    If the name exists with the same content, that initializer is returned. If it exists with other
    content, the new name gets a suffix.
    """
    array = content if isinstance(content, np.ndarray | np.generic) else np.array(content, dtype=np.int64)
    if name in graph.initializers:
        known = graph.initializers[name]
        if known.const_value is not None and np.array_equal(known.const_value.numpy(), array):
            return known
        return constant(graph, content, f"{name}.new")
    tensor = ir.tensor(np.asarray(array, order="C"), name=name)
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
    """Insert a node before another node, or at the end of the graph. Returns its outputs."""
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
    """Insert a node with one output. Returns the output."""
    return insert(graph, before, op_type, inputs, attributes, output)[0]


def linear_layer(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Weight [O, D] and bias [O] of a node that computes x @ W.T + b; None for other nodes."""
    x = node.inputs[0] if node.inputs else None
    if x is None or x.shape is None or len(x.shape) != 2 or x.const_value is not None:
        return None
    parameters = [None if value is None else value.const_value for value in node.inputs[1:]]
    if node.op_type not in ("Gemm", "MatMul") or not parameters or None in parameters:
        return None
    weight, *biases = (tensor.numpy() for tensor in parameters if tensor is not None)
    attributes = node.attributes
    plain = attributes.get_int("transA", 0) == 0 and all(attributes.get_float(k, 1.0) == 1.0 for k in ("alpha", "beta"))
    if not plain or weight.ndim != 2 or any(bias.ndim != 1 for bias in biases):
        return None
    weight_OD = weight if attributes.get_int("transB", 0) else weight.T
    return weight_OD, biases[0] if biases else np.zeros(len(weight_OD), weight.dtype)
