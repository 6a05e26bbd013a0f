"""Find row-by-row nodes: nodes whose output row r depends on row r of their inputs only.

A *row* is an entry of the first dimension: an image, or a token if the graph has merged the two
dimensions. Row-by-row nodes may run on any subset of the rows, in any order, and inside the branch
of one expert. All other nodes need all rows in the original order. A few of these, such as the
comparison that makes a decision, still compute each row for itself.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from advmoe_export.operators import is_routed


def named(text: str) -> frozenset[str]:
    """The set of operator names in a text."""
    return frozenset(text.split())


ELEMENTWISE = named(
    """
    Abs Add BatchNormalization Cast Celu Clip DequantizeLinear Div Elu Erf Exp Gelu HardSigmoid HardSwish Identity
    LeakyRelu Max Min Mish Mul Neg Pow QuantizeLinear Reciprocal Relu Selu Sigmoid Softplus Sqrt Sub Swish Tanh
    Where
    """
)
PER_IMAGE = named(
    """
    AveragePool Conv GlobalAveragePool GlobalMaxPool GroupNormalization InstanceNormalization MaxPool
    """
)
ALONG_AXIS = {
    **{"Softmax": -1, "LogSoftmax": -1, "LayerNormalization": -1},
    **{"ArgMax": 0, "Concat": 0, "GatherElements": 0, "Split": 0},
}
REDUCTIONS = named(
    """
    ReduceMax ReduceMean ReduceMin ReduceSum
    """
)


def row_dim(value: ir.Value | None) -> str | None:
    """The symbol of the first dimension, such as `batch`; None for values without rows."""
    if value is None or value.const_value is not None or value.shape is None or len(value.shape) == 0:
        return None
    dim = value.shape[0]
    return None if isinstance(dim, int) else str(dim)


COMPARISONS = named(
    """
    And Equal Greater GreaterOrEqual Less LessOrEqual Not Or
    """
)
IN_ORDER = COMPARISONS | {"GatherElements"}
"""Operators of decisions and their scores. They keep the original order, in which the graph returns decisions."""


def is_rowwise(node: ir.Node) -> bool:
    """Whether the node may compute any rows in any order."""
    return node.op_type not in IN_ORDER and keeps_rows_apart(node)


def keeps_rows_apart(node: ir.Node) -> bool:
    """Whether every output row depends only on the same row of the inputs and on constants."""
    symbols = {row_dim(output) for output in node.outputs}
    if len(symbols) != 1 or None in symbols:
        return False
    (symbol,) = symbols
    running = [value for value in node.inputs if value is not None and value.const_value is None]
    if not running or any(row_dim(value) != symbol for value in running):
        return False
    if is_routed(node):
        return True
    if any(value.shape is None for value in (*running, *node.outputs)):
        return False
    rank = len(node.outputs[0].shape)  # type: ignore[arg-type]
    op = node.op_type
    if op in ELEMENTWISE or op in COMPARISONS:
        return all(value is None or value.shape is None or len(value.shape) <= rank for value in node.inputs) and all(
            len(value.shape) == rank  # type: ignore[arg-type]
            for value in running
        )
    if op in PER_IMAGE:
        return len(running) == 1
    if op in ALONG_AXIS:
        axis = node.attributes.get_int("axis", ALONG_AXIS[op])
        return bool(axis % len(running[0].shape) != 0)  # type: ignore[arg-type]
    if op in REDUCTIONS:
        return _reduces_within_rows(node)
    if op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        inner = _inner(node.inputs[0])
        return inner is not None and inner == _inner(node.outputs[0])
    if op == "Transpose":
        return bool(node.attributes.get_ints("perm", [1])[0] == 0)
    if op == "Gemm":
        return running == [node.inputs[0]] and node.attributes.get_int("transA", 0) == 0
    if op == "MatMul":
        ranks = [len(value.shape) for value in running]  # type: ignore[arg-type]
        return running == [node.inputs[0]] or all(r == rank >= 3 for r in ranks)
    return False


def _inner(value: ir.Value | None) -> int | None:
    """Number of elements of one row; None if it is unknown."""
    assert value is not None
    assert value.shape is not None
    inner = [dim for dim in value.shape[1:] if isinstance(dim, int)]
    return math.prod(inner) if len(inner) == len(value.shape) - 1 else None


def _reduces_within_rows(node: ir.Node) -> bool:
    source = node.inputs[0]
    assert source is not None
    assert source.shape is not None
    if len(node.inputs) < 2 or node.inputs[1] is None or node.inputs[1].const_value is None:
        return False
    axes = node.inputs[1].const_value.numpy().reshape(-1)
    return len(axes) > 0 and all(int(axis) % len(source.shape) != 0 for axis in axes)
