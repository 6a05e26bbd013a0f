"""Track the order of rows while sub-batches pass through a network.

Dispatching a batch to experts sorts its rows by expert. Restoring the order after each layer would
cost a pass over memory, and the next layer would sort the rows again. The new order is therefore
kept. The original order is restored once, on the logits. A residual is reordered to match the
tensor to which it is added. Two layers that read the same tensor give two orders of which neither
comes from the other; the way between them is over the original order.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from advmoe_export.scope import Scope


@dataclass(eq=False, frozen=True)
class Order:
    """An order of the rows of one leading dimension.

    `step` int64 [rows]: row i of this order is row step[i] of the order before it.
    """

    symbol: str
    depth: int
    before: Order | None = None
    step: ir.Value | None = None

    def comes_from(self, other: Order) -> bool:
        """Whether this order is the other one, or reorders it in one or several steps."""
        return self is other or (self.before is not None and self.before.comes_from(other))


class Orders:
    """All orders of one graph, the index tensors between them, and the reordered tensors."""

    def __init__(self) -> None:
        self._originals: dict[str, Order] = {}
        self._between: dict[tuple[Order, Order], ir.Value] = {}
        self._inverse: dict[Order, ir.Value] = {}
        self._moved: dict[tuple[ir.Value, Order], ir.Value] = {}

    def original(self, symbol: str) -> Order:
        """The order of the rows in the input of the graph."""
        return self._originals.setdefault(symbol, Order(symbol, 0))

    def between(self, scope: Scope, old: Order, new: Order) -> ir.Value:
        """int64 [rows]: for each row of the new order, its position in the other order.

        The two orders differ. The new one need not come from the other one.
        """
        if (old, new) not in self._between:
            original = self.original(new.symbol)
            if new is original:
                return self._back(scope, old)
            if new.comes_from(old):
                assert new.step is not None
                assert new.before is not None
                if new.before is old:
                    return new.step
                places, chosen = self.between(scope, old, new.before), new.step
            else:
                places, chosen = self._back(scope, old), self.between(scope, original, new)
            self._between[old, new] = scope.op(
                "Gather", [places, chosen], {"axis": 0}, name="order", dtype=ir.DataType.INT64, shape=[new.symbol]
            )
        return self._between[old, new]

    def move(self, scope: Scope, value: ir.Value, old: Order | None, new: Order) -> ir.Value:
        """A tensor with its rows in another order."""
        if old is None or old is new:
            if old is new or new.depth == 0:
                return value
            old = self.original(new.symbol)
        key = (value, new)
        if key not in self._moved:
            self._moved[key] = scope.op(
                "Gather",
                [value, self.between(scope, old, new)],
                {"axis": 0},
                name=f"{value.name}.ordered",
                dtype=value.dtype,
                shape=value.shape,
            )
        return self._moved[key]

    def _back(self, scope: Scope, order: Order) -> ir.Value:
        """int64 [rows]: for each row of the original order, its position in the given order."""
        if order not in self._inverse:
            places = self.between(scope, self.original(order.symbol), order)
            int64, scalar = ir.DataType.INT64, ir.Shape([])
            count = scope.op("Size", [places], name="rows", dtype=int64, shape=scalar)
            zero, one = (scope.constant(ir.tensor(v, dtype=int64, name="int64")) for v in (0, 1))
            positions = scope.op("Range", [zero, count, one], name="positions", dtype=int64, shape=[order.symbol])
            self._inverse[order] = scope.op(
                "ScatterElements",
                [places, places, positions],
                {"axis": 0},
                name="inverse",
                dtype=int64,
                shape=[order.symbol],
            )
        return self._inverse[order]
