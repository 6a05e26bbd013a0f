"""Write a float16 file as a float32 graph that rounds every value to float16.

The CPU provider of onnxruntime has no float16 convolutions. It computes in float32 and removes the
conversions between neighboring nodes, so neither rounding nor overflow of float16 shows there. In
the graph written here each value passes through float16 explicitly. It gives the results of a
processor that stores values in float16 and adds in float32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from advmoe_export.passes.storage import write_external

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
UNCHANGED = frozenset(
    {"Concat", "Flatten", "Gather", "GatherND", "Identity", "If", "Reshape", "Scan", "Squeeze", "Transpose"}
    | {"MaxPool", "Relu", "Split", "Unsqueeze"}
)
"""Operators whose results need no rounding, because they are values of their inputs, or are rounded inside."""


def write_rounded(source: Path, target: Path) -> None:
    """Write the graph of a float16 file in float32, with every value rounded to float16.

    Args:
        source: a complete `.onnx` file.
        target: the `.onnx` file to write. It gets a data file of its own.
    """
    model = ir.load(source)
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.initializers.values()):
            if value.dtype == HALF:
                value.type = ir.TensorType(FLOAT)
                if value.const_value is not None:
                    value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
        for node in list(graph):
            if node.op_type == "Cast" and node.attributes.get_int("to") == HALF.value:
                node.attributes["to"] = ir.AttrInt64("to", FLOAT.value)
            for output in node.outputs:
                if output.dtype == HALF:
                    output.type = ir.TensorType(FLOAT)
                    if node.op_type not in UNCHANGED:
                        _round(graph, node, output)
    write_external(model, target.with_name(target.name + ".data"))
    ir.save(model, target)


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let all readers of a value of `node` read it rounded to float16."""
    half = ir.Value(name=f"{value.name}.rounded.half", type=ir.TensorType(HALF), shape=value.shape)
    wide = ir.Value(name=f"{value.name}.rounded", type=ir.TensorType(FLOAT), shape=value.shape)
    value.replace_all_uses_with(wide, replace_graph_outputs=True)
    casts = [
        ir.Node("", "Cast", [before], [ir.AttrInt64("to", dtype.value)], outputs=[after], name=f"Cast.{after.name}")
        for before, after, dtype in ((value, half, HALF), (half, wide, FLOAT))
    ]
    graph.insert_after(node, casts)
