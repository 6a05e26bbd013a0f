"""Write a region for one row, as a balanced tree of `If` nodes over the experts.

Each branch contains the weights of its expert.
"""

from __future__ import annotations

import onnx_ir as ir

from advmoe_export.passes.lower import Lowering, write_expert
from advmoe_export.passes.regions import Region
from advmoe_export.passes.rows import row_dim
from advmoe_export.passes.two_way import second_chosen
from advmoe_export.scope import Scope


def write_branches(state: Lowering, region: Region) -> None:
    """Write the region into the scope of `state`. With one expert there is no branch."""
    order = state.latest(region.inputs, region.row_dim)
    inputs = {
        value: state.fetch(
            value, order if row_dim(value) == region.row_dim else state.orders.original(str(row_dim(value)))
        )
        for value in region.inputs
    }
    shape = state.fixed(region.expert_index.shape)
    assert shape is not None
    rows = shape[0] if isinstance(shape[0], int) else region.row_dim
    if region.num_experts == 1:
        binding = write_expert(state, state.scope, region, 0, inputs, rows)
        state.binding.update({output: binding[output] for output in region.outputs})
        state.order_of.update(dict.fromkeys(region.outputs, order))
        return

    second = second_chosen(region.expert_index)
    decision = state.binding[region.expert_index if second is None else second[0]]

    def tree(scope: Scope, low: int, high: int) -> list[ir.Value]:
        """Outputs of the region for an expert in low ... high - 1."""
        if high - low == 1:
            binding = write_expert(state, scope, region, low, inputs, rows)
            return [binding[output] for output in region.outputs]
        middle = (low + high) // 2
        above = decision
        if second is None:
            last = scope.integers(middle - 1)
            above = scope.op("Greater", [decision, last], name="above", dtype=ir.DataType.BOOL, shape=decision.shape)
        branches = {}
        for branch, bounds in (("then_branch", (middle, high)), ("else_branch", (low, middle))):
            inner = scope.child()
            outputs = tree(inner, *bounds)
            branches[branch] = inner.graph([], outputs, scope.names.fresh(f"experts {bounds[0]}-{bounds[1] - 1}"))
        return scope.ops(
            "If",
            [above],
            branches,
            outputs=[
                (str(output.name), output.dtype, _rows(state.fixed(output.shape), rows)) for output in region.outputs
            ],
        )

    state.binding.update(zip(region.outputs, tree(state.scope, 0, region.num_experts), strict=True))


def _rows(shape: ir.Shape | None, rows: int | str) -> ir.Shape | None:
    return None if shape is None else ir.Shape([rows, *shape[1:]])
