"""Write a region without control flow and with static shapes, for CUDA graphs and TensorRT.

For one row, the weights of the chosen expert are gathered. For several rows, every expert computes
every row, and the result of the chosen expert is selected.
"""

from __future__ import annotations

import onnx_ir as ir

from advmoe_export.operators import LINEAR, is_routed
from advmoe_export.passes.experts import write_plain_op
from advmoe_export.passes.lower import Lowering, copy_node
from advmoe_export.passes.regions import Region
from advmoe_export.scope import Scope

INT64 = ir.DataType.INT64


def write_selection(state: Lowering, region: Region) -> None:
    """Write the region into the scope of `state`, node by node."""
    for node in region.nodes:
        shapes = [state.fixed(output.shape) for output in node.outputs]
        if not is_routed(node):
            copy_node(state.scope, node, state.binding, state.binding, shapes)
            continue
        shape = shapes[0]
        assert shape is not None
        expert_index = state.binding[region.expert_index]
        x = state.binding[node.inputs[0]]  # type: ignore[index]
        write = _one_row if shape[0] == 1 else _all_experts
        state.binding[node.outputs[0]] = write(state, node, x, expert_index, shape)


def _one_row(state: Lowering, node: ir.Node, x: ir.Value, expert_index: ir.Value, shape: ir.Shape) -> ir.Value:
    scope, bank, name = state.scope, state.plan.banks[node], str(node.outputs[0].name)
    weight, bias = bank.stacked()
    experts = (bank.num_experts, bank.size)
    chosen = _take(scope, weight.reshape(*experts, *weight.shape[1:]), expert_index, f"{name}.weights")
    if node.op_type == LINEAR:
        chosen = scope.op(
            "Transpose",
            [chosen],
            {"perm": [1, 0]},
            name=f"{name}.weight",
            dtype=chosen.dtype,
            shape=[weight.shape[1], bank.size],
        )
    chosen_bias = None if bias is None else _take(scope, bias.reshape(experts), expert_index, f"{name}.biases")
    return write_plain_op(scope, node, x, chosen, chosen_bias, name=name, shape=shape)


def _take(scope: Scope, table: object, expert_index: ir.Value, name: str) -> ir.Value:
    """The entry of one expert in a table [N, ...]."""
    entries = scope.constant(ir.tensor(table, name=name))  # type: ignore[arg-type]
    inner = [int(dim) for dim in entries.shape[1:]]  # type: ignore[arg-type,index]
    entry = scope.op(
        "Gather", [entries, expert_index], {"axis": 0}, name=f"{name}.chosen", dtype=entries.dtype, shape=[1, *inner]
    )
    return scope.op("Squeeze", [entry, scope.integers(0)], name=f"{name}.chosen", dtype=entries.dtype, shape=inner)


def _all_experts(state: Lowering, node: ir.Node, x: ir.Value, expert_index: ir.Value, shape: ir.Shape) -> ir.Value:
    """[B, N * size, ...] -> [B, N, size, ...] -> the chosen [B, size, ...]."""
    scope, bank, name = state.scope, state.plan.banks[node], str(node.outputs[0].name)
    weight, bias = bank.stacked()
    n, size = bank.num_experts, bank.size
    bias_value = None if bias is None else scope.constant(bias, f"{name}.biases")
    if node.op_type == LINEAR:
        wide = ir.Shape([*shape[:-1], n * size])
        weight_value = scope.constant(weight.T.copy(), f"{name}.weights")
        every = write_plain_op(scope, node, x, weight_value, bias_value, name=f"{name}.experts", shape=wide)
        apart = scope.op(
            "Reshape",
            [every, scope.integers(*([0] * (len(shape) - 1)), n, size)],
            name=f"{name}.experts",
            dtype=x.dtype,
            shape=[*shape[:-1], n, size],
        )
        axis = len(shape) - 1
        perm = [0, axis, *range(1, axis), axis + 1]
        every = scope.op(
            "Transpose", [apart], {"perm": perm}, name=f"{name}.experts", dtype=x.dtype, shape=[shape[0], n, *shape[1:]]
        )
    else:
        wide = ir.Shape([shape[0], n * size, *shape[2:]])
        weight_value = scope.constant(weight, f"{name}.weights")
        every = write_plain_op(scope, node, x, weight_value, bias_value, name=f"{name}.experts", shape=wide)
        every = scope.op(
            "Reshape",
            [every, scope.integers(0, n, size, *(int(d) for d in shape[2:]))],  # type: ignore[arg-type]
            name=f"{name}.experts",
            dtype=x.dtype,
            shape=[shape[0], n, *shape[1:]],
        )
    index = scope.op("Unsqueeze", [expert_index, scope.integers(1)], name="chosen", dtype=INT64, shape=[shape[0], 1])
    return scope.op("GatherND", [every, index], {"batch_dims": 1}, name=name, dtype=x.dtype, shape=shape)
