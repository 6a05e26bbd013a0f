"""Fold BatchNorm into the experts it follows, and into the router's linear layer it precedes.

In evaluation mode BatchNorm is y = s * x + t per channel, s = gamma / sqrt(var + eps), t = beta - s * mean.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from advmoe_export import operators
from advmoe_export.operators import initializer, is_routed
from advmoe_export.passes.editing import constant, insert_one, linear_layer


def fold_batchnorm(graph: ir.Graph) -> None:
    """Change the traced graph in place.

    A BatchNorm over the packed slots of a routed operator is folded where every bank row has one slot, whichever
    expert computes it. Else it stays behind the operator, in the expert's branch.
    """
    for node in list(graph):
        if node.op_type != "BatchNormalization":
            continue
        affine = _affine(node)
        if affine is None:
            continue
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        if producer is not None and is_routed(producer) and _sole_use(producer.outputs[0]):
            _into_experts(graph, producer, node, *affine)
        else:
            _into_linear(graph, node, *affine)


def _affine(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """(s, t) in float64, or None where the statistics are not constants."""
    if any(value is None or value.const_value is None for value in node.inputs[1:5]):
        return None
    gamma, beta, mean, var = (
        value.const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
        for value in node.inputs[1:5]
    )
    scale = gamma / np.sqrt(var + node.attributes.get_float("epsilon", 1e-5))
    return scale, beta - scale * mean


def _sole_use(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _remove(graph: ir.Graph, node: ir.Node, replacement: ir.Value) -> None:
    node.outputs[0].replace_all_uses_with(replacement, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _into_experts(graph: ir.Graph, routed: ir.Node, norm: ir.Node, scale: np.ndarray, shift: np.ndarray) -> None:
    weight = initializer(routed.inputs[1], "the weight of a routed operator")
    bias = initializer(routed.inputs[2], "the bias of a routed operator")
    assert weight is not None
    rows_NS = np.array(operators.expert_rows(routed))
    slots_NS = np.broadcast_to(np.arange(rows_NS.shape[1]), rows_NS.shape)
    if rows_NS.shape[1] != len(scale) or rows_NS.max() >= len(weight):
        return
    slot_of_row = np.zeros(len(weight), np.int64)
    slot_of_row[rows_NS] = slots_NS
    if not np.array_equal(slot_of_row[rows_NS], slots_NS):
        return
    row_scale, row_shift = scale[slot_of_row], shift[slot_of_row]
    folded = weight * row_scale.reshape(-1, *([1] * (weight.ndim - 1)))
    folded_bias = row_shift if bias is None else row_shift + bias * row_scale
    name = str(routed.inputs[1].name)  # type: ignore[union-attr]
    routed.replace_input_with(1, constant(graph, folded.astype(weight.dtype), f"{name}.folded"))
    routed.replace_input_with(2, constant(graph, folded_bias.astype(weight.dtype), f"{name}.bias"))
    _remove(graph, norm, routed.outputs[0])


def _into_linear(graph: ir.Graph, norm: ir.Node, scale: np.ndarray, shift: np.ndarray) -> None:
    if not _sole_use(norm.outputs[0]):
        return
    linear = next(iter(norm.outputs[0].uses())).node
    layer = linear_layer(linear)
    if layer is None or linear.inputs[0] is not norm.outputs[0]:
        return
    weight_OI, bias_O = layer
    folded_OI = (weight_OI * scale).astype(weight_OI.dtype)
    folded_O = (bias_O + weight_OI @ shift).astype(weight_OI.dtype)
    name = str(linear.outputs[0].name)
    replacement = insert_one(
        graph,
        linear,
        "Gemm",
        [
            norm.inputs[0],
            constant(graph, folded_OI, f"{name}.weight"),
            constant(graph, folded_O, f"{name}.bias"),
        ],
        {"transB": 1},
        (f"{linear.outputs[0].name}.centred", linear.outputs[0].dtype, linear.outputs[0].shape),
    )
    _remove(graph, linear, replacement)
    graph.remove(norm, safe=True)
