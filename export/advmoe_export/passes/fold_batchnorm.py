"""Fold BatchNorm into the experts before it, and into the linear layers of routers after it.

In evaluation mode BatchNorm computes y = s * x + t per channel, with s = gamma / sqrt(var + eps)
and t = beta - s * mean.

Shape suffixes: D features, N experts, O outputs, S slots of an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from advmoe_export.operators import expert_rows, initializer, is_routed
from advmoe_export.passes.contract import GraphPass, is_flat, is_full_precision, returns
from advmoe_export.passes.editing import constant, insert_one, linear_layer


def batchnorm_is_folded(graph: ir.Graph) -> str | None:
    """Fact: every BatchNorm that can be folded has been folded."""
    for node in graph:
        if node.op_type == "BatchNormalization" and _affine(node) is not None and _target(node) is not None:
            return f"'{node.name}' can still be folded"
    return None


class FoldBatchNorm(GraphPass):
    """Fold each BatchNorm whose statistics are constants.

    A BatchNorm after a routed operator is folded if every row of the bank has the same slot in all
    its experts. Otherwise it remains after the operator, in the branch of the expert.
    """

    needs = (is_flat, is_full_precision)
    leaves = (batchnorm_is_folded, returns("logits"))

    def change(self, graph: ir.Graph) -> None:
        """Fold every BatchNorm that can be folded."""
        for node in list(graph):
            if node.op_type != "BatchNormalization":
                continue
            affine, target = _affine(node), _target(node)
            if affine is None or target is None:
                continue
            if isinstance(target, _Experts):
                _into_experts(graph, target, node, *affine)
            else:
                _into_linear(graph, target, node, *affine)


class _Experts(NamedTuple):
    """The routed operator before a BatchNorm, and the slot of each row of its bank."""

    node: ir.Node
    slot_of_row: np.ndarray


def _target(norm: ir.Node) -> _Experts | ir.Node | None:
    """The target of a BatchNorm: experts before it, a linear layer after it, or None."""
    producer = norm.inputs[0].producer() if norm.inputs[0] is not None else None
    if producer is not None and is_routed(producer) and _sole_use(producer.outputs[0]):
        slots = _slot_of_row(producer, norm)
        return None if slots is None else _Experts(producer, slots)
    if not _sole_use(norm.outputs[0]):
        return None
    linear = next(iter(norm.outputs[0].uses())).node
    return None if linear_layer(linear) is None or linear.inputs[0] is not norm.outputs[0] else linear


def _slot_of_row(routed: ir.Node, norm: ir.Node) -> np.ndarray | None:
    """[bank]: the slot of each row; None if a row has different slots in different experts."""
    weight, scale = initializer(routed.inputs[1], "the weight of a routed operator"), norm.inputs[1]
    assert weight is not None
    assert scale is not None
    assert scale.shape is not None
    rows_NS = np.array(expert_rows(routed))
    slots_NS = np.broadcast_to(np.arange(rows_NS.shape[1]), rows_NS.shape)
    if rows_NS.shape[1] != scale.shape[0] or rows_NS.max() >= len(weight):
        return None
    slot_of_row = np.zeros(len(weight), np.int64)
    slot_of_row[rows_NS] = slots_NS
    return slot_of_row if np.array_equal(slot_of_row[rows_NS], slots_NS) else None


def _affine(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """(s, t) in float64; None if the statistics are not constants."""
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
    """Remove a node. All readers of its output, and the caller of the graph by the same name, get the replacement."""
    if node.outputs[0].is_graph_output():
        replacement.name = node.outputs[0].name
    node.outputs[0].replace_all_uses_with(replacement, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _into_experts(graph: ir.Graph, target: _Experts, norm: ir.Node, scale: np.ndarray, shift: np.ndarray) -> None:
    routed, slot_of_row = target
    weight = initializer(routed.inputs[1], "the weight of a routed operator")
    bias = initializer(routed.inputs[2], "the bias of a routed operator")
    assert weight is not None
    row_scale, row_shift = scale[slot_of_row], shift[slot_of_row]
    folded = weight * row_scale.reshape(-1, *([1] * (weight.ndim - 1)))
    folded_bias = row_shift if bias is None else row_shift + bias * row_scale
    name = str(routed.inputs[1].name)  # type: ignore[union-attr]
    routed.replace_input_with(1, constant(graph, folded.astype(weight.dtype), f"{name}.folded"))
    routed.replace_input_with(2, constant(graph, folded_bias.astype(weight.dtype), f"{name}.bias"))
    _remove(graph, norm, routed.outputs[0])


def _into_linear(graph: ir.Graph, linear: ir.Node, norm: ir.Node, scale: np.ndarray, shift: np.ndarray) -> None:
    layer = linear_layer(linear)
    assert layer is not None
    weight_OD, bias_O = layer
    folded_OD = (weight_OD * scale).astype(weight_OD.dtype)
    folded_O = (bias_O + weight_OD @ shift).astype(weight_OD.dtype)
    name = str(linear.outputs[0].name)
    replacement = insert_one(
        graph,
        linear,
        "Gemm",
        [
            norm.inputs[0],
            constant(graph, folded_OD, f"{name}.weight"),
            constant(graph, folded_O, f"{name}.bias"),
        ],
        {"transB": 1},
        (f"{linear.outputs[0].name}.centered", linear.outputs[0].dtype, linear.outputs[0].shape),
    )
    _remove(graph, linear, replacement)
    graph.remove(norm, safe=True)
