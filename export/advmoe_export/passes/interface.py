"""What goes into a model and what comes out of it: uint8 images with the preprocessing inside, expert choices and
margins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from advmoe_export.errors import UnsupportedModelError
from advmoe_export.operators import is_routed
from advmoe_export.passes.rows import row_dim

EXPERT_INDEX = "expert_index"
ROUTER_MARGIN = "router_margin"


def take_uint8_images(graph: ir.Graph) -> None:
    """Make a graph of float images [B, 3, H, W] in [0, 1] read uint8 images [B, H, W, 3], as decoders deliver them."""
    (images,) = graph.inputs
    assert images.shape is not None
    batch, channels, height, width = images.shape
    pixels = ir.Value(
        name="images", shape=ir.Shape([batch, height, width, channels]), type=ir.TensorType(ir.DataType.UINT8)
    )
    images.name = "images.float"
    nhwc, nchw = ir.Shape([batch, height, width, channels]), images.shape
    first = graph[0]
    cast = _node("Cast", [pixels], {"to": ir.DataType.FLOAT.value}, "pixels", ir.DataType.FLOAT, nhwc)
    planes = _node("Transpose", [cast], {"perm": [0, 3, 1, 2]}, "planes", ir.DataType.FLOAT, nchw)
    scaled = _node(
        "Div", [planes, _constant(graph, np.float32(255), "pixel_range")], {}, "scaled", ir.DataType.FLOAT, nchw
    )
    images.replace_all_uses_with(scaled)
    graph.inputs[0] = pixels
    graph.insert_before(first, [value.producer() for value in (cast, planes, scaled)])  # type: ignore[misc]


def routed_nodes(graph: ir.Graph) -> list[ir.Node]:
    """The MoE layers in the order of computation."""
    return [node for node in graph if is_routed(node)]


def add_expert_index(graph: ir.Graph) -> None:
    """Add the output `expert_index` int64 [B, L]: the expert of each image in each MoE layer.

    A layer that routes tokens has one column per token.
    """
    columns = [_by_image(graph, node.inputs[3]) for node in routed_nodes(graph)]
    _add_output(graph, columns, EXPERT_INDEX, ir.DataType.INT64)


def add_router_margin(graph: ir.Graph) -> None:
    """Add the output `router_margin` float [B, L]: the chosen router logit minus the next one, in the columns of
    `expert_index`.

    Raises:
        UnsupportedModelError: a decision is not the argmax of router logits.
    """
    margins: dict[ir.Value, ir.Value] = {}
    columns = []
    for node in routed_nodes(graph):
        decision = node.inputs[3]
        assert decision is not None
        if decision not in margins:
            margins[decision] = _margin(graph, decision)
        columns.append(_by_image(graph, margins[decision]))
    _add_output(graph, columns, ROUTER_MARGIN, ir.DataType.FLOAT)


def router_logits(decision: ir.Value | None) -> ir.Value | None:
    """The logits [rows, N] whose argmax a decision is, if it is one."""
    producer = None if decision is None else decision.producer()
    if producer is None or producer.op_type != "ArgMax":
        return None
    return producer.inputs[0]


def _margin(graph: ir.Graph, decision: ir.Value) -> ir.Value:
    logits = router_logits(decision)
    if logits is None or logits.shape is None or len(logits.shape) != 2:
        raise UnsupportedModelError(
            f"router margins were asked for, but the decision '{decision.name}' is not the argmax of logits [B, N]; "
            "export without margins"
        )
    rows, dtype = logits.shape[0], ir.DataType.FLOAT
    if logits.shape[1] == 1:
        margin = _node(
            "ReduceSum", [logits, _constant(graph, [1], "axis_1")], {"keepdims": 0}, "margin", dtype, ir.Shape([rows])
        )
        return _append(graph, margin)
    values, places = (
        ir.Value(name=f"{decision.name}.{what}", type=ir.TensorType(kind), shape=ir.Shape([rows, 2]))
        for what, kind in (("top2", dtype), ("top2_places", ir.DataType.INT64))
    )
    graph.append(
        ir.Node("", "TopK", [logits, _constant(graph, [2], "two")], [ir.AttrInt64("axis", 1)], outputs=[values, places])
    )
    signs = _constant(graph, np.array([[1.0], [-1.0]], dtype=np.float32), "first_minus_second")
    difference = _append(
        graph, _node("MatMul", [values, signs], {}, f"{decision.name}.margin", dtype, ir.Shape([rows, 1]))
    )
    return _append(
        graph, _node("Flatten", [difference], {"axis": 1}, f"{decision.name}.margin_column", dtype, ir.Shape([rows, 1]))
    )


def _by_image(graph: ir.Graph, value: ir.Value | None) -> ir.Value:
    """[rows] or [rows, 1] as columns [B, rows per image]."""
    assert value is not None
    assert value.shape is not None
    assert value.dtype is not None
    batch = graph.inputs[0].shape[0]  # type: ignore[index]
    if row_dim(value) == str(batch) and len(value.shape) == 2:
        return value
    if row_dim(value) == str(batch):
        column = _node(
            "Unsqueeze",
            [value, _constant(graph, [1], "axis_1")],
            {},
            f"{value.name}.column",
            value.dtype,
            ir.Shape([batch, 1]),
        )
        return _append(graph, column)
    per_image = value.shape[0].evaluate({str(batch): 1})  # type: ignore[union-attr]
    if not isinstance(per_image, int):
        raise UnsupportedModelError(f"a router decides for {value.shape[0]} rows, which is not a multiple of the batch")
    target = _constant(graph, [-1, per_image], f"rows_per_image_{per_image}")
    shape = ir.Shape([batch, per_image])
    return _append(graph, _node("Reshape", [value, target], {}, f"{value.name}.columns", value.dtype, shape))


def _add_output(graph: ir.Graph, columns: Sequence[ir.Value], name: str, dtype: ir.DataType) -> None:
    batch = graph.inputs[0].shape[0]  # type: ignore[index]
    width = sum(int(column.shape[1]) for column in columns)  # type: ignore[arg-type,index,misc]
    graph.outputs.append(_append(graph, _node("Concat", columns, {"axis": 1}, name, dtype, ir.Shape([batch, width]))))


def _node(
    op_type: str, inputs: Sequence[ir.Value], attributes: dict[str, Any], name: str, dtype: ir.DataType, shape: ir.Shape
) -> ir.Value:
    output = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
    attrs = ir.convenience.convert_attributes(attributes)
    ir.Node("", op_type, inputs, attrs, outputs=[output], name=f"{op_type}.{name}")
    return output


def _append(graph: ir.Graph, value: ir.Value) -> ir.Value:
    graph.append(value.producer())  # type: ignore[arg-type]
    return value


def _constant(graph: ir.Graph, content: Any, name: str) -> ir.Value:
    if name not in graph.initializers:
        array = content if isinstance(content, np.ndarray | np.generic) else np.array(content, dtype=np.int64)
        tensor = ir.tensor(np.asarray(array), name=name)
        graph.register_initializer(
            ir.Value(
                name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        )
    return graph.initializers[name]
