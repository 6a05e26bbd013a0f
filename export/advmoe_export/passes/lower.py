"""Shared code of all modules that write a region: copying nodes, and tracking the order of rows.

`branches` writes an `If` tree around the experts, for one row per decision. `dispatch` gathers the
rows of each expert into a sub-batch. `select` uses no control flow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from advmoe_export.operators import is_routed
from advmoe_export.passes.experts import write_expert_op
from advmoe_export.passes.orders import Order, Orders
from advmoe_export.passes.regions import Plan, Region
from advmoe_export.passes.rows import is_rowwise, row_dim
from advmoe_export.scope import Scope

Binding = dict[ir.Value, ir.Value]
"""Maps each value of the traced graph to its copy in the graph being written."""


@dataclass(kw_only=True)
class Lowering:
    """The state of writing one copy of the planned graph."""

    plan: Plan
    scope: Scope
    sizes: Mapping[str, int]
    """Sizes of the symbolic dimensions that this copy fixes, such as {"batch": 1}."""
    binding: Binding
    orders: Orders = field(default_factory=Orders)
    order_of: dict[ir.Value, Order] = field(default_factory=dict)
    """Order of the rows of each value in this copy. Values that are not listed are in the original order."""

    def fixed(self, shape: ir.Shape | None) -> ir.Shape | None:
        """A shape of the traced graph with the sizes of this copy."""
        return fix_shape(shape, self.sizes)

    def fetch(self, value: ir.Value, order: Order) -> ir.Value:
        """The copy of a value, with its rows in the given order."""
        found = self.binding[value]
        return self.orders.move(self.scope, found, self.order_of.get(value), order)

    def latest(self, values: Iterable[ir.Value], symbol: str) -> Order:
        """The most recent order of the rows of some values."""
        orders = [self.order_of[value] for value in values if value in self.order_of]
        return max(
            (o for o in orders if o.symbol == symbol), key=lambda o: o.depth, default=self.orders.original(symbol)
        )


def fix_shape(shape: ir.Shape | None, sizes: Mapping[str, int]) -> ir.Shape | None:
    """Replace symbols by their sizes, also in sums and products of symbols."""
    if shape is None:
        return None
    fixed: list[int | str | None] = []
    for dim in shape:
        size = dim if isinstance(dim, int) else dim.evaluate(sizes)
        fixed.append(size if isinstance(size, int) else size.value)
    return ir.Shape(fixed)


def write_plain(state: Lowering, node: ir.Node) -> None:
    """Copy a node that is not routed.

    The inputs of a row-by-row node must have the same order of rows. All other nodes need the
    original order.
    """
    running = [value for value in node.inputs if value is not None and value.const_value is None]
    if is_rowwise(node):
        order = state.latest(running, str(row_dim(node.outputs[0])))
        inputs = {value: state.fetch(value, order) for value in running}
        for output in node.outputs:
            state.order_of[output] = order
    else:
        inputs = {value: state.fetch(value, state.orders.original(str(row_dim(value)))) for value in running}
    copy_node(state.scope, node, inputs, state.binding, [state.fixed(output.shape) for output in node.outputs])


def copy_node(
    scope: Scope, node: ir.Node, inputs: Mapping[ir.Value, ir.Value], binding: Binding, shapes: list[ir.Shape | None]
) -> None:
    """Copy a standard node with other inputs, and bind its outputs."""
    sources = [
        None
        if value is None
        else inputs[value]
        if value.const_value is None
        else scope.constant(value.const_value, value.name)
        for value in node.inputs
    ]
    outputs = [(str(o.name), o.dtype, shape) for o, shape in zip(node.outputs, shapes, strict=True)]
    copies = scope.ops(node.op_type, sources, dict(node.attributes.items()), outputs=outputs)
    binding.update(zip(node.outputs, copies, strict=True))


def write_expert(
    state: Lowering,
    scope: Scope,
    region: Region,
    expert: int,
    inputs: Mapping[ir.Value, ir.Value],
    rows: int | str | None,
) -> Binding:
    """Write the form of a region for one expert. Returns the copies of its values.

    `rows` is the number of rows, or the name of their dimension.
    """
    binding: Binding = dict(inputs)
    for node in region.nodes:
        shapes = [_with_rows(state.fixed(output.shape), rows) for output in node.outputs]
        if is_routed(node):
            x = binding[node.inputs[0]]  # type: ignore[index]
            assert shapes[0] is not None
            binding[node.outputs[0]] = write_expert_op(
                scope, node, state.plan.banks.get(node), expert, x, name=str(node.outputs[0].name), shape=shapes[0]
            )
        else:
            copy_node(scope, node, binding, binding, shapes)
    return binding


def _with_rows(shape: ir.Shape | None, rows: int | str | None) -> ir.Shape | None:
    return None if shape is None else ir.Shape([rows, *shape[1:]])
