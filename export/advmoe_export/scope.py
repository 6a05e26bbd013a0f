"""Write an ONNX graph or subgraph node by node, with names that are unique in the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Names:
    """Generates names. ONNX requires unique names across a graph and its subgraphs."""

    def __init__(self) -> None:
        self._used: dict[str, int] = {}

    def fresh(self, base: str) -> str:
        """`base`, or `base.2`, `base.3`, ... if `base` is used already."""
        count = self._used.get(base, 0) + 1
        self._used[base] = count
        return base if count == 1 else self.fresh(f"{base}.{count}")


class Scope:
    """A graph under construction: the main graph, or a branch of an `If`.

    A branch can use the values of the scopes around it, but has its own constants. onnxruntime
    converts the weights of a convolution to the fast layout only if they belong to the same
    (sub)graph as the convolution.
    """

    def __init__(self, names: Names | None = None) -> None:
        self.names = names or Names()
        self.nodes: list[ir.Node] = []
        self._constants: dict[int, ir.Value] = {}

    def child(self) -> Scope:
        """A scope for a branch inside this one."""
        return Scope(self.names)

    def constant(self, tensor: ir.TensorProtocol | np.ndarray, name: str | None = None) -> ir.Value:
        """An initializer of this scope. The same tensor object gives the same initializer."""
        if isinstance(tensor, np.ndarray):
            tensor = ir.tensor(tensor, name=name or "constant")
        if id(tensor) not in self._constants:
            self._constants[id(tensor)] = ir.Value(
                name=self.names.fresh(name or tensor.name or "constant"),
                shape=ir.Shape(tensor.shape.numpy()),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        return self._constants[id(tensor)]

    def integers(self, *values: int) -> ir.Value:
        """A constant int64 vector."""
        return self.constant(np.array(values, dtype=np.int64), "int64")

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        outputs: Sequence[tuple[str, ir.DataType | None, ir.Shape | None]],
    ) -> list[ir.Value]:
        """Append a node; each output is (name, dtype, shape)."""
        values = [
            ir.Value(name=self.names.fresh(name), type=None if dtype is None else ir.TensorType(dtype), shape=shape)
            for name, dtype, shape in outputs
        ]
        attrs = [
            a if isinstance(a, ir.Attr) else ir.convenience.convert_attribute(k, a)
            for k, a in (attributes or {}).items()
        ]
        self.nodes.append(
            ir.Node("", op_type, inputs, attrs, outputs=values, name=self.names.fresh(f"{op_type}.{values[0].name}"))
        )
        return values

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        name: str,
        dtype: ir.DataType | None,
        shape: ir.Shape | Sequence[Any] | None,
    ) -> ir.Value:
        """Append a node with one output."""
        shape = shape if shape is None or isinstance(shape, ir.Shape) else ir.Shape(shape)
        return self.ops(op_type, inputs, attributes, outputs=[(name, dtype, shape)])[0]

    def graph(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], name: str) -> ir.Graph:
        """The finished graph."""
        return ir.Graph(inputs, outputs, nodes=self.nodes, initializers=list(self._constants.values()), name=name)
