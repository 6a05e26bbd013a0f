"""Replace the ArgMax over two experts by one comparison.

The second expert is chosen if (w_1 - w_0) . x + (b_1 - b_0) > 0. The linear layer gets one output
instead of two. The comparison may differ from the ArgMax if the two logits are equal except for
their last bits.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from advmoe_export.operators import decision_of, is_routed
from advmoe_export.passes.contract import GraphPass, decisions_are_integers, returns_logits_only
from advmoe_export.passes.editing import constant, insert_one, linear_layer


def two_way_decisions_are_compared(graph: ir.Graph) -> str | None:
    """Fact: no decision is the ArgMax of a linear layer with two outputs."""
    for argmax, _ in _two_way(graph):
        return f"'{argmax.name}' decides between two experts by an ArgMax"
    return None


class CompareTwoWay(GraphPass):
    """Replace the ArgMax of each linear layer with two outputs by a comparison.

    The decision becomes Cast(Squeeze(Greater(difference, 0))) of `difference` float [rows, 1].
    """

    # A router margin would be a second use of the router's logits, which are removed here.
    needs = (returns_logits_only,)
    leaves = (two_way_decisions_are_compared, decisions_are_integers)

    def change(self, graph: ir.Graph) -> None:
        """Rewrite every decision between two experts."""
        for argmax, linear in _two_way(graph):
            _compare(graph, argmax, linear)


def _two_way(graph: ir.Graph) -> list[tuple[ir.Node, ir.Node]]:
    """ArgMax and linear layer of each decision that a comparison can replace."""
    found = []
    for decision in dict.fromkeys(decision_of(node) for node in graph if is_routed(node)):
        argmax = None if decision is None else decision.producer()
        if argmax is None or argmax.op_type != "ArgMax":
            continue
        logits = argmax.inputs[0]
        linear = None if logits is None else logits.producer()
        layer = None if linear is None else linear_layer(linear)
        if logits is None or linear is None or layer is None or len(layer[1]) != 2 or len(logits.uses()) != 1:
            continue
        found.append((argmax, linear))
    return found


def _compare(graph: ir.Graph, argmax: ir.Node, linear: ir.Node) -> None:
    logits, layer = linear.outputs[0], linear_layer(linear)
    assert layer is not None
    assert logits.shape is not None
    weight, bias = (array.astype(np.float64) for array in layer)
    dtype, rows, name = logits.dtype, logits.shape[0], str(logits.name)
    column = ir.Shape([rows, 1])
    as_float = layer[0].dtype
    difference = insert_one(
        graph,
        argmax,
        "Gemm",
        [
            linear.inputs[0],
            constant(graph, (weight[1:] - weight[:1]).astype(as_float), f"{name}.difference.weight"),
            constant(graph, (bias[1:] - bias[:1]).astype(as_float), f"{name}.difference.bias"),
        ],
        {"transB": 1},
        (f"{name}.difference", dtype, column),
    )
    zero = constant(graph, np.zeros((), as_float), "zero")
    second = insert_one(graph, argmax, "Greater", [difference, zero], {}, (f"{name}.second", ir.DataType.BOOL, column))
    flat, int64 = ir.Shape([rows]), ir.DataType.INT64
    axis = constant(graph, [1], "axis_1")
    row = insert_one(graph, argmax, "Squeeze", [second, axis], {}, (f"{name}.row", ir.DataType.BOOL, flat))
    chosen = insert_one(graph, argmax, "Cast", [row], {"to": int64.value}, (f"{name}.expert", int64, flat))
    argmax.outputs[0].replace_all_uses_with(chosen)
    graph.remove([argmax, linear], safe=True)


def second_chosen(decision: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Whether the second expert is chosen, bool [rows, 1] and [rows].

    The result is None if the decision is not a comparison.
    """
    row = _source(decision, "Cast")
    column = _source(row, "Squeeze")
    if row is None or column is None or _source(column, "Greater") is None:
        return None
    return column, row


def difference_of_logits(decision: ir.Value | None) -> ir.Value | None:
    """float [rows, 1], second minus first router logit; None if the decision is not a comparison."""
    second = second_chosen(decision)
    return None if second is None else _source(second[0], "Greater")


def _source(value: ir.Value | None, op_type: str) -> ir.Value | None:
    """The first input of the node that computes a value; None if the node is of another kind."""
    producer = None if value is None else value.producer()
    return producer.inputs[0] if producer is not None and producer.op_type == op_type else None
