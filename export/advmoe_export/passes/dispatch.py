"""Write a region for many rows, with one sub-batch per expert. The result has a new order of rows.

For convolutions on batches of unknown size, onnxruntime inserts `Reshape` nodes with a literal 0.
These nodes fail if an expert gets no row, and prevent the fusion of additions and activations. A
named dimension for each sub-batch avoids both problems.
"""

from __future__ import annotations

import onnx_ir as ir

from advmoe_export.passes.lower import Binding, Lowering, write_expert
from advmoe_export.passes.orders import Order
from advmoe_export.passes.regions import Region
from advmoe_export.passes.rows import row_dim
from advmoe_export.passes.two_way import second_chosen
from advmoe_export.scope import Scope


def write_dispatch(state: Lowering, region: Region) -> None:
    """Write the region into the scope of `state`. The rows of its outputs have a new order."""
    scope = state.scope
    order = state.latest([*region.inputs, region.expert_index], region.row_dim)
    second = second_chosen(region.expert_index)
    decision = state.fetch(region.expert_index if second is None else second[1], order)
    name = str(region.routed[0].outputs[0].name)
    places = [
        _places(scope, decision, expert, scope.names.fresh(f"rows_{name}_{expert}"))
        for expert in range(region.num_experts)
    ]
    parts: list[Binding] = []
    for expert, chosen in enumerate(places):
        assert chosen.shape is not None
        rows = chosen.shape[0].value  # type: ignore[union-attr]
        inputs = {value: _gather(state, value, order, chosen, region) for value in region.inputs}
        parts.append(write_expert(state, scope, region, expert, inputs, rows))
    step = scope.op(
        "Concat", list(places), {"axis": 0}, name=f"{name}.order", dtype=ir.DataType.INT64, shape=[region.row_dim]
    )
    sorted_by_expert = Order(region.row_dim, order.depth + 1, order, step)
    for output in region.outputs:
        state.binding[output] = scope.op(
            "Concat",
            [part[output] for part in parts],
            {"axis": 0},
            name=str(output.name),
            dtype=output.dtype,
            shape=state.fixed(output.shape),
        )
        state.order_of[output] = sorted_by_expert


def _places(scope: Scope, decision: ir.Value, expert: int, dim: str) -> ir.Value:
    """int64 [dim]: the numbers of the rows with the given expert.

    The decision is int64 [rows], or bool [rows] between two experts.
    """
    boolean, int64 = ir.DataType.BOOL, ir.DataType.INT64
    chosen = decision
    if decision.dtype == int64:
        number = scope.integers(expert)
        chosen = scope.op("Equal", [decision, number], name="chosen", dtype=boolean, shape=decision.shape)
    elif expert == 0:
        chosen = scope.op("Not", [decision], name="chosen", dtype=boolean, shape=decision.shape)
    places = scope.op("NonZero", [chosen], name="places", dtype=int64, shape=[1, dim])
    return scope.op("Squeeze", [places, scope.integers(0)], name="places", dtype=int64, shape=[dim])


def _gather(state: Lowering, value: ir.Value, order: Order, chosen: ir.Value, region: Region) -> ir.Value:
    """The chosen rows of a value, which may be in another order than the decision."""
    scope, found = state.scope, state.binding[value]
    if row_dim(value) != region.row_dim:
        return state.fetch(value, state.orders.original(str(row_dim(value))))
    own = state.order_of.get(value, state.orders.original(region.row_dim))
    if own is not order:
        places = state.orders.between(scope, own, order)
        chosen = scope.op(
            "Gather", [places, chosen], {"axis": 0}, name="places", dtype=ir.DataType.INT64, shape=chosen.shape
        )
    assert found.shape is not None
    assert chosen.shape is not None
    return scope.op(
        "Gather",
        [found, chosen],
        {"axis": 0},
        name=f"{value.name}.sub_batch",
        dtype=found.dtype,
        shape=ir.Shape([chosen.shape[0], *found.shape[1:]]),
    )
