"""Write one expert of a routed operator as standard operators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from advmoe_export.bank import Bank, Stored
from advmoe_export.operators import LINEAR, ints
from advmoe_export.scope import Scope


def write_expert_op(
    scope: Scope, node: ir.Node, bank: Bank | None, expert: int, x: ir.Value, *, name: str, shape: ir.Shape
) -> ir.Value:
    """Write one expert of a routed operator. Its weights become constants of the scope.

    Args:
        scope: the scope to write into.
        node: the routed node.
        bank: weights of the node; None for `fake_quantize`, which has no weights.
        expert: number of the expert.
        x: the rows of this expert.
        name: name of the result.
        shape: shape of the result.
    """
    if bank is None:
        return _round(scope, node, expert, x, name, shape)
    weight, bias = bank.stored(node, expert)
    return write_plain_op(
        scope,
        node,
        x,
        _restore(scope, weight),
        None if bias is None else _restore(scope, bias),
        name=name,
        shape=shape,
    )


def write_plain_op(
    scope: Scope, node: ir.Node, x: ir.Value, weight: ir.Value, bias: ir.Value | None, *, name: str, shape: ir.Shape
) -> ir.Value:
    """Write a routed operator with given weights: as Conv, or as MatMul and Add.

    The weight of a linear operator is transposed, [D_in, size].
    """
    if node.op_type == LINEAR:
        y = scope.op("MatMul", [x, weight], name=name, dtype=x.dtype, shape=shape)
        return y if bias is None else scope.op("Add", [y, bias], name=f"{name}_bias", dtype=x.dtype, shape=shape)
    assert weight.shape is not None
    padding = ints(node, "padding")
    return scope.op(
        "Conv",
        [x, weight] if bias is None else [x, weight, bias],
        {
            "kernel_shape": [int(d) for d in weight.shape[2:]],  # type: ignore[arg-type]
            "pads": [*padding, *padding],
            "strides": ints(node, "stride"),
        },
        name=name,
        dtype=x.dtype,
        shape=shape,
    )


def _restore(scope: Scope, stored: Stored) -> ir.Value:
    """A stored constant, converted to floats."""
    values = _join(scope, stored.pieces)
    if stored.scale is None or stored.zero is None:
        return values
    return scope.op(
        "DequantizeLinear",
        [values, scope.constant(stored.scale), scope.constant(stored.zero)],
        {"axis": stored.axis},
        name=f"{stored.pieces[0].name}.restored",
        dtype=ir.DataType.FLOAT,
        shape=values.shape,
    )


def _join(scope: Scope, pieces: Sequence[ir.TensorProtocol]) -> ir.Value:
    """The pieces of a constant as one value; onnxruntime joins them when it loads the file."""
    values = [scope.constant(piece) for piece in pieces]
    if len(values) == 1:
        return values[0]
    shape = [sum(piece.shape.numpy()[0] for piece in pieces), *pieces[0].shape.numpy()[1:]]
    return scope.op("Concat", values, {"axis": 0}, name=f"{pieces[0].name}.joined", dtype=pieces[0].dtype, shape=shape)


def _round(scope: Scope, node: ir.Node, expert: int, x: ir.Value, name: str, shape: ir.Shape) -> ir.Value:
    scale = np.float32(node.attributes.get_floats("scales")[expert])
    zero = np.uint8(node.attributes.get_ints("zero_points")[expert])
    levels = [scope.constant(ir.tensor(np.asarray(value), name=f"{name}.level")) for value in (scale, zero)]
    codes = scope.op("QuantizeLinear", [x, *levels], name=f"{name}.codes", dtype=ir.DataType.UINT8, shape=shape)
    return scope.op("DequantizeLinear", [codes, *levels], name=name, dtype=x.dtype, shape=shape)
