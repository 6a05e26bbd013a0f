"""Group the nodes of the traced graph into regions, which run inside the branch of one expert.

A region starts with one routed operator. These nodes are added:

* later routed operators with the same decision, and all nodes on the way to them (one router per
  block, stage or image);
* row-by-row nodes after it: BatchNorm, the residual addition, activation, pooling;
* nodes before it whose results no other node uses.

A region is convex: no path leaves it and comes back. Regions and the remaining nodes therefore form
a graph without cycles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from advmoe_export.bank import Bank, read_bank
from advmoe_export.operators import decision_of, expert_rows, has_bank, is_routed
from advmoe_export.passes.rows import is_rowwise, named, row_dim

FOLLOWERS = named(
    """
    Add AveragePool BatchNormalization Cast Celu Clip DequantizeLinear Elu Erf Gelu GlobalAveragePool HardSigmoid
    HardSwish LeakyRelu MaxPool Mish Mul QuantizeLinear ReduceMean Relu Selu Sigmoid Softplus Sub Swish Tanh
    """
)
"""Operators added after a routed operator. Outside the branch each costs a pass over memory."""


PRECEDERS = FOLLOWERS | {"Conv"}
"""Operators added before a routed operator: a shortcut's convolution then shares its memory layout."""


@dataclass(eq=False)
class Region:
    """Nodes that run under one decision, in topological order."""

    nodes: list[ir.Node]
    expert_index: ir.Value
    """int64 [rows]."""

    @property
    def routed(self) -> list[ir.Node]:
        """The routed operators."""
        return [node for node in self.nodes if is_routed(node)]

    @property
    def num_experts(self) -> int:
        """N."""
        node = self.routed[0]
        return len(expert_rows(node)) if has_bank(node) else len(node.attributes.get_floats("scales"))

    @property
    def row_dim(self) -> str:
        """Symbol of the first dimension, whose rows the decision routes."""
        return str(row_dim(self.expert_index))

    @property
    def inputs(self) -> list[ir.Value]:
        """Values from outside the region, except constants and the decision."""
        inside = {output for node in self.nodes for output in node.outputs}
        seen: dict[ir.Value, None] = {}
        for node in self.nodes:
            for value in _data_inputs(node):
                if value not in inside:
                    seen[value] = None
        return list(seen)

    @property
    def outputs(self) -> list[ir.Value]:
        """Values that are used outside the region."""
        inside = set(self.nodes)
        return [
            output
            for node in self.nodes
            for output in node.outputs
            if output.is_graph_output() or any(use.node not in inside for use in output.uses())
        ]


@dataclass(eq=False)
class Plan:
    """A traced graph in the order of its computation: plain nodes and regions."""

    graph: ir.Graph
    steps: list[ir.Node | Region]
    banks: dict[ir.Node, Bank] = field(default_factory=dict)

    @property
    def regions(self) -> list[Region]:
        """The regions among the steps."""
        return [step for step in self.steps if isinstance(step, Region)]


def plan_regions(graph: ir.Graph) -> Plan:
    """Find the regions of a traced graph, without changing the graph."""
    nodes = list(graph)
    grouping = _Grouping(nodes)
    routed = [node for node in nodes if is_routed(node)]
    for node in routed:
        grouping.open(node)
    for position, node in enumerate(routed):
        for earlier in reversed(routed[:position]):
            if decision_of(earlier) is decision_of(node):
                grouping.join(earlier, node)
                break
    for node in nodes:
        if node.op_type in FOLLOWERS:
            grouping.follow(node)
    for node in reversed(nodes):
        grouping.precede(node)
    return Plan(graph, grouping.steps(), {node: read_bank(node) for node in routed if has_bank(node)})


def _data_inputs(node: ir.Node) -> Iterator[ir.Value]:
    """Inputs of a node, except constants and the decision of a routed operator."""
    for value in node.inputs:
        if value is not None and value.const_value is None and value is not decision_of(node):
            yield value


def _producers(node: ir.Node) -> Iterator[ir.Node]:
    for value in node.inputs:
        producer = None if value is None else value.producer()
        if producer is not None:
            yield producer


class _Grouping:
    """Nodes merged into groups such that the graph of groups has no cycle."""

    def __init__(self, nodes: list[ir.Node]) -> None:
        self.nodes = nodes
        self.position = {node: i for i, node in enumerate(nodes)}
        self.group: dict[ir.Node, Region] = {}
        self.reachable: dict[ir.Node, set[ir.Node]] = {}
        for node in reversed(nodes):
            after: set[ir.Node] = set()
            for output in node.outputs:
                for use in output.uses():
                    after.add(use.node)
                    after |= self.reachable[use.node]
            self.reachable[node] = after

    def open(self, node: ir.Node) -> None:
        decision = decision_of(node)
        assert decision is not None
        self.group[node] = Region([node], decision)

    def join(self, earlier: ir.Node, later: ir.Node) -> None:
        """Merge the regions of two operators with the same decision, and all nodes between them.

        Nothing is merged if a node between them cannot run in the branch.
        """
        first, second = self.group[earlier], self.group[later]
        if first is second:
            return
        members = set(first.nodes) | set(second.nodes)
        between = {
            node
            for node in self.nodes
            if node not in members
            and any(node in self.reachable[m] for m in first.nodes)
            and any(m in self.reachable[node] for m in second.nodes)
        }
        if all(node not in self.group and is_rowwise(node) and self._rows_agree(node, first) for node in between):
            self._merge(first, members | between)

    def follow(self, node: ir.Node) -> None:
        """Add a node to a region that computes one of its inputs."""
        if node in self.group or not is_rowwise(node):
            return
        candidates = [self.group[p] for p in _producers(node) if p in self.group]
        for region in sorted(candidates, key=lambda r: -self.position[r.nodes[-1]]):
            if self._rows_agree(node, region) and self._merge(region, {*region.nodes, node}):
                return

    def precede(self, node: ir.Node) -> None:
        """Add a node to the only region that uses its results."""
        users = {use.node for output in node.outputs for use in output.uses()}
        groups = {self.group.get(user) for user in users}
        if node in self.group or len(groups) != 1 or None in groups or any(o.is_graph_output() for o in node.outputs):
            return
        (region,) = groups
        assert region is not None
        if node.op_type in PRECEDERS and is_rowwise(node) and self._rows_agree(node, region):
            self._merge(region, {*region.nodes, node})

    def _rows_agree(self, node: ir.Node, region: Region) -> bool:
        return all(row_dim(output) == region.row_dim for output in node.outputs)

    def _merge(self, region: Region, members: set[ir.Node]) -> bool:
        """Make `members` one region unless that closes a cycle."""
        nodes = sorted(members, key=self.position.__getitem__)
        merged = Region(nodes, region.expert_index)
        before = {node: self.group.get(node) for node in nodes}
        for node in nodes:
            self.group[node] = merged
        if region.expert_index.producer() in members or self._order() is None:
            for node, old in before.items():
                if old is None:
                    del self.group[node]
                else:
                    self.group[node] = old
            return False
        return True

    def _order(self) -> list[ir.Node | Region] | None:
        """Topological order of groups and single nodes, or None if they form a cycle."""
        state: dict[ir.Node | Region, bool] = {}
        order: list[ir.Node | Region] = []
        stack: list[tuple[ir.Node | Region, Iterator[ir.Node | Region]]] = []
        for node in self.nodes:
            step = self.group.get(node, node)
            if step in state:
                continue
            state[step] = False
            stack.append((step, self._before(step)))
            while stack:
                current, rest = stack[-1]
                for previous in rest:
                    if previous not in state:
                        state[previous] = False
                        stack.append((previous, self._before(previous)))
                        break
                    if not state[previous]:
                        return None
                else:
                    state[current] = True
                    order.append(current)
                    stack.pop()
        return order

    def _before(self, step: ir.Node | Region) -> Iterator[ir.Node | Region]:
        members: Iterable[ir.Node] = step.nodes if isinstance(step, Region) else [step]
        for node in members:
            for producer in _producers(node):
                other = self.group.get(producer, producer)
                if other is not step:
                    yield other

    def steps(self) -> list[ir.Node | Region]:
        """The final order."""
        order = self._order()
        assert order is not None
        return order
