"""Write a planned graph as standard ONNX, step by step."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common

from advmoe_export.passes.branches import write_branches
from advmoe_export.passes.dispatch import write_dispatch
from advmoe_export.passes.lower import Lowering, write_plain
from advmoe_export.passes.regions import Region
from advmoe_export.passes.rows import row_dim
from advmoe_export.passes.select import write_selection
from advmoe_export.scope import Scope

IR_VERSION = 10
"""Version of the file format; onnxruntime reads it from 1.20 on."""


def write_steps(
    state: Lowering, steps: Sequence[ir.Node | Region] | None = None, *, select: bool = False
) -> list[ir.Value]:
    """Write steps of a plan, and return the outputs of the graph.

    Args:
        state: the state of this copy of the graph.
        steps: the steps to write; the default is all steps.
        select: whether to write regions without control flow.
    """
    for step in state.plan.steps if steps is None else steps:
        write_step(state, step, select=select)
    outputs = state.plan.graph.outputs
    return [state.fetch(value, state.orders.original(str(row_dim(value)))) for value in outputs]


def write_step(state: Lowering, step: ir.Node | Region, *, select: bool = False) -> None:
    """Write one step: a plain node, or a region in the form for its number of rows."""
    if not isinstance(step, Region):
        write_plain(state, step)
        return
    rows = state.fixed(step.expert_index.shape)
    if select:
        write_selection(state, step)
    elif step.num_experts == 1 or (rows is not None and rows[0] == 1):
        write_branches(state, step)
    else:
        write_dispatch(state, step)


def finish(scope: Scope, inputs: list[ir.Value], outputs: list[ir.Value], opset: int) -> ir.Model:
    """The model of a scope, without unused nodes and constants."""
    graph = scope.graph(inputs, outputs, "advmoe")
    graph.opset_imports[""] = opset
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="advmoe-export")
    common.RemoveUnusedNodesPass()(model)
    for branch in model.graph.subgraphs():  # the pass removes constants of the outermost graph only
        for value in list(branch.initializers.values()):
            if not value.uses() and not value.is_graph_output():
                del branch.initializers[str(value.name)]
    return model
