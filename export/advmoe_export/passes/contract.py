"""Facts about the graph that a pass requires and ensures. They are checked before and after each pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import onnx_ir as ir

from advmoe_export.operators import DOMAIN, decision_of, is_routed

Fact = Callable[[ir.Graph], str | None]
"""A property of a graph. The function returns None if the property holds, else a reason."""


class GraphPass(ir.passes.InPlacePass):
    """A pass that changes the traced graph in place.

    A call raises `PreconditionError` or `PostconditionError` if a fact does not hold. Such an error
    is a bug of this package, for example a wrong order of passes.
    """

    needs: ClassVar[tuple[Fact, ...]] = ()
    """Facts that must hold before the pass."""
    leaves: ClassVar[tuple[Fact, ...]] = ()
    """Facts that hold after the pass."""

    def requires(self, model: ir.Model) -> None:
        """Check `needs`."""
        if reasons := contradictions(model.graph, self.needs):
            raise ir.passes.PreconditionError(f"{type(self).__name__} cannot run: {reasons}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model's graph."""
        self.change(model.graph)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Check `leaves`."""
        if reasons := contradictions(model.graph, self.leaves):
            raise ir.passes.PostconditionError(f"{type(self).__name__} left its work undone: {reasons}")

    @abstractmethod
    def change(self, graph: ir.Graph) -> None:
        """Change the graph."""


def contradictions(graph: ir.Graph, facts: Sequence[Fact]) -> str:
    """Reasons against the facts, in one line; empty if all facts hold."""
    found = (fact(graph) for fact in facts)
    return "; ".join(reason for reason in found if reason is not None)


def is_flat(graph: ir.Graph) -> str | None:
    """Fact: there is no control flow, and all operators are standard or routed operators."""
    for node in graph:
        if node.domain not in ("", DOMAIN):
            return f"node '{node.name}' is of domain '{node.domain}'"
        if any(attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()):
            return f"node '{node.name}' ({node.op_type}) has a subgraph"
    return None


def only_standard_operators(graph: ir.Graph) -> str | None:
    """Fact: all operators are standard operators, also in branches."""
    for node in graph.all_nodes():
        if node.domain != "":
            return f"node '{node.name}' is of domain '{node.domain}', not of the ONNX standard"
    return None


def reads_float_images(graph: ir.Graph) -> str | None:
    """Fact: images are float32 [B, 3, H, W]."""
    images = graph.inputs[0]
    return None if images.dtype == ir.DataType.FLOAT else f"images are {images.dtype}, not float32"


def reads_uint8_images(graph: ir.Graph) -> str | None:
    """Fact: images are uint8 [B, H, W, 3]."""
    images = graph.inputs[0]
    return None if images.dtype == ir.DataType.UINT8 else f"images are {images.dtype}, not uint8"


def is_full_precision(graph: ir.Graph) -> str | None:
    """Fact: no value is rounded to float16 or to integers."""
    for node in graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "fake_quantize"):
            return f"node '{node.name}' is quantized already"
        if any(value is not None and value.dtype == ir.DataType.FLOAT16 for value in (*node.inputs, *node.outputs)):
            return f"node '{node.name}' works in float16 already"
    return None


def returns_logits_only(graph: ir.Graph) -> str | None:
    """Fact: the graph has no output besides the logits."""
    names = [str(output.name) for output in graph.outputs]
    return None if len(names) == 1 else f"the graph has the outputs {', '.join(names)}"


def returns(name: str) -> Fact:
    """Fact: the graph has an output of this name."""

    def fact(graph: ir.Graph) -> str | None:
        return None if any(output.name == name for output in graph.outputs) else f"the graph has no output '{name}'"

    return fact


def outputs_keep_their_types(graph: ir.Graph) -> str | None:
    """Fact: every output is float32 or int64, independent of the precision of the graph."""
    for output in graph.outputs:
        if output.dtype not in (ir.DataType.FLOAT, ir.DataType.INT64):
            return f"output '{output.name}' is {output.dtype}"
    return None


def decisions_are_integers(graph: ir.Graph) -> str | None:
    """Fact: the decision of every routed operator is int64 [rows]."""
    for node in graph:
        decision = decision_of(node)
        if is_routed(node) and (decision is None or decision.dtype != ir.DataType.INT64):
            return f"the decision of '{node.name}' is {None if decision is None else decision.dtype}, not int64"
    return None
