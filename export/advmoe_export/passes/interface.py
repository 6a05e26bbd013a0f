"""Change inputs and outputs of the graph: uint8 images, expert index, router margins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from advmoe_export.errors import UnsupportedModelError
from advmoe_export.operators import decision_of, has_bank
from advmoe_export.passes.contract import (
    GraphPass,
    decisions_are_integers,
    is_full_precision,
    reads_float_images,
    reads_uint8_images,
    returns,
    returns_logits_only,
)
from advmoe_export.passes.editing import constant, insert, insert_one
from advmoe_export.passes.rows import row_dim
from advmoe_export.passes.two_way import difference_of_logits, second_chosen, two_way_decisions_are_compared

EXPERT_INDEX = "expert_index"
ROUTER_MARGIN = "router_margin"


class ReadUint8Images(GraphPass):
    """Replace the input, float images [B, 3, H, W] in [0, 1], by uint8 images [B, H, W, 3]."""

    needs = (reads_float_images, is_full_precision)
    leaves = (reads_uint8_images,)

    def change(self, graph: ir.Graph) -> None:
        """Insert the conversion at the beginning of the graph."""
        _read_uint8(graph)


class AddExpertIndex(GraphPass):
    """Add the output `expert_index` int64 [B, L]: the expert of each image in each MoE layer.

    A layer that routes tokens has one column per token.
    """

    needs = (returns_logits_only, two_way_decisions_are_compared, decisions_are_integers)
    leaves = (returns(EXPERT_INDEX),)

    def change(self, graph: ir.Graph) -> None:
        """Add the output."""
        decisions = [decision_of(node) for node in routed_nodes(graph)]
        compared = [second_chosen(decision) for decision in decisions]
        chosen = decisions if None in compared else [second[0] for second in compared if second is not None]
        _add_output(graph, [_by_image(graph, value) for value in chosen], EXPERT_INDEX, ir.DataType.INT64)


class AddRouterMargin(GraphPass):
    """Add the output `router_margin` float [B, L]: the chosen router logit minus the next one.

    Its columns are those of `expert_index`.
    """

    needs = (returns(EXPERT_INDEX), two_way_decisions_are_compared)
    leaves = (returns(ROUTER_MARGIN),)

    def change(self, graph: ir.Graph) -> None:
        """Add the output.

        Raises:
            UnsupportedModelError: a decision is not the argmax of router logits.
        """
        margins: dict[ir.Value, ir.Value] = {}
        columns = []
        for node in routed_nodes(graph):
            decision = decision_of(node)
            assert decision is not None
            if decision not in margins:
                margins[decision] = _margin(graph, decision)
            columns.append(_by_image(graph, margins[decision]))
        _add_output(graph, columns, ROUTER_MARGIN, ir.DataType.FLOAT)


def _read_uint8(graph: ir.Graph) -> None:
    (images,) = graph.inputs
    assert images.shape is not None
    batch, channels, height, width = images.shape
    pixels = ir.Value(
        name="images", shape=ir.Shape([batch, height, width, channels]), type=ir.TensorType(ir.DataType.UINT8)
    )
    images.name = "images.float"
    nhwc, nchw = ir.Shape([batch, height, width, channels]), images.shape
    first, dtype = graph[0], ir.DataType.FLOAT
    cast = insert_one(graph, first, "Cast", [pixels], {"to": dtype.value}, ("pixels", dtype, nhwc))
    planes = insert_one(graph, first, "Transpose", [cast], {"perm": [0, 3, 1, 2]}, ("planes", dtype, nchw))
    range_ = constant(graph, np.float32(255), "pixel_range")
    scaled = insert_one(graph, first, "Div", [planes, range_], {}, ("scaled", dtype, nchw))
    images.replace_all_uses_with(scaled)
    graph.inputs[0] = pixels


def routed_nodes(graph: ir.Graph) -> list[ir.Node]:
    """The MoE layers in the order of computation."""
    return [node for node in graph if has_bank(node)]


def _margin(graph: ir.Graph, decision: ir.Value) -> ir.Value:
    """float [rows, 1]"""
    name, dtype = str(decision.name), ir.DataType.FLOAT
    difference = difference_of_logits(decision)
    if difference is not None:
        return insert_one(graph, None, "Abs", [difference], {}, (f"{name}.margin", dtype, difference.shape))
    argmax = decision.producer()
    logits = argmax.inputs[0] if argmax is not None and argmax.op_type == "ArgMax" else None
    if logits is None or logits.shape is None or len(logits.shape) != 2 or logits.shape[1] == 1:
        raise UnsupportedModelError(
            f"router margins need logits, but the decision '{name}' is not the argmax of two or more logits [B, N]; "
            "export without margins"
        )
    rows = logits.shape[0]
    values, _ = insert(
        graph,
        None,
        "TopK",
        [logits, constant(graph, [2], "two")],
        {"axis": 1},
        (f"{name}.top2", dtype, ir.Shape([rows, 2])),
        (f"{name}.top2_places", ir.DataType.INT64, ir.Shape([rows, 2])),
    )
    signs = constant(graph, np.array([[1.0], [-1.0]], dtype=np.float32), "first_minus_second")
    return insert_one(graph, None, "MatMul", [values, signs], {}, (f"{name}.margin", dtype, ir.Shape([rows, 1])))


def _by_image(graph: ir.Graph, value: ir.Value | None) -> ir.Value:
    """Reshape a value [rows] or [rows, 1] to [B, rows per image]."""
    assert value is not None
    assert value.shape is not None
    assert value.dtype is not None
    batch = graph.inputs[0].shape[0]  # type: ignore[index]
    if row_dim(value) == str(batch) and len(value.shape) == 2:
        return value
    axis = constant(graph, [1], "axis_1")
    if row_dim(value) == str(batch):
        column = (f"{value.name}.column", value.dtype, ir.Shape([batch, 1]))
        return insert_one(graph, None, "Unsqueeze", [value, axis], {}, column)
    per_image = value.shape[0].evaluate({str(batch): 1})  # type: ignore[union-attr]
    if not isinstance(per_image, int):
        raise UnsupportedModelError(f"a router decides for {value.shape[0]} rows, which is not a multiple of the batch")
    target = constant(graph, [-1, per_image], f"rows_per_image_{per_image}")
    columns = (f"{value.name}.columns", value.dtype, ir.Shape([batch, per_image]))
    return insert_one(graph, None, "Reshape", [value, target], {}, columns)


def _add_output(graph: ir.Graph, columns: Sequence[ir.Value], name: str, dtype: ir.DataType) -> None:
    """Concatenate columns [B, ...] along axis 1, and add the result to the outputs."""
    batch = graph.inputs[0].shape[0]  # type: ignore[index]
    width = sum(int(column.shape[1]) for column in columns)  # type: ignore[arg-type,index,misc]
    shape = ir.Shape([batch, width])
    joined = insert_one(graph, None, "Concat", columns, {"axis": 1}, (f"{name}.columns", columns[0].dtype, shape))
    graph.outputs.append(insert_one(graph, None, "Cast", [joined], {"to": dtype.value}, (name, dtype, shape)))
