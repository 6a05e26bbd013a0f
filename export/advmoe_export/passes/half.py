"""Convert weights and activations to float16. Routers stay in float32.

If the logits of a router are nearly equal, rounding changes the decision and thus the pathway. The
nodes of routers therefore stay in float32. Their inputs are converted to float32, and what other
nodes read of their results is converted to float16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from advmoe_export.errors import UnsupportedModelError
from advmoe_export.operators import decision_of
from advmoe_export.passes.contract import GraphPass, is_full_precision, outputs_keep_their_types
from advmoe_export.passes.editing import constant, insert_one
from advmoe_export.passes.fold_batchnorm import batchnorm_is_folded

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LARGEST_HALF = float(np.finfo(np.float16).max)
FLOAT_ONLY = frozenset({"Resize", "Upsample"})
"""Operators whose constant float inputs must stay in float32."""


def routers_are_float32(graph: ir.Graph) -> str | None:
    """Fact: routers compute in float32."""
    for node in router_nodes(graph):
        if node.op_type != "Cast" and any(v is not None and v.dtype == HALF for v in (*node.inputs, *node.outputs)):
            return f"router node '{node.name}' computes in float16"
    return None


class UseHalfPrecision(GraphPass):
    """Compute in float16, except in routers. Images and outputs keep their types."""

    needs = (batchnorm_is_folded, is_full_precision)  # folding after rounding would round weights twice
    leaves = (outputs_keep_their_types, routers_are_float32)

    def change(self, graph: ir.Graph) -> None:
        """Convert weights and activations to float16.

        Raises:
            UnsupportedModelError: a weight is beyond the range of float16.
        """
        _narrow(graph)


def router_nodes(graph: ir.Graph) -> set[ir.Node]:
    """The nodes of routers.

    A node belongs to a router if its results reach the logits only through decisions and through
    the scores that decisions compare, or not at all. The scores may have other uses, because a
    router can also scale the output of its layer. A node that computes with results of routers
    only, such as the softmax of such a scale, belongs to a router, too.
    """
    found: set[ir.Node] = set()
    logits = graph.outputs[0]
    scores = {_score(decision_of(node)) for node in graph}
    for node in reversed(list(graph)):
        uses = [use for output in node.outputs for use in output.uses()]
        if logits not in node.outputs and (
            not scores.isdisjoint(node.outputs)
            or all(use.node in found or decision_of(use.node) is use.node.inputs[use.idx] for use in uses)
        ):
            found.add(node)
    for node in graph:
        computed = [value for value in node.inputs if value is not None and value.const_value is None]
        if computed and logits not in node.outputs and all(value.producer() in found for value in computed):
            found.add(node)
    return found


def _as_half(array: npt.NDArray[Any], name: str) -> npt.NDArray[np.float16]:
    """A constant in float16. The limits of float32, which mean no limit, become infinite."""
    largest = float(np.abs(array, where=np.isfinite(array), out=np.zeros_like(array)).max(initial=0.0))
    if LARGEST_HALF < largest < np.finfo(np.float32).max:
        raise UnsupportedModelError(
            f"float16 ends at {LARGEST_HALF:g}, but '{name}' has a value of size {largest:.4g}; export with fp32"
        )
    with np.errstate(over="ignore"):
        return array.astype(np.float16)


def _score(decision: ir.Value | None) -> ir.Value | None:
    """The numbers that a decision compares: the first float value before it."""
    value = decision
    while value is not None and value.dtype not in (FLOAT, HALF):
        producer = value.producer()
        value = None if producer is None or not producer.inputs else producer.inputs[0]
    return value


def _narrow(graph: ir.Graph) -> None:
    routers = router_nodes(graph)
    halves: dict[ir.Value, ir.Value] = {}
    widened: dict[ir.Value, ir.Value] = {}
    rounded: dict[ir.Value, ir.Value] = {}
    for images in graph.inputs:
        if images.dtype == FLOAT:
            half = (f"{images.name}.half", HALF, images.shape)
            halves[images] = insert_one(graph, graph[0], "Cast", [images], {"to": HALF.value}, half)
    casts = {value.producer() for value in halves.values()}
    narrowed: set[ir.Value] = set(halves.values())
    for node in list(graph):
        if node in casts:
            continue
        if node in routers:
            for position, value in enumerate(node.inputs):
                if value is not None and value in narrowed:
                    if value not in widened:
                        wide = (f"{value.name}.wide", FLOAT, value.shape)
                        widened[value] = insert_one(graph, node, "Cast", [value], {"to": FLOAT.value}, wide)
                    node.replace_input_with(position, widened[value])
            continue
        for position, value in enumerate(node.inputs):
            if value is None or value.dtype != FLOAT:
                continue
            if value in halves:
                node.replace_input_with(position, halves[value])
            elif value.producer() in routers:
                if value not in rounded:
                    half = (f"{value.name}.half", HALF, value.shape)
                    rounded[value] = insert_one(graph, node, "Cast", [value], {"to": HALF.value}, half)
                node.replace_input_with(position, rounded[value])
            elif value.const_value is not None and node.op_type not in FLOAT_ONLY:
                array = _as_half(value.const_value.numpy(), str(value.name))
                node.replace_input_with(position, constant(graph, array, f"{value.name}.half"))
        if node.op_type == "Cast" and node.attributes.get_int("to") == FLOAT.value:
            node.attributes["to"] = ir.AttrInt64("to", HALF.value)
        for output in node.outputs:
            if output.dtype == FLOAT:
                output.type = ir.TensorType(HALF)
                narrowed.add(output)
    for position, result in enumerate(graph.outputs):
        if result in narrowed:
            wide = (str(result.name), FLOAT, result.shape)
            result.name = f"{result.name}.half"
            graph.outputs[position] = insert_one(graph, None, "Cast", [result], {"to": FLOAT.value}, wide)
